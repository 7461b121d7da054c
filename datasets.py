"""The data path: loaders that start at any update of any epoch, and what happens to a batch on the device.

Randomness is derived (`utils.derive_seed`): an epoch's order from (seed, epoch), an image's augmentation from (seed,
epoch, its index, repeat), mixup from (seed, update, micro-step, rank). So neither the number of workers nor the place
where a run was interrupted changes a pixel, and update k of an epoch trains on the same images for any world size.

uint8 pixels come from the workers and cross the bus; normalisation, random erasing and mixup are done per batch on the
device, on CUDA in a stream of their own, ahead of the step.
"""
import atexit
import importlib
import importlib.machinery
import logging
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from image_ops import (
    BadImage,
    TestTransform,
    TrainTransform,
    erasing_boxes,
    normalise,
    refusing_bad_images,
    seed_image,
    why_bad,
)
from image_sources import check_files, class_names, open_source
from recipes import Recipe, Run
from utils import UserError, derive_seed, log, rank_zero_first

Pair = tuple[torch.Tensor, torch.Tensor]  # images and targets


def __getattr__(name: str) -> Any:
    """Lets the Hugging Face package `datasets` be found through this module, which bears its name.

    Its users (timm's `hfds/` readers) write `import datasets` and get us: they find its submodules on `__path__`, and
    all its other names here.
    """
    if name.startswith('__') and name != '__path__':
        raise AttributeError(name)
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path or '.') != here]
    if name == '__path__':
        spec = importlib.machinery.PathFinder.find_spec(__name__, elsewhere)
        if spec is None or spec.submodule_search_locations is None:
            raise AttributeError(name)
        return list(spec.submodule_search_locations)
    package = globals().get('_hugging_face')
    if package is None:
        ours, path = sys.modules.pop(__name__), sys.path[:]
        sys.path[:] = elsewhere
        try:
            package = importlib.import_module(__name__)
        except ModuleNotFoundError as error:
            raise AttributeError(f'module {__name__} has no attribute {name}') from error
        finally:
            sys.modules[__name__], sys.path[:] = ours, path
        globals()['_hugging_face'] = package
    return getattr(package, name)


class Batch(NamedTuple):
    """One micro-batch as it leaves a worker."""

    images: torch.Tensor  # uint8 [B, H, W, 3]
    targets: torch.Tensor  # int64 [B]
    boxes: torch.Tensor  # int32 [B, recount, 4]: to erase, as top, left, height, width
    seeds: torch.Tensor  # int64 [B]: the images' seeds, from which the erased pixels are filled
    bad: int  # images that could not be read


@dataclass
class Loaders:
    """What a run reads. `classes` are names by label, empty where the source does not know them."""

    train: 'TrainLoader | None'
    val: 'ValLoader | None'
    num_classes: int
    classes: list[str]

    def close(self) -> None:
        """Ends the worker processes."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()


def build_loaders(recipe: Recipe, run: Run, *, rank: int = 0, device: torch.device | str = 'cpu') -> Loaders:
    """The training and evaluation loaders of a run.

    Args:
        recipe: what is trained.
        run: with `batch_size` and `update_freq` resolved, unless it only evaluates.
        rank: of this process among `run.world_size`.
        device: where the batches are wanted.

    Raises:
        UserError: for data that is missing, too small or does not fit the recipe, with the cure.
    """
    device = torch.device(device)
    with rank_zero_first('index'):  # builds the index of the files, which the other ranks then read
        train = None if run.eval else open_source(recipe, run, 'train')
        val = None if run.disable_eval and not run.eval else open_source(recipe, run, 'val')
    if recipe.data_set == 'image_folder':
        errors, warnings = check_files(train, val)
        for warning in warnings if rank == 0 else ():
            log.warning('%s', warning)
        if errors:
            raise UserError(errors[0])
    classes = next((names for source in (train, val) if source is not None
                    and (names := list(getattr(source, 'classes', None) or class_names(source)))), [])
    num_classes = recipe.num_classes or len(classes)
    if not num_classes:
        raise UserError(f'--data_set {recipe.data_set} does not say how many classes it has; give --num_classes')
    if len(classes) > num_classes:
        if run.eval and 'num_classes' not in run.given:
            raise UserError(f'the checkpoint tells {num_classes} classes apart, but the data has {len(classes)}; '
                            'evaluate it on the data it was trained for, or choose its classes by --class_map FILE')
        raise UserError(f'--num_classes {num_classes}, but the data has {len(classes)} classes; leave the flag out')
    return Loaders(
        train and TrainLoader(train, recipe, run, rank=rank, device=device, num_classes=num_classes),
        val and ValLoader(val, recipe, run, rank=rank, device=device, num_classes=num_classes), num_classes, classes)


# ---- In the worker processes ----------------------------------------------------------------------------------------

class BadLabel(Exception):
    """A label that the model has no class for: on a GPU it would become an assertion that names nothing."""


class _Builder:
    """Fills one micro-batch, image by image."""

    def __init__(self, recipe: Recipe, transform: TrainTransform | TestTransform, num_classes: int, *, size: int,
                 training: bool):
        self._recipe, self._transform, self._num_classes, self._training = recipe, transform, num_classes, training
        self._tensors = (_memory((size, transform.size, transform.size, 3), torch.uint8),
                         torch.zeros(size, dtype=torch.int64), torch.zeros(size, recipe.recount, 4, dtype=torch.int32),
                         torch.zeros(size, dtype=torch.int64))
        # Filled as arrays: an assignment to a part of a tensor takes 5 us
        self._images, self._targets, self._boxes, self._seeds = (tensor.numpy() for tensor in self._tensors)
        self.filled = self.bad = 0

    def add(self, image: Any, label: Any, seed: int) -> None:
        """Decodes and augments one image. Raises BadImage and BadLabel."""
        if not 0 <= label < self._num_classes:
            raise BadLabel(f'has label {label}, but the model has {self._num_classes} classes: give --num_classes, or '
                           'check --class_map')
        seed_image(seed)
        with refusing_bad_images():
            self._images[self.filled] = self._transform(image)
        self._targets[self.filled], self._seeds[self.filled] = int(label), seed
        if self._training:
            self._boxes[self.filled] = erasing_boxes(self._recipe)
        self.filled += 1

    def batch(self) -> Batch:
        """What was added so far."""
        return Batch(*(tensor[:self.filled] for tensor in self._tensors), self.bad)


class MapBatches(torch.utils.data.Dataset):
    """Micro-batches of a map-style source: the index is an array of keys [B, 3] = (epoch, index, repeat).

    An error is returned as its message and not raised: torch would wrap it into a worker's traceback.
    """

    def __init__(self, source: Any, recipe: Recipe, num_classes: int, *, training: bool):
        self._source, self._recipe, self._num_classes, self._training = source, recipe, num_classes, training
        self._transform = (TrainTransform if training else TestTransform)(recipe)

    def __getitem__(self, keys: np.ndarray) -> 'Batch | str':
        builder = _Builder(self._recipe, self._transform, self._num_classes, size=len(keys), training=self._training)
        for epoch, index, repeat in keys.tolist():
            for attempt in range(100):
                try:
                    with refusing_bad_images():
                        image, label = self._source.read(index)
                    builder.add(image, label, derive_seed(self._recipe.seed, epoch, index, repeat))
                    break
                except BadLabel as error:
                    return f'image {index}, {self._source.name(index)}, {error}'
                except BadImage as error:
                    if not self._training or self._recipe.on_bad_image == 'stop' or attempt == 99:
                        cure = ('--on_bad_image skip trains without them' if self._training else
                                'an evaluation counts every image, so replace or remove them')
                        return (f'image {index}, {self._source.name(index)}, cannot be read ({error}); '
                                f'tools/check_dataset.py --decode finds all such files, {cure}')
                    builder.bad += 1
                    index = derive_seed(self._recipe.seed, 'instead of', index) % len(self._source)
        return builder.batch()


class StreamBatches(IterableDataset):
    """Micro-batches of a stream, in the order in which its reader gives the images to each worker.

    An image's augmentation comes from (seed, epoch, rank, worker, its position): repeatable for the same number of
    workers, and not resumable in the middle of an epoch. Errors are passed on as their messages.
    """

    def __init__(self, data: Any, recipe: Recipe, num_classes: int, *, training: bool, batch_size: int, rank: int,
                 world_size: int):
        self._data, self._recipe, self._num_classes, self._training = data, recipe, num_classes, training
        self._batch_size, self._rank = batch_size, rank
        self._transform = (TrainTransform if training else TestTransform)(recipe)
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

    def __iter__(self) -> Iterator['Batch | str']:
        worker = get_worker_info()
        key = (self._recipe.seed, 'stream', int(self._epoch), self._rank, worker.id if worker else 0)

        def start() -> _Builder:
            return _Builder(self._recipe, self._transform, self._num_classes, size=self._batch_size,
                            training=self._training)

        builder, told = start(), False

        def note(reasons: list[str]) -> None:
            nonlocal told
            if reasons and self._training and self._recipe.on_bad_image == 'stop':
                raise BadImage(f'{reasons[0]}; --on_bad_image skip trains without what cannot be read')
            if reasons and not told:  # one of a pass says it for all
                log.warning('--data_set %s: %s; left out', self._recipe.data_set, reasons[0])
                told = True
            builder.bad += len(reasons)

        try:
            for position, (item, reasons) in enumerate(() if self._empty else _heard(self._data)):
                note(reasons)
                if item is None:
                    break
                try:
                    builder.add(*item, derive_seed(*key, position))
                except BadImage as error:
                    note([f'image {position} of a worker cannot be read ({error})'])
                if builder.filled == self._batch_size:
                    yield builder.batch()
                    builder = start()
            if builder.filled and not self._training:
                yield builder.batch()
        except Exception as error:  # anything that a foreign reader raises
            yield f'--data_set {self._recipe.data_set}: {" ".join(str(error).split()) or type(error).__name__}'


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


def _heard(data: Any) -> Iterator[tuple[Any, list[str]]]:
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


_storages: list[torch.UntypedStorage] = []  # of earlier batches of this process


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU, in memory that no tensor uses any more where there is some.

    Fresh pages cost 0.5 ms per float image, ten times the arithmetic. In a worker, the memory is shared with the main
    process from the start, which saves a copy.
    """
    size = math.prod(shape) * dtype.itemsize
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(size)
    else:
        # One use is that of the list; tensors, views and what autograd saved each count one more
        free = [old for old in _storages if torch._C._storage_Use_Count(old._cdata) == 1]
        storage = next((old for old in free if old.nbytes() == size), None)
        if storage is None:
            _storages[:] = [old for old in _storages if old not in free[2:]]
            storage = torch.UntypedStorage(size)
            _storages.append(storage)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def _start_worker(_: int) -> None:
    """Signals are the main process's business: a preempted job saves while its workers go on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


# ---- In the main process --------------------------------------------------------------------------------------------

def count_workers(run: Run, source: Any) -> int:
    """Data-loading processes of a rank: as given, none for data in memory, else the rank's cores up to 10."""
    if run.num_workers is not None:
        return run.num_workers
    if getattr(source, 'in_memory', False):
        return 0
    shards = getattr(getattr(getattr(source, 'reader', None), 'split_info', None), 'filenames', None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = max(1, min(10, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    return min(workers, len(shards) // run.world_size or 1) if shards else workers  # one without a shard has no work


class _Keys:
    """What a DataLoader asks for next; set anew before each pass, while its workers live on."""

    def __init__(self) -> None:
        self.batches: Iterable[np.ndarray] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)


class _Workers:
    """A DataLoader of whole micro-batches whose workers persist over the epochs and end with the process."""

    def __init__(self, data: Any, *, workers: int, persistent: bool, pin_memory: bool):
        self._keys, self._iterator = _Keys(), None
        streaming = isinstance(data, IterableDataset)
        self._loader = DataLoader(
            data, batch_size=None, sampler=None if streaming else self._keys, num_workers=workers,
            persistent_workers=persistent and workers > 0, pin_memory=pin_memory, worker_init_fn=_start_worker)
        # Workers ignore SIGTERM, so that Python's own end of them would wait for ever
        atexit.register(self.close)

    def batches(self, keys: Iterable[np.ndarray] = ()) -> Iterator[Batch]:
        """The batches of these keys, in their order. Raises UserError for what a worker could not read."""
        self._keys.batches = keys
        # A new worker inherits the mask, and is safe from signals before it has come to ignore them
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._iterator = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for batch in self._iterator:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def close(self) -> None:
        """Ends the worker processes. A further pass would start new ones."""
        if hasattr(self._iterator, '_shutdown_workers'):
            self._iterator._shutdown_workers()
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


class _Loader:
    """What training and evaluation share: the source, its workers and the device's part."""

    def __init__(self, source: Any, recipe: Recipe, run: Run, *, rank: int, device: torch.device, num_classes: int,
                 training: bool, batch_size: int):
        self._recipe, self._run, self._rank = recipe, run, rank
        self._finish = Finish(recipe, device, num_classes)
        workers = count_workers(run, source)
        self._stream = None
        if isinstance(source, IterableDataset):
            self.count = int(getattr(source.reader, 'num_samples', 0) or len(source))
            source.set_loader_cfg(num_workers=workers)
            batches = self._stream = StreamBatches(
                source, recipe, num_classes, training=training, batch_size=batch_size, rank=rank,
                world_size=run.world_size)
        else:
            self.count = len(source)
            batches = MapBatches(source, recipe, num_classes, training=training)
        self._workers = _Workers(batches, workers=workers, persistent=training,
                                 pin_memory=run.pin_mem and device.type == 'cuda')

    def close(self) -> None:
        """Ends the worker processes."""
        self._workers.close()


class TrainLoader(_Loader):
    """Micro-batches of training, for one rank.

    Attributes:
        count: images in the whole set.
        updates_per_epoch: whole batches in the data; what is left of an epoch is dropped.
        bad_images: unreadable images replaced so far (`--on_bad_image skip`), on this rank.
    """

    def __init__(self, source: Any, recipe: Recipe, run: Run, **others: Any):
        super().__init__(source, recipe, run, training=True, batch_size=run.batch_size, **others)
        self.bad_images = 0
        self.updates_per_epoch = self.count // recipe.total_batch_size
        if not self.updates_per_epoch:
            fitting = 2 ** (max(self.count, 1).bit_length() - 1)
            raise UserError(f'{self.count:,} training images are fewer than one batch of {recipe.total_batch_size:,}; '
                            f'give --total_batch_size {fitting} or less, and think of --scale_lr')
        if self._stream and recipe.repeated_aug > 1:
            raise UserError('--repeated_aug needs images in any order, which a stream does not give; use a folder')

    def epoch(self, epoch: int, start_update: int = 0, attempt: int = 0) -> Iterator[Pair]:
        """This rank's micro-batches of an epoch from an update on, `update_freq` of them an update.

        Args:
            epoch: from 0.
            start_update: within the epoch.
            attempt: changes the order, after a rollback.

        Yields:
            images float32 [B, 3, H, W], normalised, erased and mixed, and targets int64 [B], or float [B, classes]
            while mixup or CutMix is on; both on the device.

        Raises:
            UserError: for an image that cannot be read or a label out of range.
        """
        mixing = epoch < self._recipe.epochs - self._recipe.mixup_off_epochs
        first = epoch * self.updates_per_epoch + start_update
        bad: deque[int] = deque()  # of the batches that are prepared ahead: a run that stops now will see them again

        def finished() -> Iterator[Pair]:
            for number, batch in enumerate(self._batches(epoch, start_update, attempt)):
                bad.append(int(batch.bad))
                update, micro_step = divmod(number, self._run.update_freq)
                key = ('mixup', first + update, micro_step, self._rank) if mixing else None
                yield self._finish(batch, mixup_key=key)

        for pair in self._finish.ahead(finished()):
            self.bad_images += bad.popleft()
            yield pair

    def _batches(self, epoch: int, start_update: int, attempt: int) -> Iterator[Batch]:
        if self._stream is None:
            yield from self._workers.batches(self._keys(epoch, start_update, attempt))
            return
        if start_update:
            log.warning('%s is a stream: the rest of epoch %d begins with a fresh pass over it, so some of its images '
                        'are seen twice and others not; runs resumed between epochs are exact', self._recipe.data_set,
                        epoch + 1)
        left, passes = (self.updates_per_epoch - start_update) * self._run.update_freq, 0
        while left:  # the ranks' parts may be unequal: a short one begins again
            # Another attempt, and what follows an interruption, takes another order
            self._stream.set_epoch(derive_seed(epoch, start_update, attempt, passes) % 2**31 if start_update or attempt
                                   or passes else epoch)
            before = left
            for batch in islice(self._workers.batches(), left):
                left -= 1
                yield batch
            if left == before:
                raise UserError(f'--data_set {self._recipe.data_set} gives this process no whole micro-batch of '
                                f'{self._run.batch_size}: each worker of each process needs a shard; take fewer '
                                '--num_workers or processes, or a smaller --batch_size')
            passes += 1

    def _keys(self, epoch: int, start_update: int, attempt: int) -> Iterator[np.ndarray]:
        """The keys of this rank's micro-batches: of update k, chunk a * world size + rank in micro-step a."""
        recipe, run = self._recipe, self._run
        order = epoch_order(self.count, seed=recipe.seed, epoch=epoch, attempt=attempt, repeats=recipe.repeated_aug)
        for update in range(start_update, self.updates_per_epoch):
            batch = order[update * recipe.total_batch_size:(update + 1) * recipe.total_batch_size]
            # Copies of an image go to different micro-batches where there are several, as in DeiT
            batch = batch[np.argsort(batch[:, 1], kind='stable')]
            for micro_step in range(run.update_freq):
                start = (micro_step * run.world_size + self._rank) * run.batch_size
                chunk = batch[start:start + run.batch_size]
                yield np.concatenate([np.full((len(chunk), 1), epoch), chunk], axis=1)


class ValLoader(_Loader):
    """Batches of this rank's share of the test images: every world-size-th, none twice.

    Attributes:
        count: images in the whole set; of a stream, what it says of itself.
        exact: whether `count` is sure, which a stream's is not.
    """

    def __init__(self, source: Any, recipe: Recipe, run: Run, *, rank: int, **others: Any):
        self._source, self.exact = source, not isinstance(source, IterableDataset)
        self._batch_size = run.val_batch_size or int(1.5 * (run.batch_size or recipe.micro_batch_size))
        super().__init__(source, recipe, run, training=False, batch_size=self._batch_size, rank=rank, **others)
        self._share = np.arange(rank, self.count, run.world_size)

    @property
    def names(self) -> list[str]:
        """Where this rank's images come from, in the order of the batches. Raises UserError for a stream."""
        if not self.exact:
            raise UserError(f'--data_set {self._recipe.data_set} is a stream, which does not tell the names of its '
                            'images; use a folder')
        return [self._source.name(int(index)) for index in self._share]

    def __len__(self) -> int:
        """Number of batches; of a stream, about."""
        return -(-len(self._share) // self._batch_size)

    def __iter__(self) -> Iterator[Pair]:
        """Yields images float32 [B, 3, H, W], normalised, and targets int64 [B], on the device."""
        def keys() -> Iterator[np.ndarray]:
            for start in range(0, len(self._share), self._batch_size):
                share = self._share[start:start + self._batch_size]
                yield np.stack([np.zeros_like(share), share, np.zeros_like(share)], axis=1)

        batches = self._workers.batches() if self._stream else self._workers.batches(keys())
        return self._finish.ahead(self._finish(batch) for batch in batches if len(batch.targets))


# ---- On the device --------------------------------------------------------------------------------------------------

class BatchMixup(Mixup):
    """timm's mixup and CutMix, for odd batches too: the image in the middle would be mixed with itself."""

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> Pair:
        if len(x) % 2 == 0:
            return super().__call__(x, target)
        if self.mode == 'batch':
            weight: Any = self._mix_batch(x)
        elif self.mode == 'elem':
            weight = self._mix_elem(x)
        else:
            half = self._mix_pair(x)
            weight = torch.cat([half[:len(x) // 2], half.new_ones(1, 1), half[len(x) // 2:]])
        return x, mixup_target(target, self.num_classes, weight, self.label_smoothing)


class Finish:
    """Turns a worker's batch into the model's input: to the device, to float, normalised, erased, mixed."""

    def __init__(self, recipe: Recipe, device: torch.device, num_classes: int):
        self._recipe, self._device = recipe, device
        self._mean = torch.tensor(recipe.mean, device=device) * 255
        self._scale = 1 / (torch.tensor(recipe.std, device=device) * 255)
        self._mixup = None
        if recipe.mixup > 0 or recipe.cutmix > 0 or recipe.cutmix_minmax:
            self._mixup = BatchMixup(
                recipe.mixup, recipe.cutmix, recipe.cutmix_minmax, recipe.mixup_prob, recipe.mixup_switch_prob,
                recipe.mixup_mode, label_smoothing=recipe.smoothing, num_classes=num_classes)

    def __call__(self, batch: Batch, mixup_key: tuple[Any, ...] | None = None) -> Pair:
        """Images float32 [B, 3, H, W] in channels-last memory and targets, mixed where a key is given."""
        targets = batch.targets.to(self._device, non_blocking=True)
        pixels = batch.images.to(self._device, non_blocking=True)
        # Whole rows at once: the CPU takes three times as long over a mean for every third value
        count, height, width, _ = pixels.shape
        rows, (mean, scale) = pixels.view(-1, 3 * width), (part.repeat(width) for part in (self._mean, self._scale))
        floats = _memory(rows.shape, torch.float32) if self._device.type == 'cpu' else None
        images = normalise(rows, mean, scale, floats).view(count, height, width, 3).permute(0, 3, 1, 2)
        self._erase(images, batch)
        if mixup_key is not None and self._mixup is not None:
            np.random.seed(derive_seed(self._recipe.seed, *mixup_key) & 0xFFFFFFFF)
            images, targets = self._mixup(images, targets)
        return images, targets

    def _erase(self, images: torch.Tensor, batch: Batch) -> None:
        """Random erasing of the boxes drawn in the workers; the fill comes from the images' seeds too."""
        for number in batch.boxes[:, :, 2].sum(1).nonzero().flatten().tolist():
            generator = torch.Generator(self._device).manual_seed(int(batch.seeds[number]))
            for top, left, height, width in batch.boxes[number].tolist():
                shape = {'pixel': (3, height, width), 'rand': (3, 1, 1), 'const': (3, 0, 0)}[self._recipe.remode]
                fill = torch.randn(shape, device=self._device, generator=generator) if shape[1] else 0.0
                images[number, :, top:top + height, left:left + width] = fill

    def ahead(self, batches: Iterator[Pair]) -> Iterator[Pair]:
        """On CUDA, prepares each batch in a stream of its own while the device works on the batch before."""
        if self._device.type != 'cuda':
            yield from batches
            return
        stream, waiting = torch.cuda.Stream(self._device), None
        while True:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
                ready = stream.record_event()
            if waiting is not None:
                tensors, event = waiting
                current = torch.cuda.current_stream(self._device)
                current.wait_event(event)
                for tensor in tensors:
                    tensor.record_stream(current)
                yield tensors
            if batch is None:
                return
            waiting = batch, ready
