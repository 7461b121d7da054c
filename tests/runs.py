"""Starts `main.py` in real processes that can be killed, without paying for the import of torch each time.

A forkserver imports everything once; a process forked from it is at work within a fraction of a second. Ranks get the
environment that torchrun would give them.
"""
import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

# A MogaNet of four blocks: everything of the architecture in a few thousand parameters
TINY = ('--model', 'moganet_xtiny', '--model_kwargs', 'dims=[8,8,16,16]', 'depths=[1,1,1,1]', 'ffn_ratios=[2,2,2,2]',
        '--input_size', '32', '--precision', 'fp32', '--model_ema', '--model_ema_decay', '0.9', '--print_freq', '4')

os.environ['TORCH_CPP_LOG_LEVEL'] = 'ERROR'  # as main.py sets it, before torch is imported
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload([
    'torch', 'timm', 'main', 'training.trainer', 'training.evaluation', 'tasks.classification', 'tasks.detection',
    'tasks.segmentation', 'models.moganet', 'models.weights', 'torch.utils.tensorboard', 'timm.loss'])


@dataclasses.dataclass
class Job:
    """A running command: its ranks and what they print."""

    ranks: list[multiprocessing.Process]
    output: Path

    def text(self) -> str:
        """What all ranks printed so far."""
        return self.output.read_text()

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one rank, or to all."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait_for(self, what: str, *, count: int = 1, timeout: float = 120) -> None:
        """Waits until a text has been printed `count` times."""
        end = time.monotonic() + timeout
        while self.text().count(what) < count:
            if time.monotonic() > end or not any(process.is_alive() for process in self.ranks):
                pytest.fail(f'{what!r} was not printed {count} times:\n{self.text()}')
            time.sleep(0.005)

    def wait(self, timeout: float = 180) -> list[int]:
        """Waits for the end. Returns the exit status of every rank."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(end - time.monotonic(), 0.1))
            if process.is_alive():
                text = self.text()
                self.kill()
                pytest.fail(f'still running after {timeout} s:\n{text}')
        return [process.exitcode for process in self.ranks]


def start(argv: tuple[str, ...], output: Path, *, world_size: int = 1, before: str = '') -> Job:
    """Starts `main.py` with these words in `world_size` processes.

    Args:
        output: file that takes what they print.
        before: Python to run in each process first, with `rank` defined; for faults that a test plants. A function
            `observe(state)` in it is called after every update.
    """
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    output.write_text('')
    ranks = []
    for rank in range(world_size):
        environment = {'OMP_NUM_THREADS': '1'}
        if world_size > 1:
            environment |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world_size),
                            'LOCAL_WORLD_SIZE': str(world_size), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        process = _context.Process(target=_rank, args=(list(argv), str(output), environment, before, rank))
        process.start()
        ranks.append(process)
    return Job(ranks, output)


def run(argv: tuple[str, ...], output: Path, **others: object) -> str:
    """Runs a command to its end, which must be a success. Returns what it printed."""
    job = start(argv, output, **others)
    statuses = job.wait()
    assert statuses == [0] * len(statuses), job.text()
    return job.text()


def _rank(argv: list[str], output: str, environment: dict[str, str], before: str, rank: int) -> None:
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
    import torch

    import main
    # Of data workers: a process from a forkserver would start a forkserver of its own
    multiprocessing.set_start_method('fork', force=True)
    torch.set_num_threads(1)
    planted = {'rank': rank}
    exec(before, planted)
    # An older main, which golden.py starts, takes no observer
    observer = {'observer': planted['observe']} if 'observe' in planted else {}
    status = main.main(argv, **observer)
    sys.stdout.flush()
    os._exit(status) if status else None
