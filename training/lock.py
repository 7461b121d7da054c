"""Who owns a run's folder: one start at a time, told by a lock file, which a dead owner leaves to the next.

`.lock` holds host, process, Slurm job, torchrun run and a heartbeat. A second start is refused while the owner lives.
It takes over at once where the owner's process on this machine is dead, or where the owner, elsewhere, was a start of
the same Slurm job or torchrun run; else after three minutes without a heartbeat.
"""
import contextlib
import json
import os
import platform
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import Processes, UserError, from_rank_zero, log, to_stderr, waiting_for

NAME = '.lock'
BEAT = 30.0  # seconds between heartbeats
SILENCE = 180.0  # seconds without a heartbeat after which an owner elsewhere counts as dead
POLL = 1.0  # seconds between looks at another's lock


@contextlib.contextmanager
def own_folder(folder: Path, processes: Processes) -> Iterator[None]:
    """Owns a run's folder within; every rank calls it, and rank 0 holds the lock.

    A folder that cannot be written is nobody's: what is to be written into it says so.

    Raises:
        UserError: where another start that lives owns it.
    """
    lock = None

    def take() -> str:
        nonlocal lock
        try:
            lock = Lock(folder)
        except UserError as error:
            return str(error)
        except OSError as error:
            log.debug('%s cannot be locked (%s)', folder, error)
        return ''

    if refused := from_rank_zero('lock', take):
        raise UserError(refused)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class Lock:
    """The lock file of a folder, held until `release`."""

    def __init__(self, folder: Path):
        """Takes the lock, at once or after the wait for a silent owner.

        Raises:
            UserError: where the owner lives.
            OSError: where the folder cannot be made or written.
        """
        self._path = folder / NAME
        self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._facts = {
            'token': secrets.token_hex(8), **_machine(), 'pid': os.getpid(), 'pid_start': _start_of(os.getpid()),
            'job': os.environ.get('SLURM_JOB_ID', ''), 'run': _run_id(), 'started': _now()}
        self._take()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='lock', daemon=True)
        self._thread.start()

    def _take(self) -> None:
        said = False
        first = time.monotonic()
        beats: tuple[str, Any] | None = None  # the owner and its heartbeat at the first look
        while True:
            try:
                self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            except FileExistsError:
                pass
            else:
                try:
                    self._write()
                except OSError:  # a full disk; a lock without facts would keep the next start waiting
                    os.close(self._file)
                    self._path.unlink()
                    raise
                return
            owner = _read(self._path)
            if owner is None:  # released meanwhile
                continue
            token, beat = owner.get('token', ''), (owner.get('beat'), owner['mtime'])
            if beats is None or beats[0] != token:
                beats, first = (token, beat), time.monotonic()
            dead = _is_dead(owner, self._facts)
            here = _is_here(owner)
            if dead or (not here and max(time.monotonic() - first, self._age(owner)) >= SILENCE):
                log.info('%s was left locked by %s, which %s: taken over.', self._path.parent, _describe(owner),
                         'has ended' if dead else f'has not written for {SILENCE:g} s')
                self._remove(token)
                continue
            ends = _is_same(owner, self._facts)  # a start of the same job, which may be about to end
            if (here and not (ends and time.monotonic() - first < SILENCE)) or (not here and beats[1] != beat):
                raise UserError(f'{self._path.parent} is being trained in by {_describe(owner)}; wait for its end, '
                                'stop it, or give another --output_dir')
            if not said:
                said = True
                log.info('%s is locked by %s: waiting up to %g s for a sign of life from it.', self._path.parent,
                         _describe(owner), SILENCE)
            with waiting_for(f'the owner of {self._path}'):
                time.sleep(POLL)

    def _write(self) -> None:
        """The facts with the time of this heartbeat: always as long, so that a reader finds the whole of it."""
        os.pwrite(self._file, json.dumps({**self._facts, 'beat': _now()}).encode(), 0)
        with contextlib.suppress(OSError):
            os.fsync(self._file)  # on a network file system, the others see it only then

    def _remove(self, token: str) -> None:
        """Removes the lock of a dead owner, and no other's: another start may have taken it over meanwhile.

        One start at a time may do that, the one that makes a file beside the lock.
        """
        guard = self._path.with_name(f'{NAME}.takeover')
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            maker = _read(guard)
            if maker is not None and self._age(maker) >= SILENCE:  # it died in the middle of this
                guard.unlink(missing_ok=True)
            time.sleep(0.01)
            return
        try:
            owner = _read(self._path)
            if owner is not None and owner.get('token', '') == token:
                self._path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _age(self, owner: dict[str, Any]) -> float:
        """Seconds since the owner's heartbeat, by the clock of the file system, which all hosts share."""
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=f'{NAME}.') as file:
            return os.fstat(file.fileno()).st_mtime - owner['mtime']

    def _is_lost(self) -> bool:
        owner = _read(self._path)
        return owner is not None and owner.get('token', self._facts['token']) != self._facts['token']

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # a network file system that is away for a while
                if self._is_lost():
                    to_stderr(f'error: {self._path.parent} was taken over by {_describe(_read(self._path) or {})}, a '
                              f'start of the same job or one after {SILENCE:g} s of silence: ended')
                    os._exit(1)
                self._write()

    def release(self) -> None:
        """Gives the folder up. A folder that was made for the lock alone goes with it."""
        self._released.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(OSError):
            if not self._is_lost():
                self._path.unlink(missing_ok=True)
            if not self._thread.is_alive():
                os.close(self._file)
            for parent in self._made:
                parent.rmdir()


def _now() -> str:
    return time.strftime('%Y-%m-%dT%H:%M:%S%z')


def _machine() -> dict[str, str]:
    """What tells whether a process number means a process of this machine: a container counts its own."""
    facts = {'host': platform.node(), 'boot': '', 'space': ''}
    with contextlib.suppress(OSError):
        facts['boot'] = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        facts['space'] = os.readlink('/proc/self/ns/pid')
    return facts


def _run_id() -> str:
    """torchrun's name of the run, which stays the same when it restarts its processes; its default says nothing."""
    name = os.environ.get('TORCHELASTIC_RUN_ID', '')
    return '' if name == 'none' else name


def _start_of(pid: int) -> str:
    """When a process began, in ticks since the boot: a later process may have its number. '' where it is not known."""
    try:
        state, *fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except (OSError, ValueError):
        return ''
    return '' if state in 'ZX' else fields[18]


def _read(path: Path) -> dict[str, Any] | None:
    """The facts of a lock and its `mtime`; None where there is no lock. One that is not written yet has no facts."""
    try:
        mtime = path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        values = {}
    return {**(values if isinstance(values, dict) else {}), 'mtime': mtime}


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner's process number is one of this machine."""
    return bool(owner.get('host')) and all(owner.get(name) == value for name, value in _machine().items())


def _is_same(owner: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether the owner is another start of the same Slurm job or torchrun run."""
    return any(ours[name] and owner.get(name) == ours[name] for name in ('job', 'run'))


def _is_dead(owner: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether the owner has certainly ended."""
    if not _is_here(owner):
        return _is_same(owner, ours)
    try:
        os.kill(int(owner['pid']), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, LookupError, TypeError, ValueError, OverflowError):  # another user's; no facts
        return False
    return bool(owner.get('pid_start')) and _start_of(owner['pid']) != owner['pid_start']


def _describe(owner: dict[str, Any]) -> str:
    """Who it is, for a line."""
    job = f', Slurm job {owner["job"]}' if owner.get('job') else ''
    return (f'process {owner.get("pid", "?")} on {owner.get("host") or "an unknown host"} (since '
            f'{owner.get("started", "?")}{job})')
