"""Speed of the data path on one core, beside the common pipeline, alternated (`tools/benchmark.py data`).

The common pipeline is torchvision's ImageFolder loader with timm's `create_transform`: Pillow decodes, crops, augments.
"""
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.datasets.folder import default_loader

from pipeline import augmentation
from pipeline.files import cache_folder
from pipeline.loaders import MapBatches
from pipeline.sources import ImageFiles
from recipes import RECIPES, Recipe, Run
from tasks import create_task
from tools.alternation import spread
from utils import UserError, derive_seed

BATCH = 32  # images


def _seconds(work: Callable[[], Any]) -> float:
    """The processor time, in which another process on the core does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


PATIENCE = 600  # seconds that a pipeline may take for a batch


class _Worker:
    """A process for one pipeline, as a DataLoader has: no other pipeline has changed its heap."""

    def __init__(self, work: Callable[[int], None]):
        context = multiprocessing.get_context('fork')
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(work, theirs), daemon=True)
        self._process.start()

    @staticmethod
    def _serve(work: Callable[[int], None], pipe: Any) -> None:
        while (batch := pipe.recv()) is not None:
            pipe.send(_seconds(lambda batch=batch: work(batch)))

    def __call__(self, batch: int) -> float:
        """Seconds that the pipeline takes for a batch."""
        self._ours.send(batch)
        try:
            if self._ours.poll(PATIENCE):
                return self._ours.recv()
            raise UserError(f'a pipeline has not ended a batch for {PATIENCE} s')
        except EOFError:
            raise UserError('a pipeline failed; its message is above') from None

    def close(self) -> None:
        """Ends the process."""
        self._ours.send(None)
        self._process.join(timeout=60)


def alternate_workers(pipelines: dict[str, Callable[[int], None]], *, batches: int,
                      rounds: int) -> list[dict[str, float]]:
    """Seconds of processor time that each pipeline takes for all batches, by round, each in a process of its own."""
    workers = {name: _Worker(work) for name, work in pipelines.items()}
    taken = []
    for number in range(-1, rounds):  # the first does not count
        # A turn is all batches: after another process had its core, a process runs a third slower for its first images
        seconds = {name: sum(map(worker, range(batches))) for name, worker in workers.items()}
        if number >= 0:
            taken.append(seconds)
    for worker in workers.values():
        worker.close()
    return taken


def draw_photos(count: int, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Photographs of a width and height, as a camera gives them.

    They are parts of scikit-image's photographs at random scales, with a camera's noise of 4 grey levels: without it
    the enlarged parts would be smooth, and their files small.
    """
    try:
        from skimage import data
    except ImportError:
        raise UserError('without --data_path, photographs come from scikit-image: pip install scikit-image') from None
    originals = [Image.fromarray(getattr(data, name)()) for name in ('astronaut', 'chelsea', 'coffee', 'rocket')]
    rng, shape = np.random.default_rng(0), size[1] / size[0]
    for number in range(count):
        photo = originals[number % len(originals)]
        width = rng.uniform(0.6, 1.0) * min(photo.width, photo.height / shape)
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - width * shape)
        pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC,
                                         box=(left, top, left + width, top + width * shape)))
        noisy = np.clip(pixels + rng.normal(0, 4, (*pixels.shape[:2], 1)), 0, 255).astype(np.uint8)
        yield Image.fromarray(noisy)


def in_cache(name: str, write: Callable[[Path], None]) -> Path:
    """A folder in the user's cache, written once and as a whole."""
    folder = cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            target = Path(beside) / name
            target.mkdir()
            write(target)
            target.rename(folder)
    return folder


def photos(count: int = 256) -> Path:
    """A folder with JPEGs of 500x375 pixels and some 70 kB, as ImageNet's are on average; made once, in the cache."""
    def write(folder: Path) -> None:
        (folder / 'train' / 'all').mkdir(parents=True)
        for number, image in enumerate(draw_photos(count, (500, 375))):
            image.save(folder / 'train' / 'all' / f'{number}.jpg', quality=93)

    return in_cache('photos', write)


def measure(data_path: str | None, *, recipe: Recipe = RECIPES['moganet_small'], images: int = 256, rounds: int = 7,
            gpus: int = 1, images_per_second: float | None = None, device: str | None = None) -> dict[str, Any]:
    """Measures both pipelines on the same images, one thread, files in the page cache.

    Args:
        data_path: folder with `train/`, as for training; None for `photos`.
        recipe: the recipe whose augmentation is measured.
        images: the number of images in a round.
        rounds: alternations; ratios are formed within a round.
        gpus: the number of GPUs of the machine that is to be fed.
        images_per_second: the images that the training step takes on one GPU in a second.
        device: the device on which to measure those, where they are not given.

    Returns:
        `ratio_uint8` (training, up to uint8 tensors, which every device takes) and `ratio_test` (the test images of an
        evaluation), with their spread; images per second and core; milliseconds of each part; and the cores that the
        GPUs need.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = dataclasses.replace(recipe, data_set='image_folder', num_classes=1000)
    task = create_task(recipe, Run(data_path=data_path or str(photos())))
    source = task.open('train')
    chosen = np.random.default_rng(0).permutation(len(source))[:images]
    chosen = np.resize(chosen, -(-max(len(chosen), BATCH) // BATCH) * BATCH)
    keys = np.stack([np.zeros_like(chosen), chosen, np.zeros_like(chosen)], axis=1).reshape(-1, BATCH, 3)
    if any(source.name(int(index)).find(':') > 0 for index in chosen[:1]):
        raise UserError(f'{data_path}: the common pipeline reads no tar files; give a folder of class folders')
    paths = [source.name(int(index)) for index in chosen]
    common = create_transform(
        recipe.input_size, is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip,
        vflip=recipe.vflip, color_jitter=recipe.color_jitter, auto_augment=recipe.aa, re_prob=recipe.reprob,
        re_mode=recipe.remode, re_count=recipe.recount, interpolation=recipe.train_interpolation, use_prefetcher=True)
    batches, tests = (MapBatches(source, task, training=training) for training in (True, False))
    task.prepare(np.zeros((8, 8, 3), np.uint8))  # makes the transform of the test
    common_test = create_transform(
        recipe.test_size, crop_pct=recipe.crop_pct, crop_mode=recipe.crop_mode, interpolation=recipe.interpolation,
        use_prefetcher=True)

    def ours(batch: int, batches: MapBatches) -> None:
        made = batches[keys[batch]]
        if isinstance(made, str):
            raise UserError(made)

    def theirs(batch: int, transform: Callable[[Any], Any]) -> None:
        for path in paths[batch * BATCH:(batch + 1) * BATCH]:
            transform(default_loader(path))

    pipelines: dict[str, Callable[[int], None]] = {
        'this_uint8': lambda batch: ours(batch, batches), 'timm_uint8': lambda batch: theirs(batch, common),
        'this_test': lambda batch: ours(batch, tests), 'timm_test': lambda batch: theirs(batch, common_test)}
    taken = alternate_workers(pipelines, batches=len(keys), rounds=rounds)
    rates = {name: len(chosen) / statistics.median(each[name] for each in taken) for name in pipelines}
    result = {
        'recipe': recipe.name, 'images': len(chosen), 'rounds': rounds,
        'kilobytes_per_image': round(statistics.mean(Path(path).stat().st_size for path in paths) / 1e3, 1),
        'ratio_uint8': spread([each['timm_uint8'] / each['this_uint8'] for each in taken]),
        'ratio_test': spread([each['timm_test'] / each['this_test'] for each in taken]),
        'images_per_second_and_core': {name: round(rate, 1) for name, rate in rates.items() if 'test' not in name},
        'test_images_per_second_and_core': {name: round(rate, 1) for name, rate in rates.items() if 'test' in name},
        'milliseconds': _parts(source, recipe, chosen),
    }
    torch.set_num_threads(threads)
    if device and not images_per_second:
        images_per_second = step_rate(recipe, torch.device(device))
    if images_per_second:
        result |= {'gpus': gpus, 'step_images_per_second': round(images_per_second, 1)}
        result['cores_per_gpu'] = round(images_per_second / rates['this_uint8'], 1)
        result['cores'] = round(gpus * images_per_second / rates['this_uint8'], 1)
        result['cores_common'] = round(gpus * images_per_second / rates['timm_uint8'], 1)
    return result


def step_rate(recipe: Recipe, device: torch.device, *, steps: int = 10) -> float:
    """Images a second that a training step of the recipe's model consumes, at its size, micro-batch and precision."""
    import timm

    import models  # noqa: F401  registers them
    from tools.benchmark_model import training_step
    model = timm.create_model(recipe.model).to(device, memory_format=torch.channels_last).train()
    images = torch.randn(recipe.micro_batch_size, 3, recipe.input_size, recipe.input_size, device=device)
    images = images.to(memory_format=torch.channels_last)  # as the loaders give them
    step = training_step(model, images, precision=recipe.precision)
    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * len(images) / (time.perf_counter() - start)


def _parts(source: ImageFiles, recipe: Recipe, chosen: np.ndarray) -> dict[str, float]:
    """Milliseconds an image of each part of this pipeline."""
    transform = augmentation.TrainTransform(recipe)
    files = [source.read(int(index))[0] for index in chosen]
    pixels = [augmentation.decode(file) for file in files]
    crops = [transform.resized_crop(image) for image in pixels]

    def seconds(work: Callable[[], Any]) -> float:
        work()  # fresh memory costs more than the work on it
        return _seconds(work)

    def seeded(work: Callable[[Any], Any], items: Sequence[Any]) -> Callable[[], None]:
        def run() -> None:
            for number, item in enumerate(items):
                augmentation.seed_image(number)
                work(item)
        return run

    def augment(image: np.ndarray) -> None:
        for step in transform.steps:
            image = step(image)

    seeding = seconds(seeded(lambda _: None, files))
    parts = {
        'read': seconds(lambda: [len(source.read(int(index))[0]) for index in chosen]),
        'decode_whole': seconds(seeded(augmentation.decode, files)) - seeding,
        'decode_crop_and_resize': seconds(seeded(transform.resized_crop, files)) - seeding,
        'crop_and_resize': seconds(seeded(transform.resized_crop, pixels)) - seeding,
        'flip_and_augment': seconds(seeded(augment, crops)) - seeding,
        'seeds': seeding + seconds(lambda: [derive_seed(0, 0, int(index), 0) for index in chosen]),
    }
    return {name: round(1e3 * taken / len(chosen), 3) for name, taken in parts.items()}
