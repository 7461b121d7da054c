"""Loaders that start at any update of any epoch, over worker processes, for any task.

Randomness is derived (`utils.derive_seed`): an epoch's order from (seed, epoch), a sample's augmentation from (seed,
epoch, its index, repeat), what the device draws from (seed, update, micro-step, rank). So neither the number of workers
nor the place where a run was interrupted changes a pixel, and update k of an epoch trains on the same samples for any
world size.

The task makes the samples and the batches; batches of bytes cross the bus, and `task.finish` makes the model's input of
them on the device, on CUDA in a stream of its own, ahead of the step.
"""
import atexit
import errno
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline.augmentation import BadImage, Picture, refusing_bad_images, why_bad
from pipeline.labels import BadLabel
from recipes import Recipe, Run
from utils import UserError, derive_seed, log, number_of, reason_of, to_stderr, waiting_for


class Position(NamedTuple):
    """Where in a run a micro-batch is trained on."""

    update: int  # of the run, from 0
    micro_step: int
    rank: int
    epochs_left: float  # from the beginning of this update to the end of the run


class Source(Protocol):
    """What the loaders ask of a map-style data set. An item is a picture and what a task has to learn of it."""

    in_memory: bool  # whether reading takes no time, so that workers would gain none

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> tuple[Picture, Any]: ...

    def name(self, index: int, /) -> str: ...


class Batch(Protocol):
    """What the loaders ask of a micro-batch on the device. Its length is the number of images."""

    def __len__(self) -> int: ...

    def record_stream(self, stream: torch.cuda.Stream, /) -> None: ...


Sample = TypeVar('Sample')  # what a worker makes of an item
Loaded = TypeVar('Loaded', bound=Sized)  # what a worker makes of some samples
Input = TypeVar('Input', bound=Batch)  # what the device makes of a worker's batch, for the model
Finished = TypeVar('Finished', bound=Batch, covariant=True)  # the same, where it is only given


class Preparing(Protocol[Sample, Loaded, Finished]):
    """What the loaders ask of a task."""

    recipe: Recipe

    def sample(self, item: tuple[Picture, Any], seed: int | None, /) -> Sample: ...

    def collate(self, samples: Sequence[Sample], /) -> Loaded: ...

    def sample_bytes(self, *, training: bool) -> int: ...

    def balance(self, source: Any, /) -> np.ndarray | None: ...

    def finish(self, batch: Loaded, device: torch.device, position: Position | None, /) -> Finished: ...


# ---- In the worker processes ----------------------------------------------------------------------------------------

class MapBatches(Dataset[tuple[Loaded, int] | str], Generic[Sample, Loaded, Input]):
    """Micro-batches of a map-style source: the index is an array of keys [B, 3] = (epoch, index, repeat).

    A batch comes with the number of unreadable samples that were replaced in it. An error is returned as its message
    and not raised: torch would wrap it into a worker's traceback.
    """

    def __init__(self, source: Source, task: Preparing[Sample, Loaded, Input], *, training: bool):
        self._source, self._task, self._training = source, task, training

    def __getitem__(self, keys: np.ndarray) -> tuple[Loaded, int] | str:
        recipe, bad = self._task.recipe, 0
        samples: list[Sample] = []
        for epoch, index, repeat in keys.tolist():
            tried: set[int] = set()
            while True:
                try:
                    seed = derive_seed(recipe.seed, epoch, index, repeat) if self._training else None
                    with refusing_bad_images():
                        item = self._source.read(index)
                    samples.append(self._task.sample(item, seed))
                    break
                except BadLabel as error:
                    return f'image {index}, {self._source.name(index)}, {error}'
                except BadImage as error:
                    tried.add(index)
                    skip = self._training and recipe.on_bad_image == 'skip'
                    if not skip or len(tried) == min(100, len(self._source)):
                        cure = ('an evaluation counts every image, so replace or remove them' if not self._training else
                                f'and neither can the {len(tried) - 1} that were to replace it' if skip else
                                '--on_bad_image skip trains without them')
                        return (f'image {index}, {self._source.name(index)}, cannot be read ({error}); '
                                f'tools/check_dataset.py --decode finds all such files, {cure}')
                    bad += 1
                    index = derive_seed(recipe.seed, 'instead of', index) % len(self._source)
                    while index in tried:  # in a small set, one that cannot be read leads back to itself
                        index = (index + 1) % len(self._source)
        return self._task.collate(samples), bad


class StreamBatches(IterableDataset[tuple[Loaded, int] | str], Generic[Sample, Loaded, Input]):
    """Micro-batches of a stream, in the order in which its reader gives the images to each worker.

    An image's augmentation comes from (seed, epoch, rank, worker, its position): repeatable for the same number of
    workers, and not resumable in the middle of an epoch. Errors are passed on as their messages.
    """

    def __init__(self, data: IterableImageDataset, task: Preparing[Sample, Loaded, Input], *, training: bool,
                 batch_size: int, rank: int, world_size: int):
        self._data, self._task, self._training = data, task, training
        self._batch_size, self._rank = batch_size, rank
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._share_out(rank, world_size)

    def _share_out(self, rank: int, world_size: int) -> None:
        """Gives each rank its part of the stream; timm's readers ask the process group, which may not exist."""
        reader, shards = self._data.reader, getattr(self._data.reader, 'split_info', None)
        self._empty = False
        if not self._training and hasattr(shards, 'shard_lengths'):
            # Whole shards, so that each test image is seen once; timm would pad and cut to equal lengths
            shards.filenames = tuple(shards.filenames)[rank::world_size]
            self._empty, rank, world_size = not shards.filenames, 0, 1
        if hasattr(reader, 'dist_rank'):
            reader.dist_rank, reader.dist_num_replicas = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the augmentation of the next pass, in running workers too."""
        self._epoch[0] = epoch
        self._data.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Loaded, int] | str]:
        worker, recipe = get_worker_info(), self._task.recipe
        key = (recipe.seed, 'stream', int(self._epoch), self._rank, worker.id if worker else 0)
        samples: list[Sample] = []
        bad, told = 0, False

        def note(reasons: list[str]) -> int:
            nonlocal told
            if reasons and self._training and recipe.on_bad_image == 'stop':
                raise BadImage(f'{reasons[0]}; --on_bad_image skip trains without what cannot be read')
            if reasons and not told:  # one of a pass says it for all
                log.warning('--data_set %s: %s; left out', recipe.data_set, reasons[0])
                told = True
            return len(reasons)

        try:
            for position, (item, reasons) in enumerate(() if self._empty else _heard(self._data)):
                bad += note(reasons)
                if item is None:
                    break
                try:
                    samples.append(self._task.sample(item, derive_seed(*key, position) if self._training else None))
                except BadImage as error:
                    bad += note([f'image {position} of a worker cannot be read ({error})'])
                if len(samples) == self._batch_size:
                    yield self._task.collate(samples), bad
                    samples, bad = [], 0
            if samples and not self._training:
                yield self._task.collate(samples), bad
        except Exception as error:  # anything that a foreign reader raises
            yield f'--data_set {recipe.data_set}: {" ".join(str(error).split()) or type(error).__name__}'


class _LeftOut(logging.Handler):
    """Hears what timm's reader of shards leaves out, which it only logs: shards, and images that cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the reason, and the image's place, which the frame of webdataset knows and its message does not."""
        error = sys.exc_info()[1]
        if error is None:  # a remark
            return
        sample = error.__traceback__.tb_frame.f_locals.get('sample')
        if isinstance(sample, dict) and '__key__' in sample:
            where = f'{sample.get("__url__")}: {sample["__key__"]}'
        else:  # webdataset appends the shard
            where = next((word for word in error.args[::-1] if isinstance(word, str)), 'a shard')
        self.reasons.append(f'{where} cannot be read ({why_bad(error)})')


def _heard(data: IterableImageDataset) -> Iterator[tuple[tuple[Picture, Any] | None, list[str]]]:
    """The items of one of timm's streams, at last None, each with the reasons for what was left out before it."""
    items, reader_log = iter(data), logging.getLogger(type(data.reader).__module__)
    item = True
    while item is not None:
        left_out = _LeftOut()
        reader_log.addHandler(left_out)  # no longer than this takes: other streams of the process have the same log
        try:
            item = next(items, None)
        finally:
            reader_log.removeHandler(left_out)
        yield item, left_out.reasons


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _cannot_hand_over(error: Exception, _batch: object) -> None:
    """Ends a worker that cannot send a batch, with the error's number as status: the main process would wait for ever
    for that batch."""
    told = (code for code in (errno.EMFILE, errno.ENOSPC, errno.ENOMEM) if os.strerror(code) in str(error))
    to_stderr(f'a data worker cannot hand over a batch: {reason_of(error)}')
    os._exit(getattr(error, 'errno', None) or next(told, 1))


def _note_once(_: type[BaseException], error: BaseException, __: object) -> None:
    """Tells in a line, once, what stops multiprocessing's server of descriptors for a moment; it would print each trace
    and goes on."""
    sys.excepthook = lambda *_: None
    to_stderr(f'a data worker cannot hand over a batch at once: {reason_of(error)}')


def _start_worker(_: int) -> None:
    """Signals are the main process's business: a preempted job saves while its workers go on."""
    sys.excepthook = _note_once
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]  # CPython's own hook
        _cannot_hand_over)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the main process's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


# ---- In the main process --------------------------------------------------------------------------------------------

def count_workers(run: Run, source: Source | IterableImageDataset) -> int:
    """Data-loading processes of a rank: as given, none for data in memory, else the rank's cores up to 10."""
    if run.num_workers is not None:
        return run.num_workers
    if getattr(source, 'in_memory', False):
        return 0
    shards = getattr(getattr(getattr(source, 'reader', None), 'split_info', None), 'filenames', None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = max(1, min(10, cores // max(number_of('LOCAL_WORLD_SIZE', 1), 1)))
    return min(workers, len(shards) // run.world_size or 1) if shards else workers  # one without a shard has no work


class WorkersLost(UserError):
    """The data workers can hand over no more batches."""


def check_sockets() -> None:
    """Refuses a folder for temporary files in which workers cannot make the sockets by which batches travel: the path
    of a socket has 107 bytes at most, and a worker that cannot make one says so to nobody."""
    try:
        multiprocessing.connection.Listener(family='AF_UNIX').close()
    except OSError as error:
        raise UserError(f'data workers cannot make their sockets in {tempfile.gettempdir()} ({reason_of(error)}): set '
                        'TMPDIR to a shorter path that is writable, as TMPDIR=/tmp, or say --num_workers 0') from None


SHARED_MEMORY = '/dev/shm'
MORE_SHARED_MEMORY = ('enlarge it (docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory there), or '
                      'give fewer --num_workers, or a smaller --batch_size')


def check_shared_memory(size: int) -> None:
    """Refuses a /dev/shm that cannot hold the batches which the workers of this machine prepare ahead.

    A container has 64 MB unless told otherwise, of which two workers with 128 images of 224 pixels take 77.

    Args:
        size: bytes of the batches that this process's workers hold, two each.
    """
    size *= max(number_of('LOCAL_WORLD_SIZE', 1), 1)
    if size and os.path.isdir(SHARED_MEMORY):
        found = os.statvfs(SHARED_MEMORY)
        room = found.f_blocks * found.f_frsize
        if room < size:
            raise UserError(f'the data workers of this machine share up to {size / 1e6:,.0f} MB of batches, and '
                            f'{SHARED_MEMORY} has {room / 1e6:,.0f}: {MORE_SHARED_MEMORY}')


def abandon_loader(error: BaseException) -> None:
    """Ends the workers of a DataLoader that failed as it started; its own end would fail too, and print that."""
    trace = error.__traceback__
    while trace is not None:
        made = trace.tb_frame.f_locals.get('self')
        if hasattr(made, '_shutdown_workers'):
            made._shutdown = True
            for worker in getattr(made, '_workers', ()):
                worker.kill()
        trace = trace.tb_next


def why_lost(error: BaseException, workers: Iterable[BaseProcess]) -> WorkersLost | None:
    """What the data workers lack, by the error that came of it and the workers' own ends; None for another error."""
    text = reason_of(error)
    if isinstance(error, EOFError | ConnectionError):  # which may come a moment before the end of the worker that died
        multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
    ends = {worker.exitcode for worker in workers} - {None, 0}

    def found(pattern: str, *codes: int) -> bool:
        return re.search(pattern, text) is not None or getattr(error, 'errno', None) in codes or not ends.isdisjoint(
            codes)

    if found(r'Too many open files|ancdata', errno.EMFILE, errno.ENFILE):
        return WorkersLost('the data workers have too few file descriptors: raise the limit by ulimit -n 65536, or '
                           'give fewer --num_workers')
    if found(r'shared memory|/torch_\d+_\d+_\d+|Bus error', errno.ENOSPC, -signal.SIGBUS):
        return WorkersLost(f'the data workers have no room left in the shared memory /dev/shm: {MORE_SHARED_MEMORY}')
    if isinstance(error, MemoryError) or found(r'Cannot allocate memory', errno.ENOMEM):
        return WorkersLost('there is no memory left for the data workers: give fewer --num_workers, or more memory')
    if found(r"Resource temporarily unavailable|can't start new thread", errno.EAGAIN):
        return WorkersLost('no more data workers can be started: give fewer --num_workers, or raise the limit of '
                           'processes (ulimit -u; docker run --pids-limit)')
    if -signal.SIGKILL in ends:
        return WorkersLost('a data worker was killed, as the system does when memory runs out: give fewer '
                           '--num_workers, or more memory')
    if not ends and isinstance(error, EOFError | ConnectionError):
        return WorkersLost('a data worker has broken off in the middle of a batch, as where file descriptors run out: '
                           'raise the limit by ulimit -n 65536, or give fewer --num_workers')
    if ends or 'exited unexpectedly' in text:
        end = min(ends, default=0)
        how = signal.Signals(-end).name if end < 0 else f'status {end}' if end else 'without a word'
        return WorkersLost(f'a data worker has ended ({how}): what it printed is above; --num_workers 0 shows where')
    return None


class _Keys:
    """What a DataLoader asks for next; set anew before each pass, while its workers live on."""

    def __init__(self) -> None:
        self.batches: Iterable[np.ndarray] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)


class _Workers(Generic[Loaded]):
    """A DataLoader of whole micro-batches whose workers persist over the epochs and end with the process."""

    def __init__(self, data: Dataset[tuple[Loaded, int] | str], *, workers: int, pin_memory: bool):
        self._keys = _Keys()
        self._iterator: Iterator[tuple[Loaded, int] | str] | None = None
        streaming = isinstance(data, IterableDataset)
        if workers:
            check_sockets()
        self._loader = DataLoader(
            data, batch_size=None, sampler=None if streaming else self._keys, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=pin_memory, worker_init_fn=_start_worker)
        # Workers ignore SIGTERM, so that Python's own end of them would wait for ever
        atexit.register(self.close)

    def batches(self, keys: Iterable[np.ndarray] = ()) -> Iterator[tuple[Loaded, int]]:
        """The batches of these keys, in their order, each with the number of the samples replaced in it.

        Raises:
            UserError: for what a worker could not read.
            WorkersLost: where no batch can come any more.
        """
        self._keys.batches = keys
        # A new worker inherits the mask, and is safe from signals before it has come to ignore them
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = signal.getsignal(signal.SIGCHLD)
        try:
            self._iterator = iter(self._loader)
        except (OSError, MemoryError, RuntimeError) as error:  # RuntimeError: of a thread that cannot be started
            abandon_loader(error)
            raise why_lost(error, ()) or error from None
        finally:
            # torch's own handler would raise its error anywhere in the main thread, in the middle of an update too.
            # Without it, the wait for a batch looks every 5 s whether all workers are there
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, child or signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while True:
            try:
                with waiting_for('a batch of the data workers'):
                    batch = next(self._iterator, None)
            except (OSError, EOFError, MemoryError, RuntimeError) as error:
                workers = getattr(self._iterator, '_workers', ())
                raise (why_lost(error, workers) if workers else None) or error from None
            if batch is None:
                return
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def close(self) -> None:
        """Ends the worker processes. A further pass would start new ones."""
        workers = getattr(self._iterator, '_workers', ())
        if hasattr(self._iterator, '_shutdown_workers'):
            self._iterator._shutdown_workers()  # waits 5 s for each
        for worker in workers:
            if worker.is_alive():  # a stopped one, or one that waits for a lost disk
                worker.kill()
                worker.join(timeout=5)
        self._iterator = self._loader._iterator = None
        atexit.unregister(self.close)


def epoch_order(count: int, *, seed: int, epoch: int, attempt: int = 0, repeats: int = 1) -> np.ndarray:
    """The images of an epoch in their order, int64 [count, 2] = (index, repeat).

    Args:
        count: number of images.
        attempt: another order for another attempt at the same epoch.
        repeats: copies of each image (Repeated Augmentation, arXiv 1901.09335); the epoch stays as long as it was, so
            it sees `count / repeats` of the images, as in DeiT.
    """
    order = np.random.default_rng(derive_seed(seed, 'order', epoch, attempt)).permutation(count)
    slots = np.arange(count)
    return np.stack([order[slots // repeats], slots % repeats], axis=1)


def balanced_order(labels: np.ndarray, *, seed: int, epoch: int, attempt: int = 0) -> np.ndarray:
    """An epoch in which every class comes equally often, give or take one image, in its order.

    The images of a class take turns, so that they come equally often too. Which of a large class come is drawn anew
    each epoch; a copy of an image of a small class is a repeat, with an augmentation of its own.

    Args:
        labels: the class of each image. The epoch stays as long as they are.
        attempt: another order for another attempt at the same epoch.

    Returns:
        int64 [images, 2] = (index, repeat).
    """
    rng = np.random.default_rng(derive_seed(seed, 'balanced', epoch, attempt))
    counts = np.unique(labels, return_counts=True)[1]
    members = np.split(np.argsort(labels, kind='stable'), counts.cumsum()[:-1])
    parts = []
    for place, number in enumerate(rng.permutation(len(counts))):  # the first classes have what is left over
        images, share = members[number], (len(labels) - place - 1) // len(counts) + 1
        turns = [rng.permutation(images) for _ in range(-(-share // len(images)))]
        parts.append(np.stack([np.concatenate(turns)[:share], np.arange(share) // len(images)], axis=1))
    return rng.permutation(np.concatenate(parts))


def group_order(order: np.ndarray, groups: np.ndarray, size: int, *, seed: int, epoch: int,
                attempt: int = 0) -> np.ndarray:
    """An epoch's order in micro-batches of one group each, the micro-batches in random order.

    Args:
        order: int64 [count, 2], as `epoch_order` gives it.
        groups: of each image.
        size: images of a micro-batch; what is left of a group after whole ones is dropped.

    Returns:
        int64 [at most count, 2], of which `size` rows after one another are a micro-batch.
    """
    group_of = groups[order[:, 0]]
    parts = [order[group_of == group] for group in np.unique(groups)]
    chunks = np.concatenate([part[:len(part) // size * size].reshape(-1, size, 2) for part in parts])
    return np.random.default_rng(derive_seed(seed, 'groups', epoch, attempt)).permutation(chunks).reshape(-1, 2)


class _Loader(Generic[Sample, Loaded, Input]):
    """What training and evaluation share: the source, its workers and the device's part."""

    def __init__(self, source: Source | IterableImageDataset, task: Preparing[Sample, Loaded, Input], run: Run, *,
                 rank: int, device: torch.device, training: bool, batch_size: int):
        self._task, self._recipe, self._run, self._rank, self._device = task, task.recipe, run, rank, device
        workers = count_workers(run, source)
        check_shared_memory(2 * workers * batch_size * task.sample_bytes(training=training))  # of DataLoader, two each
        self._stream: StreamBatches[Sample, Loaded, Input] | None = None
        self._groups: np.ndarray | None = getattr(source, 'groups', None)
        batches: Dataset[tuple[Loaded, int] | str]
        if isinstance(source, IterableImageDataset):
            self.count = int(getattr(source.reader, 'num_samples', 0) or len(source))
            source.set_loader_cfg(num_workers=workers)
            batches = self._stream = StreamBatches(source, task, training=training, batch_size=batch_size, rank=rank,
                                                   world_size=run.world_size)
        else:
            self.count = len(source)
            batches = MapBatches(source, task, training=training)
        self._workers = _Workers(batches, workers=workers, pin_memory=run.pin_mem and device.type == 'cuda')

    def close(self) -> None:
        """Ends the worker processes."""
        self._workers.close()


class TrainLoader(_Loader[Sample, Loaded, Input]):
    """Micro-batches of training, for one rank.

    Attributes:
        count: images in the whole set.
        updates_per_epoch: whole batches in the data, where it has groups of whole micro-batches of one group; what is
            left of an epoch is dropped.
        total_updates: length of the run.
        bad_images: unreadable images replaced so far (`--on_bad_image skip`), on this rank.
    """

    def __init__(self, source: Source | IterableImageDataset, task: Preparing[Sample, Loaded, Input], run: Run, *,
                 rank: int, device: torch.device):
        super().__init__(source, task, run, training=True, batch_size=run.batch_size, rank=rank, device=device)
        recipe, self.bad_images = self._recipe, 0
        self._labels = task.balance(source)
        whole, grouped = self.count, ''
        if self._groups is not None:
            whole = int(sum(np.unique(self._groups, return_counts=True)[1] // run.batch_size * run.batch_size))
            grouped = ' in whole micro-batches of one shape'
        self.updates_per_epoch = whole // recipe.total_batch_size
        if not self.updates_per_epoch:
            fitting = 2 ** (max(whole, 1).bit_length() - 1)
            raise UserError(f'{whole:,} training images{grouped} are fewer than one batch of '
                            f'{recipe.total_batch_size:,}; give --total_batch_size {fitting} or less, and think of '
                            '--scale_lr')
        if self._groups is not None and recipe.repeated_aug > 1:
            raise UserError('--repeated_aug spreads the copies of an image over micro-batches, and this data set has '
                            'micro-batches of images of one shape; leave it out')
        if self._stream and recipe.repeated_aug > 1:
            raise UserError('--repeated_aug needs images in any order, which a stream does not give; use a folder')
        self.total_updates = recipe.total_updates(self.updates_per_epoch)

    def updates(self, start: int, stop: int, attempt: int = 0) -> Iterator[Input]:
        """This rank's micro-batches of the updates `start` .. `stop - 1` of the run, over as many epochs as they take.

        Args:
            attempt: changes the order, after a rollback.

        Yields:
            what `task.finish` returns, on the device, `update_freq` an update.

        Raises:
            UserError: for an image that cannot be read or a label out of range.
        """
        while start < stop:
            epoch, begin = divmod(start, self.updates_per_epoch)
            end = min(self.updates_per_epoch, begin + stop - start)
            yield from self.epoch(epoch, begin, attempt, end=end)
            start += end - begin

    def epoch(self, epoch: int, start_update: int = 0, attempt: int = 0, *, end: int | None = None) -> Iterator[Input]:
        """As `updates`, for those of one epoch (from 0) from `start_update` on, up to its end or before `end`."""
        first = epoch * self.updates_per_epoch
        bad: deque[int] = deque()  # of the batches that are prepared ahead: a run that stops now will see them again

        def finished() -> Iterator[Input]:
            for number, (batch, replaced) in enumerate(self._batches(epoch, start_update, attempt,
                                                                     end or self.updates_per_epoch)):
                bad.append(int(replaced))
                update, micro_step = divmod(number, self._run.update_freq)
                update += first + start_update
                left = (self.total_updates - update) / self.updates_per_epoch
                yield self._task.finish(batch, self._device, Position(update, micro_step, self._rank, left))

        for batch in ahead(finished(), self._device):
            self.bad_images += bad.popleft()
            yield batch

    def _batches(self, epoch: int, start: int, attempt: int, end: int) -> Iterator[tuple[Loaded, int]]:
        if self._stream is None:
            yield from self._workers.batches(self._keys(epoch, start, attempt, end))
            return
        if start:
            log.warning('%s is a stream: the rest of epoch %d begins with a fresh pass over it, so some of its images '
                        'are seen twice and others not; runs resumed between epochs are exact', self._recipe.data_set,
                        epoch + 1)
        left, passes = (end - start) * self._run.update_freq, 0
        while left:  # the ranks' parts may be unequal: a short one begins again
            # Another attempt, and what follows an interruption, takes another order
            self._stream.set_epoch(derive_seed(epoch, start, attempt, passes) % 2**31 if start or attempt or passes
                                   else epoch)
            before = left
            for batch in islice(self._workers.batches(), left):
                left -= 1
                yield batch
            if left == before:
                raise UserError(f'--data_set {self._recipe.data_set} gives this process no whole micro-batch of '
                                f'{self._run.batch_size}: each worker of each process needs a shard; take fewer '
                                '--num_workers or processes, or a smaller --batch_size')
            passes += 1

    def _keys(self, epoch: int, start: int, attempt: int, end: int) -> Iterator[np.ndarray]:
        """The keys of this rank's micro-batches: of update k, chunk a * world size + rank in micro-step a."""
        recipe, run = self._recipe, self._run
        drawn = {'seed': recipe.seed, 'epoch': epoch, 'attempt': attempt}
        order = epoch_order(self.count, repeats=recipe.repeated_aug, **drawn) if self._labels is None else (
            balanced_order(self._labels, **drawn))
        if self._groups is not None:
            order = group_order(order, self._groups, run.batch_size, **drawn)
        for update in range(start, end):
            batch = order[update * recipe.total_batch_size:(update + 1) * recipe.total_batch_size]
            if recipe.repeated_aug > 1:
                # Copies of an image go to different micro-batches where there are several, as in DeiT
                batch = batch[np.argsort(batch[:, 1], kind='stable')]
            for micro_step in range(run.update_freq):
                first = (micro_step * run.world_size + self._rank) * run.batch_size
                chunk = batch[first:first + run.batch_size]
                yield np.concatenate([np.full((len(chunk), 1), epoch), chunk], axis=1)


class ValLoader(_Loader[Sample, Loaded, Input]):
    """Batches of this rank's share of the test images: every world-size-th, none twice, each batch of one group.

    Attributes:
        count: images in the whole set; of a stream, what it says of itself.
        exact: whether `count` is sure, which a stream's is not.
    """

    def __init__(self, source: Source | IterableImageDataset, task: Preparing[Sample, Loaded, Input], run: Run, *,
                 rank: int, device: torch.device):
        self._source, self.exact = source, not isinstance(source, IterableImageDataset)
        self._batch_size = run.val_batch_size or int(1.5 * (run.batch_size or task.recipe.micro_batch_size))
        super().__init__(source, task, run, training=False, batch_size=self._batch_size, rank=rank,
                         device=device)
        share = np.arange(rank, self.count, run.world_size)
        groups = np.zeros(len(share)) if self._groups is None else self._groups[share]
        parts = [share[groups == group] for group in np.unique(groups)]
        self._chunks = [part[start:start + self._batch_size] for part in parts
                        for start in range(0, len(part), self._batch_size)]

    @property
    def names(self) -> list[str]:
        """Where this rank's images come from, in the order of the batches. Raises UserError for a stream."""
        if not self.exact:
            raise UserError(f'--data_set {self._recipe.data_set} is a stream, which does not tell the names of its '
                            'images; use a folder')
        return [self._source.name(int(index)) for chunk in self._chunks for index in chunk]

    def __len__(self) -> int:
        """Number of batches; of a stream, about."""
        return len(self._chunks)

    def __iter__(self) -> Iterator[Input]:
        """Yields what `task.finish` returns, on the device."""
        def keys() -> Iterator[np.ndarray]:
            for chunk in self._chunks:
                yield np.stack([np.zeros_like(chunk), chunk, np.zeros_like(chunk)], axis=1)

        batches = self._workers.batches() if self._stream else self._workers.batches(keys())
        return ahead((self._task.finish(batch, self._device, None) for batch, _ in batches if len(batch)),
                     self._device)


def ahead(batches: Iterator[Input], device: torch.device) -> Iterator[Input]:
    """On CUDA, prepares each batch in a stream of its own while the device works on the batch before."""
    if device.type != 'cuda':
        yield from batches
        return
    stream, waiting = torch.cuda.Stream(device), None
    stream.wait_stream(torch.cuda.current_stream(device))  # for what earlier streams have left, as the task's constants
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            ready = stream.record_event()
        if waiting is not None:
            prepared, event = waiting
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            prepared.record_stream(current)
            yield prepared
        if batch is None:
            return
        waiting = batch, ready
