"""Small things without a home: user errors, derived seeds, the process group, files.

torch is imported inside the functions that need it, so that the command line answers without it.
"""
import collections
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
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


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return ' '.join(str(error).split()) or type(error).__name__


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def to_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
        print(text.rstrip(), file=sys.stderr, flush=True)


def _accept_any_name() -> None:
    """Lets stdout show file names that are not Unicode, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
            sys.stdout.reconfigure(errors='backslashreplace')


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: with its status, or with one line and status 2 on a user error."""
    _accept_any_name()
    try:
        settle()
        status = main() or 0
    except UserError as error:
        to_stderr(f'error: {error}')
        status = 2
    except BrokenPipeError:  # `| head` has seen enough
        status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # else Python tries again as it ends, fails, and makes the status 120
            _discard(stream)
    sys.exit(status)


@contextlib.contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """The one rule for what only notes, shows or checks: it is not worth a run. Where it fails, the log has a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.error('%s: %s; the run goes on without it.', what, reason_of(error))


# ---- What a process finds -------------------------------------------------------------------------------------------

def expand(path: str) -> str:
    """A path with `~` replaced by the home folder; addresses and `released:NAME` stay as they are.

    The one place where paths are expanded: all flags go through it, of main.py and of the tools.
    """
    return path if re.match(r'released:|\w+://', path) else os.path.expanduser(path)


def as_path(path: str) -> Path:
    """A flag's word as a path, for argparse."""
    return Path(expand(path))


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or made where it is not there yet."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def settle() -> None:
    """Makes good what a service or a container may leave out: standard streams, a home, a name of the user.

    Raises:
        UserError: where no folder for temporary files can be written.
    """
    # A file that took the place of a closed standard stream would receive what a library prints
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        with contextlib.suppress(AttributeError, ValueError, OSError):  # for names that the encoding lacks
            getattr(sys, name).reconfigure(errors='backslashreplace')
    try:
        temporary = tempfile.gettempdir()
    except OSError:
        raise UserError('no folder for temporary files can be written; free space in /tmp, or set TMPDIR') from None
    spare = os.path.join(temporary, f'moganet-home-{getattr(os, "getuid", int)()}')
    homeless = os.path.expanduser('~') == '~'  # no HOME, and a user without a line in /etc/passwd
    caches = (Path(__file__).parent / '__pycache__', Path(os.path.expanduser('~'), '.cache'))
    no_cache = 'NUMBA_CACHE_DIR' not in os.environ and (homeless or not any(map(is_writable, caches)))
    if homeless or no_cache:
        try:
            os.makedirs(spare, mode=0o700, exist_ok=True)
            if os.stat(spare).st_uid != os.getuid():
                raise PermissionError
        except OSError:  # another user's: what is kept there is code
            spare = tempfile.mkdtemp(prefix='moganet-home-')
    if homeless:
        os.environ['HOME'] = spare
        os.environ.setdefault('USER', str(os.getuid()))
    if no_cache:
        os.environ['NUMBA_CACHE_DIR'] = os.path.join(spare, 'numba')


def number_of(name: str, default: int) -> int:
    """A whole number of the launcher's environment. Raises UserError for another text."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r'\d{1,9}', text.strip()):
        raise UserError(f'{name} is {text!r} in the environment, where a launcher sets a whole number: unset it, or '
                        'start by torchrun')
    return int(text)


def check_launch() -> None:
    """Refuses an environment that describes several processes but not where they meet. Raises UserError."""
    world_size, rank = number_of('WORLD_SIZE', 1), number_of('RANK', 0)
    number_of('LOCAL_RANK', 0)
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if world_size < 1:
        raise UserError('WORLD_SIZE is 0 in the environment: unset it, or start by torchrun')
    if world_size > 1 and missing:
        raise UserError(f'WORLD_SIZE is {world_size} in the environment, but {" and ".join(missing)} '
                        f'{"is" if len(missing) == 1 else "are"} not set: for several processes start by torchrun '
                        f'--nproc_per_node={world_size} main.py ..., for one unset WORLD_SIZE')
    if world_size > 1:
        number_of('MASTER_PORT', 0)
    if rank >= world_size:
        raise UserError(f'RANK is {rank} in the environment, but WORLD_SIZE is {world_size}: ranks count from 0; start '
                        'by torchrun, or unset both')


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
            count = torch.cuda.device_count()
            # A launcher may show each process a GPU of its own (srun --gpus-per-task=1)
            local_rank = 0 if count == 1 and ',' not in os.environ.get('CUDA_VISIBLE_DEVICES', ',') else local_rank
            if local_rank >= count:
                raise UserError(f'local rank {local_rank} has no GPU: there are {count} here; start that many '
                                'processes on this machine')
            device = torch.device('cuda', local_rank)
        elif number_of('WORLD_SIZE', 1) > 1:
            raise UserError(f'--device {name} is one GPU for all {number_of("WORLD_SIZE", 1)} processes; say --device '
                            'cuda, which gives each its own')
        torch.cuda.set_device(device)
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device mps: torch finds no Apple GPU here; try --device auto')
    return device


def interface_to(address: str) -> str | None:
    """The network interface by which this host reaches an address; None where that is the loopback, or unknown."""
    with contextlib.suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in () if own.startswith('127.') else socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack('256s', name.encode())
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]) == own:  # SIOCGIFADDR
                    return name
    return None


def _choose_interface(world_size: int) -> None:
    """Lets gloo listen where the other nodes can reach it.

    It takes the address of the host's own name, which Debian and Ubuntu map to 127.0.1.1.
    """
    here = number_of('LOCAL_WORLD_SIZE', 0)
    if os.environ.get('GLOO_SOCKET_IFNAME') or here == world_size:
        return
    # On the node of rank 0 MASTER_ADDR may be such a name; an address that is nobody's follows the default route
    name = interface_to(os.environ['MASTER_ADDR']) or (interface_to('192.0.2.1') if here else None)
    if name:
        os.environ['GLOO_SOCKET_IFNAME'] = name


_store: Any = None  # of keys and values, by which the ranks have met; None in a single process


def init_processes(device: str) -> Processes:
    """Joins the process group that the launcher's environment describes (torchrun's variables); alone without one.

    Only `RANK` and `WORLD_SIZE` count: SLURM's own variables stand in every interactive shell of a cluster.
    """
    global _store
    import datetime

    import torch.distributed as dist
    chosen = choose_device(device, number_of('LOCAL_RANK', 0))
    world_size = number_of('WORLD_SIZE', 1)
    if world_size == 1:
        return Processes(device=chosen)
    # A rank that dies closes its connections, or its launcher stops the others, long before. NCCL has the same
    # patience, though a device that hangs costs it: rank 0 may wait as long for its disk, and the others for rank 0
    patience = datetime.timedelta(seconds=RANK_PATIENCE)
    try:
        if chosen.type != 'cuda':
            _choose_interface(world_size)
        store, rank, _ = next(dist.rendezvous('env://', timeout=patience))
        dist.init_process_group('nccl' if chosen.type == 'cuda' else 'gloo', timeout=patience, store=store, rank=rank,
                                world_size=world_size, device_id=chosen if chosen.type == 'cuda' else None)
    except (dist.DistError, ValueError) as error:  # of the store and the network; of an address that is none
        raise UserError(f'the {world_size} processes cannot meet at {os.environ.get("MASTER_ADDR")}:'
                        f'{os.environ.get("MASTER_PORT")} ({reason_of(error)[:200]}): give a MASTER_PORT that is free '
                        'on the node of rank 0, and see that all ranks are started and reach it') from None
    _store = dist.PrefixStore('moganet', store)
    return Processes(device=chosen, rank=rank, world_size=world_size)


def leave_processes() -> None:
    """Leaves the process group, once all that was to be exchanged has been. Not for a rank that failed: it may hang.

    Rank 0 leaves last: without torchrun the store goes with it, in which another rank may still be reading.
    """
    global _store
    import datetime

    import torch.distributed as dist
    if dist.is_initialized():
        rank = dist.get_rank()
        if rank:
            _store.set(f'left {rank}', '')
        else:
            _store.wait([f'left {other}' for other in range(1, dist.get_world_size())],
                        datetime.timedelta(seconds=RANK_PATIENCE))
        dist.destroy_process_group()
        _store = None


def _wait_for_rank(key: str, rank: int = 0) -> None:
    """Waits until a rank has set a key. Raises UserError after a day."""
    import datetime

    import torch.distributed as dist
    try:
        with waiting_for(f'rank {rank} ({key})', saving=key == 'written'):
            _store.wait([key], datetime.timedelta(seconds=STORE_PATIENCE))
    except dist.DistStoreError:
        raise UserError(f'rank {rank} has not come on for {STORE_PATIENCE} s (the others wait for its {key}): start '
                        'again, and see what its node does') from None


_turns: collections.Counter[str] = collections.Counter()  # of `rank_zero_first` by name, the same on all ranks


@contextlib.contextmanager
def rank_zero_first(name: str, tell: Callable[[], str] = str) -> Iterator[str]:
    """Lets rank 0 through the body first, then the first rank of each other node, then all others.

    What the body leaves in the user's cache, the others find there, whether the nodes share the home folder or not. The
    waits, up to a day each, are on the launcher's key-value store and not collectives, which would time out over a long
    index build.

    Args:
        tell: what rank 0 says to the others after its body.

    Yields:
        what it said; '' on rank 0 itself, and in a single process.
    """
    import torch.distributed as dist
    if not dist.is_initialized():
        yield ''
        return
    _turns[name] += 1  # each turn waits for itself: of several data sets, each is indexed by rank 0 first
    key, rank = f'{name}{_turns[name] if _turns[name] > 1 else ""}', dist.get_rank()
    # Ranks are counted node by node, so that this one's node begins so many before it; each says when it is done
    before = {0, max(rank - number_of('LOCAL_RANK', 0), 0)} - {rank} if rank else ()
    for other in sorted(before):
        _wait_for_rank(f'{key} {other}' if other else key, other)
    try:
        yield _store.get(key).decode() if rank else ''
    finally:
        _store.set(f'{key} {rank}' if rank else key, '' if rank else tell())


def from_rank_zero(name: str, compute: Callable[[], str]) -> str:
    """A text that rank 0 computes and all ranks return, so that they cannot come to different answers."""
    import torch.distributed as dist
    if not dist.is_initialized():
        return compute()
    if dist.get_rank() == 0:
        _store.set(name, compute())
    else:
        _wait_for_rank(name)
    return _store.get(name).decode()


def lost_ranks(error: Exception) -> str:
    """What a failed exchange between the ranks says of the others, as a line; '' for another error."""
    text = reason_of(error)
    if re.search(r'Timed out waiting|[Tt]imeout\(ms\)|collective operation timeout|wait timeout', text):
        return (f'another rank has not come on for {RANK_PATIENCE:g} s: see what it and its node do, and start the '
                'same command again')
    if re.search(r'Connection closed by peer|Connection reset by peer|Broken pipe|connection was aborted|'
                 r'remote process exited', text):
        return ('another rank has ended without a word, as one that the system kills when memory runs out: see the log '
                'of its node, and start the same command again')
    return ''


def claim_error(rank: int) -> bool:
    """Whether this rank is the first to fail, and so the one to show its error: the others fail because of it."""
    import torch.distributed as dist
    if not dist.is_initialized():
        return True
    first = True  # where the store does not answer: this node is cut off from it

    def ask() -> None:
        nonlocal first
        try:
            first = _store.compare_set('error', '', str(rank)) == str(rank).encode()
        except Exception:  # the store went with the rank that held it, and that rank has shown its error
            first = False

    asking = threading.Thread(target=ask, daemon=True)  # the call itself has no limit
    with contextlib.suppress(RuntimeError):  # no more threads, which may be the error
        asking.start()
        asking.join(timeout=ERROR_PATIENCE)
    return first


# ---- Waits, and their end -------------------------------------------------------------------------------------------

# Seconds after which a wait ends. CONTRIBUTING.md lists all waits; a test finds those that have no limit
RANK_PATIENCE = 3600.0  # for another rank, which may be saving to a slow disk
ERROR_PATIENCE = 10.0  # for the store, by a rank that has failed
STORE_PATIENCE = 86400.0  # for rank 0 while it builds an index or downloads
WRITE_PATIENCE = 3600.0  # for the write of a checkpoint
STALL = 7200.0  # without a sign of life from the training; above all those that it may wait for
STOP_PATIENCE = 600.0  # without a sign of life after a signal to stop
SECOND_PATIENCE = 10.0  # without a sign of life after a second one

CUDA_LEAD = 2  # updates that the host may run ahead of its device where there are several

_signs = 0  # of life
_waits: list[tuple[str, bool]] = []  # what the main thread waits for, the innermost last, and whether it is saved


def alive() -> None:
    """A sign of life: a batch has come, an update is done, a piece of a checkpoint is written."""
    global _signs
    _signs += 1


@contextlib.contextmanager
def waiting_for(what: str, *, saving: bool = False) -> Iterator[None]:
    """Names what the main thread waits for within, in case that `StopRequest` has to end the wait.

    Args:
        saving: whether it is for a checkpoint, for which a first signal may have asked: a second one does not cut it.
    """
    _waits.append((what, saving))
    try:
        yield
    finally:
        _waits.pop()
        alive()


class StopRequest:
    """Requests to stop, by signal to any rank, on which all ranks agree.

    The first rank that notices a signal writes into the launcher's key-value store after which update all stop; every
    rank looks there once an update, whatever their number. None can be past that update already: an update ends with
    the sum of all ranks' gradients, so on the CPU none ends the next before the writer has begun it, and the key is
    there. A CUDA device works off its updates behind the host, which therefore runs at most `CUDA_LEAD` of them ahead.

    A hang is worse than a crash: a thread ends the process, with a line that says what was waited for, where signs of
    life (`alive`) stay out for `STOP_PATIENCE` seconds after a signal, for `SECOND_PATIENCE` after a second one unless
    a checkpoint is being written, and for `STALL` without any. Python's own handlers cannot do that: the main thread
    may be blocked in a library.
    """

    def __init__(self, processes: Processes, names: Sequence[str] = ('TERM', 'INT', 'HUP', 'USR1', 'USR2')):
        """
        Args:
            names: of the signals, without SIG.
        """
        self._processes = processes
        self._signals = [signal.Signals[f'SIG{name}'] for name in names]
        self._received, self._first_interrupt = 0, 0.0
        self._updates = 0  # of this start, the same on all ranks
        self._stop: tuple[int, int] | None = None  # the signal, and the update after which all ranks stop
        self._queued: collections.deque[torch.cuda.Event] = collections.deque()  # the ends of the last updates
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        for number in self._signals:
            # nohup ignores SIGHUP so that the run outlives its terminal. torchrun sets it back in its processes
            if number != getattr(signal, 'SIGHUP', 0) or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        if self._signals:
            self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name='stop', daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._signals:
            signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.send(bytes(1))  # no signal: ends the thread
        self._watcher.join(timeout=10)
        self._writer.close()
        self._reader.close()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # A second Ctrl-C means now; a launcher's echo of the first comes within milliseconds and does not
        if number == signal.SIGINT:
            if self._first_interrupt and time.monotonic() - self._first_interrupt > 1:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or time.monotonic()
        if not self._received:
            self._received = number
            log.warning('%s received: saving after this update', signal.Signals(number).name)

    def _watch(self) -> None:
        """The thread: counts signals and the seconds without a sign of life."""
        first, number, again = 0.0, 0, False
        silent, seen, before = 0.0, _signs, time.monotonic()
        while True:
            saving = bool(_waits) and _waits[-1][1]
            limit = SECOND_PATIENCE if again and not saving else STOP_PATIENCE if number else STALL
            tick = min(limit / 4, 5.0)
            ready = select.select([self._reader], [], [], tick)[0]
            now = time.monotonic()
            if ready:
                received = self._reader.recv(4096)
                if 0 in received:  # the training is over
                    return
                for one in received:
                    if one in self._previous:
                        again = again or (number != 0 and now - first > 1)
                        first, number = first or now, number or one
            # By small steps, so that the hours of a suspended process or machine do not count
            silent, before = silent + min(now - before, 2 * tick), now
            if _signs != seen:
                silent, seen = 0.0, _signs
            if silent >= limit:
                self._end(number, limit, again)

    def _end(self, number: int, limit: float, again: bool) -> None:
        """Ends the process, which cannot end itself."""
        after = f' after {"a second signal" if again else signal.Signals(number).name}' if number else ''
        what = _waits[-1][0] if _waits else 'the device or the other ranks'
        to_stderr(f'error: rank {self._processes.rank} waited {limit:g} s for {what}{after}, without an update: ended; '
                  'start the same command again to continue from the last checkpoint')
        for child in multiprocessing.active_children():  # a stopped worker would stay for ever
            child.kill()
        os._exit(1)

    def agreed(self) -> int:
        """The signal on which all ranks agree to stop now, or 0. To be called by every rank after every update."""
        alive()
        if self._processes.world_size == 1:
            return self._received
        self._updates += 1
        with waiting_for('the other ranks'):
            self._bound_lead()
            if self._stop is None:
                self._stop = self._ask()
        return self._stop[0] if self._stop and self._updates >= self._stop[1] else 0

    def _bound_lead(self) -> None:
        """Waits until the device has done all but the last `CUDA_LEAD` updates: none but for a host far ahead."""
        import torch
        if self._processes.device.type == 'cuda':
            self._queued.append(torch.cuda.Event())
            self._queued[-1].record()
            if len(self._queued) > CUDA_LEAD:
                self._queued.popleft().synchronize()

    def _ask(self) -> tuple[int, int] | None:
        """The signal and the update after which to stop, as the first rank with a signal wrote them into the store."""
        if self._received:
            lead = 1 + (CUDA_LEAD if self._processes.device.type == 'cuda' else 0)
            text = _store.compare_set('stop', '', f'{int(self._received)} {self._updates + lead}')
        elif _store.check(['stop']):
            text = _store.get('stop')
        else:
            return None
        number, update = map(int, text.split())
        return number, update


def sum_dtype(device: 'torch.device') -> 'torch.dtype':
    """Sums over an epoch are kept in float64, where the device has it (MPS does not)."""
    import torch
    return torch.float32 if device.type == 'mps' else torch.float64


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


def read_json(path: Path, fits: Callable[[Any], bool]) -> Any:
    """The value in a file of ours, or None where there is none. A damaged one is moved aside, and the log says so.

    Args:
        fits: whether a value is what the file should hold.
    """
    try:
        value = json.loads(path.read_text())
        if fits(value):
            return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):  # a folder, another encoding, no JSON
        pass
    set_aside(path)
    return None


def set_aside(path: Path) -> None:
    """Moves a damaged file out of the way, under a name that is free, and says so."""
    names = (path.with_name(f'{path.name}.damaged{number or ""}') for number in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    log.warning('%s is damaged: it is kept as %s, and begun anew.', path, aside.name)


def _discard(stream: Any) -> None:
    """Lets all that is written to a stream go nowhere, whatever its buffers still hold."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


class _Output(logging.StreamHandler):
    """The log on stdout, which may go away (`| head`, a closed terminal) or be full: neither is worth a run."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk may have room again
            _discard(self.stream)
            self.setStream(open(os.devnull, 'w'))  # noqa: SIM115
            to_stderr(f'The log cannot be written to stdout ({reason_of(error)}); the run goes on without it.')


def setup_logging(rank: int) -> None:
    """Sends rank 0's log to stdout. The others know the same and are silent; errors reach stderr by `main`."""
    _accept_any_name()
    handler = _Output(sys.stdout)
    handler.setFormatter(logging.Formatter('%(message)s'))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    log.propagate = False
