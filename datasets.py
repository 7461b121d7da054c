"""The data path: loaders that start at any update of any epoch, and what happens to a batch on the device.

Randomness is derived (`utils.derive_seed`): an epoch's order from (seed, epoch), an image's augmentation from (seed,
epoch, its index, repeat), mixup from (seed, update, micro-step, rank). So neither the number of workers nor the place
where a run was interrupted changes a pixel, and update k of an epoch trains on the same images for any world size.

uint8 pixels come from the workers and cross the bus; normalisation, random erasing and mixup are done per batch on the
device, on CUDA in a stream of their own, ahead of the step.
"""
import atexit
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from image_ops import TestTransform, TrainTransform, erasing_boxes, seed_image
from image_sources import class_names, open_source
from recipes import Recipe, Run
from utils import UserError, derive_seed, rank_zero_first

log = logging.getLogger('moganet')
Pair = tuple[torch.Tensor, torch.Tensor]  # images and targets


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
    classes = next((names for source in (train, val) if source is not None
                    and (names := list(getattr(source, 'classes', None) or class_names(source)))), [])
    num_classes = recipe.num_classes or len(classes)
    if not num_classes:
        raise UserError(f'--data_set {recipe.data_set} does not say how many classes it has; give --num_classes')
    if len(classes) > num_classes:
        raise UserError(f'--num_classes {num_classes}, but the data has {len(classes)} classes; leave the flag out')
    return Loaders(
        train and TrainLoader(train, recipe, run, rank=rank, device=device, num_classes=num_classes),
        val and ValLoader(val, recipe, run, rank=rank, device=device, num_classes=num_classes), num_classes, classes)


# ---- In the worker processes ----------------------------------------------------------------------------------------

class BatchSource(torch.utils.data.Dataset):
    """Makes whole micro-batches: the index is an array of keys [B, 3] = (epoch, index, repeat).

    An error is returned as its message and not raised: torch would wrap it into a worker's traceback.
    """

    def __init__(self, source: Any, recipe: Recipe, *, training: bool, num_classes: int):
        self._source, self._recipe, self._training, self._num_classes = source, recipe, training, num_classes
        self._transform = (TrainTransform if training else TestTransform)(recipe)

    def __getitem__(self, keys: np.ndarray) -> 'Batch | str':
        size = self._transform.size
        images, seeds = _shared(len(keys), size, size, 3), torch.zeros(len(keys), dtype=torch.int64)
        targets = torch.zeros(len(keys), dtype=torch.int64)
        boxes = torch.zeros(len(keys), self._recipe.recount, 4, dtype=torch.int32)
        filled, bad = 0, 0
        for epoch, index, repeat in keys.tolist():
            for attempt in range(100):
                seed = derive_seed(self._recipe.seed, epoch, index, repeat)
                seed_image(seed)
                try:
                    image, label = self._source.read(index)
                    images[filled] = torch.from_numpy(self._transform(image))
                except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises on damaged files
                    if self._recipe.on_bad_image == 'stop' or attempt == 99:
                        return (f'image {index}, {self._source.name(index)}, cannot be read ({error}); '
                                'tools/check_dataset.py finds all such files, --on_bad_image skip trains without them')
                    bad += 1
                    if not self._training:
                        break  # left out, and so not counted
                    index = derive_seed(self._recipe.seed, 'instead of', index) % len(self._source)
                    continue
                if not 0 <= label < self._num_classes:
                    return (f'image {index}, {self._source.name(index)}, has label {label}, but the model has '
                            f'{self._num_classes} classes: give --num_classes, or check --class_map')
                targets[filled], seeds[filled] = int(label), seed
                if self._training:
                    boxes[filled] = torch.from_numpy(erasing_boxes(self._recipe))
                filled += 1
                break
        return Batch(images[:filled], targets[:filled], boxes[:filled], seeds[:filled], bad)


def _shared(*shape: int) -> torch.Tensor:
    """uint8 memory of a batch: in a worker, shared with the main process from the start, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def _start_worker(_: int) -> None:
    """Signals are the main process's business: a preempted job saves while its workers go on."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


# ---- In the main process --------------------------------------------------------------------------------------------

def count_workers(run: Run, source: Any) -> int:
    """Data-loading processes of a rank: as given, none for data in memory, else the rank's cores up to 10."""
    if run.num_workers is not None:
        return run.num_workers
    if getattr(source, 'in_memory', False):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min(10, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


class _Keys:
    """What a DataLoader asks for next; set anew before each pass, while its workers live on."""

    def __init__(self) -> None:
        self.batches: Iterable[np.ndarray] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)


class _Workers:
    """A DataLoader of whole micro-batches whose workers persist over the epochs and end with the process."""

    def __init__(self, data: Any, *, workers: int, persistent: bool, pin_memory: bool):
        self._keys = _Keys()
        streaming = isinstance(data, IterableDataset)
        self._loader = DataLoader(
            data, batch_size=None, sampler=None if streaming else self._keys, num_workers=workers,
            persistent_workers=persistent and workers > 0, pin_memory=pin_memory, worker_init_fn=_start_worker)
        # Workers ignore SIGTERM, so that Python's own end of them would wait for ever
        atexit.register(self.close)

    def batches(self, keys: Iterable[np.ndarray] = ()) -> Iterator[Batch]:
        """The batches of these keys, in their order. Raises UserError for what a worker could not read."""
        self._keys.batches = keys
        iterator = iter(self._loader)
        for batch in iterator:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def close(self) -> None:
        """Ends the worker processes. A further pass would start new ones."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
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


class TrainLoader:
    """Micro-batches of training, for one rank.

    Attributes:
        updates_per_epoch: whole batches in the data; what is left of an epoch is dropped.
        bad_images: unreadable images replaced so far (`--on_bad_image skip`), on this rank.
    """

    def __init__(self, source: Any, recipe: Recipe, run: Run, *, rank: int, device: torch.device, num_classes: int):
        self._source, self._recipe, self._run, self._rank = source, recipe, run, rank
        self.bad_images = 0
        self.updates_per_epoch = len(source) // recipe.total_batch_size
        if not self.updates_per_epoch:
            raise UserError(f'{len(source):,} training images are fewer than one batch of {recipe.total_batch_size:,}; '
                            f'give --total_batch_size {2 ** (max(len(source), 1).bit_length() - 1)} or less')
        self._finish = Finish(recipe, device, num_classes)
        self._workers = _Workers(
            BatchSource(source, recipe, training=True, num_classes=num_classes), workers=count_workers(run, source),
            persistent=True, pin_memory=run.pin_mem and device.type == 'cuda')

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

        def finished() -> Iterator[Pair]:
            for number, batch in enumerate(self._workers.batches(self._keys(epoch, start_update, attempt))):
                self.bad_images += int(batch.bad)
                update, micro_step = divmod(number, self._run.update_freq)
                key = ('mixup', first + update, micro_step, self._rank) if mixing else None
                yield self._finish(batch, mixup_key=key)

        return self._finish.ahead(finished())

    def _keys(self, epoch: int, start_update: int, attempt: int) -> Iterator[np.ndarray]:
        """The keys of this rank's micro-batches: of update k, chunk a * world size + rank in micro-step a."""
        recipe, run = self._recipe, self._run
        order = epoch_order(len(self._source), seed=recipe.seed, epoch=epoch, attempt=attempt,
                            repeats=recipe.repeated_aug)
        for update in range(start_update, self.updates_per_epoch):
            batch = order[update * recipe.total_batch_size:(update + 1) * recipe.total_batch_size]
            # Copies of an image go to different micro-batches where there are several, as in DeiT
            batch = batch[np.argsort(batch[:, 1], kind='stable')]
            for micro_step in range(run.update_freq):
                start = (micro_step * run.world_size + self._rank) * run.batch_size
                chunk = batch[start:start + run.batch_size]
                yield np.concatenate([np.full((len(chunk), 1), epoch), chunk], axis=1)

    def close(self) -> None:
        """Ends the worker processes."""
        self._workers.close()


class ValLoader:
    """Batches of this rank's share of the test images: every world-size-th, none twice.

    Attributes:
        count: images in the whole set.
    """

    def __init__(self, source: Any, recipe: Recipe, run: Run, *, rank: int, device: torch.device, num_classes: int):
        self.count = len(source)
        self._share = np.arange(rank, self.count, run.world_size)
        self._batch_size = run.val_batch_size or int(1.5 * (run.batch_size or recipe.micro_batch_size))
        self._finish = Finish(recipe, device, num_classes)
        self._workers = _Workers(
            BatchSource(source, recipe, training=False, num_classes=num_classes), workers=count_workers(run, source),
            persistent=False, pin_memory=run.pin_mem and device.type == 'cuda')

    def __len__(self) -> int:
        return -(-len(self._share) // self._batch_size)

    def __iter__(self) -> Iterator[Pair]:
        """Yields images float32 [B, 3, H, W], normalised, and targets int64 [B], on the device."""
        def keys() -> Iterator[np.ndarray]:
            for start in range(0, len(self._share), self._batch_size):
                share = self._share[start:start + self._batch_size]
                yield np.stack([np.zeros_like(share), share, np.zeros_like(share)], axis=1)

        batches = (batch for batch in self._workers.batches(keys()) if len(batch.targets))
        return self._finish.ahead(self._finish(batch) for batch in batches)

    def close(self) -> None:
        """Ends the worker processes."""
        self._workers.close()


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
        self._mean = torch.tensor(recipe.mean, device=device).view(1, 3, 1, 1) * 255
        self._scale = 1 / (torch.tensor(recipe.std, device=device).view(1, 3, 1, 1) * 255)
        self._mixup = None
        if recipe.mixup > 0 or recipe.cutmix > 0 or recipe.cutmix_minmax:
            self._mixup = BatchMixup(
                recipe.mixup, recipe.cutmix, recipe.cutmix_minmax, recipe.mixup_prob, recipe.mixup_switch_prob,
                recipe.mixup_mode, label_smoothing=recipe.smoothing, num_classes=num_classes)

    def __call__(self, batch: Batch, mixup_key: tuple[Any, ...] | None = None) -> Pair:
        """Images float32 [B, 3, H, W] in channels-last memory and targets, mixed where a key is given."""
        targets = batch.targets.to(self._device, non_blocking=True)
        images = batch.images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        images = images.float().sub_(self._mean).mul_(self._scale)
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
