"""Makes a file for publication out of a training checkpoint of any format: weights and what they need, no optimizer.

    python tools/strip_checkpoint.py runs/moganet_small/checkpoint-best-ema.pth moganet_small.pth

The last line that it prints is the file's SHA-256, for the page that offers the file: `--checkpoint
URL#sha256=...` checks it.
"""
import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.download import sha256_of
from models.weights import load_weights
from utils import UserError, as_path, run_cli, write_atomically


def main(argv: list[str] | None = None) -> None:
    """Strips as the flags say. Raises UserError; the output is then left as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='a path, an https URL or released:NAME')
    parser.add_argument('output', type=as_path)
    parser.add_argument('--weights', choices=('auto', 'raw', 'ema'), default='auto',
                        help='auto: the average where there is one')
    args = parser.parse_args(argv)
    if args.output.exists() and os.path.exists(args.checkpoint) and args.output.samefile(args.checkpoint):
        raise UserError(f'{args.output} is the checkpoint itself, whose other contents would be lost; give another '
                        'file')
    weights = load_weights(args.checkpoint, args.weights)
    kept = {key: weights.meta[key] for key in ('epoch', 'classes', 'recipe') if key in weights.meta}
    payload = {'model': weights.state_dict, 'which': weights.which, 'gate': weights.gate,
               'arch': weights.meta.get('model'), **kept}
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, lambda file: torch.save(payload, file))
    except OSError as error:
        raise UserError(f'cannot write {args.output}: {error.strerror or error}') from None
    print(f'{weights}\n{args.output}: {args.output.stat().st_size:,} bytes\nsha256 {sha256_of(args.output)}')


if __name__ == '__main__':
    run_cli(main)
