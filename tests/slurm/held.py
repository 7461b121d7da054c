"""Tasks with a fault of a test in them. In a module of its own, in which the job finds them again by name."""
import os
import time

import run_with_submitit
import utils

HOLD_AT = 16  # update of the run, counted from 1; in the middle of the second of its three epochs


def after_update(number: int, action) -> None:
    """Calls `action(stop)` after an update of this start."""
    agreed, updates = utils.StopRequest.agreed, 0

    def counted(stop: utils.StopRequest) -> int:
        nonlocal updates
        updates += 1
        if updates == number:
            action(stop)
        return agreed(stop)

    utils.StopRequest.agreed = counted


def hold_first_start() -> None:
    """Waits after an update for a signal, which so meets the training there however slow the machine is."""
    def hold(stop: utils.StopRequest) -> None:
        print(f'held: process {os.getpid()}', flush=True)
        while not stop._received:
            time.sleep(0.02)

    if 'SLURM_RESTART_COUNT' not in os.environ:
        after_update(HOLD_AT, hold)


class HeldTask(run_with_submitit.Task):
    """Is held in its first start."""

    def __call__(self):
        hold_first_start()
        return super().__call__()


class BrokenTask(run_with_submitit.Task):
    """Its second rank fails."""

    def __call__(self):
        def fail(_stop: utils.StopRequest) -> None:
            if os.environ['RANK'] == '1':
                raise RuntimeError('the disk of rank 1 is on fire')

        after_update(3, fail)
        return super().__call__()


class StuckTask(run_with_submitit.Task):
    """Never comes to train before it is interrupted."""

    def __call__(self):
        def stuck(_argv, *, report):
            print('stuck', flush=True)
            time.sleep(600)

        run_with_submitit.training.main = stuck
        return super().__call__()
