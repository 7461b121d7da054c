"""Small things without a home: user errors, derived seeds, the process group, files.

torch is imported inside the functions that need it, so that the command line answers without it.
"""
import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

log = logging.getLogger('moganet')


class UserError(Exception):
    """Something the user can put right. `main` prints the message, one line with the cure, and exits with status 2."""


def nearest(word: str, known: Iterable[str], *, prefix: str = '') -> str:
    """`; did you mean a, b?` for the known names next to a misspelt one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f'; did you mean {", ".join(prefix + name for name in close)}?' if close else ''


def to_stderr(text: str) -> None:
    print(text.rstrip(), file=sys.stderr, flush=True)


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: with its status, or with one line and status 2 on a user error."""
    try:
        status = main() or 0
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 2
    sys.exit(status)


# ---- Derived randomness ---------------------------------------------------------------------------------------------

def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed that depends on all keys and their order: the source of every random number here.

    Nothing random is stored in a checkpoint; a stream begins wherever its keys (seed, epoch, image, ...) say. BLAKE2b
    and not `hash`, which differs from process to process, nor a sum, under which (0, 1) and (1, 0) would agree.
    """
    text = '\x1f'.join(f'{type(key).__name__}:{key}' for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little') >> 1


def seed_everything(*keys: int | str) -> int:
    """Seeds Python, NumPy and torch (every device) from `derive_seed(*keys)`, which it returns."""
    import random

    import numpy as np
    import torch
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed


# ---- Processes ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among the others: its rank, how many there are, and its device."""

    device: 'torch.device'
    rank: int = 0
    world_size: int = 1
    host_group: Any = None  # gloo, for what travels between the hosts without waiting for a device

    @property
    def first(self) -> bool:
        return self.rank == 0


def choose_device(name: str, local_rank: int = 0) -> 'torch.device':
    """The device of a name; 'auto' takes CUDA, then MPS, then the CPU. Raises UserError where it is not there."""
    import torch
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown; say auto, cuda, mps or cpu") from None
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError('--device cuda: torch finds no CUDA device here; try --device auto, and see INSTALL.md')
        if device.index is None:
            if local_rank >= torch.cuda.device_count():
                raise UserError(f'local rank {local_rank} has no GPU: there are {torch.cuda.device_count()} here; '
                                'start that many processes on this machine')
            device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device mps: torch finds no Apple GPU here; try --device auto')
    return device


def init_processes(device: str) -> Processes:
    """Joins the process group that the launcher's environment describes (torchrun's variables); alone without one.

    Only `RANK` and `WORLD_SIZE` count: SLURM's own variables stand in every interactive shell of a cluster.
    """
    import datetime

    import torch.distributed as dist
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    chosen = choose_device(device, local_rank)
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if world_size == 1:
        return Processes(device=chosen)
    # An hour, since rank 0 may be saving to a slow disk; a rank that dies closes its connections, or its launcher
    # stops the others, long before
    patience = datetime.timedelta(hours=1)
    dist.init_process_group('nccl' if chosen.type == 'cuda' else 'gloo', timeout=patience,
                            device_id=chosen if chosen.type == 'cuda' else None)
    return Processes(device=chosen, rank=dist.get_rank(), world_size=world_size,
                     host_group=dist.new_group(backend='gloo', timeout=patience))


def leave_processes() -> None:
    """Leaves the process group, once all that was to be exchanged has been. Not for a rank that failed: it may hang."""
    import torch.distributed as dist
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first(name: str) -> Iterator[None]:
    """Lets rank 0 through the body first; the others wait for it, up to a day, and then follow.

    The wait is on the launcher's key-value store and not a collective, which would time out over a long index build.
    """
    import datetime

    import torch.distributed as dist
    if not dist.is_initialized():
        yield
        return
    store, key = dist.distributed_c10d._get_default_store(), f'moganet/{name}'
    if dist.get_rank() > 0:
        store.wait([key], datetime.timedelta(days=1))
    try:
        yield
    finally:
        if dist.get_rank() == 0:
            store.set(key, 'done')


def from_rank_zero(name: str, compute: Callable[[], str]) -> str:
    """A text that rank 0 computes and all ranks return, so that they cannot come to different answers."""
    import datetime

    import torch.distributed as dist
    if not dist.is_initialized():
        return compute()
    store, key = dist.distributed_c10d._get_default_store(), f'moganet/{name}'
    if dist.get_rank() == 0:
        store.set(key, compute())
    else:
        store.wait([key], datetime.timedelta(days=1))
    return store.get(key).decode()


def claim_error(rank: int) -> bool:
    """Whether this rank is the first to fail, and so the one to show its error: the others fail because of it."""
    import torch.distributed as dist
    if not dist.is_initialized():
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set('moganet/error', '', str(rank)) == str(rank).encode()
    except Exception:  # the store went with the rank that held it, and that rank has shown its error
        return False


class StopRequest:
    """Requests to stop, by signal to any rank, on which all ranks agree without waiting for the device.

    Every update the ranks start to combine their flags on the host and look at what the update before brought; so all
    see a request after the same update, one later than the first that noticed it.
    """

    def __init__(self, processes: Processes, names: Sequence[str] = ('TERM', 'INT', 'USR1', 'USR2')):
        """
        Args:
            names: of the signals, without SIG.
        """
        self._processes = processes
        self._signals = [signal.Signals[f'SIG{name}'] for name in names]
        self._received, self._first_interrupt = 0, 0.0
        self._pending: tuple[Any, Any] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # A second Ctrl-C means now; a launcher's echo of the first comes within milliseconds and does not
        if number == signal.SIGINT:
            if self._first_interrupt and time.monotonic() - self._first_interrupt > 1:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or time.monotonic()
        if not self._received:
            self._received = number
            log.warning('%s received: saving after this update', signal.Signals(number).name)

    def agreed(self) -> int:
        """The signal on which all ranks agree to stop now, or 0. To be called by every rank after every update."""
        if self._processes.host_group is None:
            return self._received
        import torch
        import torch.distributed as dist
        number = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            number = flag.tolist()[0]  # host memory; no read of the device
        flag = torch.tensor([self._received])
        self._pending = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._processes.host_group, async_op=True),
                         flag)
        return number


# ---- Files ----------------------------------------------------------------------------------------------------------

def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file so that `path` is at every moment the whole old or the whole new one, also across a power cut.

    Written beside the target, flushed to disk, renamed, and the folder flushed. On an error nothing is left behind and
    the old file stays. Raises what `write` raises, OSError on a full disk.
    """
    beside = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        with open(beside, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes renames and links in a folder last, where the system can (Windows cannot)."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; a list of numbers in one line."""
    text = json.dumps(value, indent=2)
    text = re.sub(r'\[\n([^][{}"]*)\n *\]', lambda match: f'[{" ".join(match[1].split())}]', text)
    write_atomically(path, lambda file: file.write(f'{text}\n'.encode()))


def setup_logging(rank: int) -> None:
    """Sends rank 0's log to stdout. The others know the same and are silent; errors reach stderr by `main`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter('%(message)s'))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    log.propagate = False
