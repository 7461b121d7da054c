"""A page on which one or two checkpoints say what is in photographs, with the answers of predict.py.

    python -m web --checkpoint runs/demo/checkpoint-best-ema.pth [SOURCE2] [--port 7860]

Without a checkpoint it shows the digits demo's, where `make demo` has made one, and otherwise offers the released ones,
which are downloaded when they are chosen.
"""
import argparse
from pathlib import Path

import predict
from models.released import RELEASED, RELEASED_DENSE
from utils import UserError, run_cli

DEMO = Path(__file__).resolve().parent.parent / 'runs' / 'demo' / 'checkpoint-best-ema.pth'


def main(argv: list[str] | None = None) -> None:
    """Serves as the flags say, until it is interrupted. Raises UserError."""
    parser = argparse.ArgumentParser(prog='python -m web', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--host', default='127.0.0.1',
                        help='address at which it answers; 0.0.0.0 shows it to all who reach this machine')
    parser.add_argument('--port', type=int, default=7860)
    predict.add_flags(parser, several=True)
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65535:
        raise UserError(f'--port {args.port}: give one from 1 to 65535')
    sources = args.checkpoint or ([str(DEMO)] if DEMO.exists() else [])
    try:
        from web.server import serve
    except ImportError as error:
        raise UserError(f"this needs {error.name}: pip install -e '.[web]'") from None
    offered = sources or [f'released:{name}' for name in RELEASED | RELEASED_DENSE]
    serve(offered, chosen=len(sources), host=args.host, port=args.port, **predict.arguments(args))


if __name__ == '__main__':
    run_cli(main)
