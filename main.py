"""Trains and evaluates MogaNet, and any other timm model, on ImageNet.

    torchrun --nproc_per_node=8 main.py --model moganet_small --data_path /path/to/imagenet
    python main.py --eval --checkpoint runs/moganet_small/checkpoint-best-ema.pth --data_path /path/to/imagenet
"""
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

import recipes
import utils
from utils import UserError

# What the machine may run out of, anywhere, and the cure
SHORTAGES = {errno.EMFILE: 'raise the limit of open files by ulimit -n 65536, or give fewer --num_workers',
             errno.ENFILE: 'this machine has too many open files; give fewer --num_workers',
             errno.ENOSPC: 'free space there', errno.EDQUOT: 'free space there, or raise the quota',
             errno.ENOMEM: 'the memory of this machine is used up; give fewer --num_workers, or more memory'}


def main(argv: list[str] | None = None, *, report: Callable[[str], None] = utils.to_stderr,
         observer: Callable[[Any], None] | None = None) -> int:
    """Runs a command line.

    Args:
        report: receives the text of the error that ends the run, on the rank that failed first.
        observer: receives the training's state after every update.

    Returns:
        The exit status: 0 where the training or the evaluation is complete, 2 for what the user can put right, 128 plus
        the signal's number for a run that was told to stop and has saved, 1 for everything else.
    """
    # When a rank fails, torch's C++ side prints a page a rank about its lost connections, over the error itself
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
    try:
        utils.settle()
        utils.check_launch()
        recipe, run = recipes.resolve(sys.argv[1:] if argv is None else argv)
        recipes.check_start(recipe, run)
    except SystemExit as done:  # --help, --list_recipes, --print_recipe
        return done.code or 0
    except UserError as error:
        # The same on every rank, but for a path that a node does not see
        if not os.environ.get('LOCAL_RANK', '').strip('0').isdigit():
            report(f'error: {error}')
        return 2

    rank = utils.number_of('RANK', 0)
    utils.setup_logging(rank)
    processes = None
    try:
        if run.plan:
            from training.plan import plan
            print(plan(recipe, run))
            return 0
        processes = utils.init_processes(run.device)
        if run.eval:  # with torch, which takes seconds to import: only now that the flags are known to be right
            from training.evaluation import evaluate_sources
            status = evaluate_sources(recipe, run, processes)
        else:
            from training.trainer import train
            status = train(recipe, run, processes, observer=observer)
        utils.leave_processes()
        return status
    except UserError as error:
        if utils.claim_error(rank):
            report(f'error: {error}')
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if cure := SHORTAGES.get(errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, 'errno', None)):
            if utils.claim_error(rank):
                report(f'error: {utils.reason_of(error)}: {cure}')
            return 2
        if type(error).__name__ == 'OutOfMemoryError':  # of torch, which may not be imported yet
            if utils.claim_error(rank):
                cure = 'a smaller --val_batch_size' if run.eval else (
                    'a smaller --batch_size (or auto), --grad_checkpointing, or a smaller --val_batch_size')
                report(f'error: the device is out of memory; give {cure}')
            return 2
        if utils.claim_error(rank):
            lost = processes is not None and processes.world_size > 1 and utils.lost_ranks(error)
            report(f'error: {lost}' if lost else traceback.format_exc())
        return 1


if __name__ == '__main__':
    utils.run_cli(main)
