"""Trains and evaluates MogaNet, and any other timm model, on ImageNet.

    torchrun --nproc_per_node=8 main.py --model moganet_small --data_path /path/to/imagenet
    python main.py --eval --checkpoint runs/moganet_small/checkpoint-best-ema.pth --data_path /path/to/imagenet
"""
import os
import sys
import traceback
from collections.abc import Callable

import recipes
import utils
from utils import UserError


def main(argv: list[str] | None = None, *, report: Callable[[str], None] = utils.to_stderr) -> int:
    """Runs a command line.

    Args:
        report: receives the text of the error that ends the run, on the rank that failed first.

    Returns:
        The exit status: 0 where the training or the evaluation is complete, 2 for what the user can put right, 128 plus
        the signal's number for a run that was told to stop and has saved, 1 for everything else.
    """
    rank = int(os.environ.get('RANK', 0))
    # When a rank fails, torch's C++ side prints a page a rank about its lost connections, over the error itself
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
    try:
        recipe, run = recipes.resolve(sys.argv[1:] if argv is None else argv)
        recipes.check_start(recipe, run)
    except SystemExit as done:  # --help, --list_recipes, --print_recipe
        return done.code or 0
    except UserError as error:
        if int(os.environ.get('LOCAL_RANK', 0)) == 0:  # the same on every rank, but for a path that a node does not see
            report(f'error: {error}')
        return 2

    utils.setup_logging(rank)
    try:
        processes = utils.init_processes(run.device)
        if run.eval:  # with torch, which takes seconds to import: only now that the flags are known to be right
            from evaluation import evaluate as work
        else:
            from trainer import train as work
        status = work(recipe, run, processes)
        utils.leave_processes()
        return status
    except UserError as error:
        if utils.claim_error(rank):
            report(f'error: {error}')
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ == 'OutOfMemoryError':  # of torch, which may not be imported yet
            if utils.claim_error(rank):
                cure = 'a smaller --val_batch_size' if run.eval else (
                    'a smaller --batch_size (or auto), --grad_checkpointing, or a smaller --val_batch_size')
                report(f'error: the device is out of memory; give {cure}')
            return 2
        if utils.claim_error(rank):
            report(traceback.format_exc())
        return 1


if __name__ == '__main__':
    sys.exit(main())
