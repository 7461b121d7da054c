"""Speed of the data paths with boxes and with labels on one core, alternated (`tools/benchmark.py dense_data`).

Detection stands beside torchvision's reference, its transforms on Pillow's images: resized to 800 pixels, mirrored, a
tensor. Segmentation stands beside the same operations with Pillow and NumPy.
"""
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from pipeline import dense
from pipeline.ade20k import IGNORED
from pipeline.loaders import MapBatches
from recipes import Recipe, Run
from tasks import Task, create_task
from tools.alternation import spread
from tools.benchmark_data import alternate_workers, draw_photos, in_cache
from utils import UserError

SIZE = (640, 480)  # width and height, as most of COCO's
COUNT, BOXES, CLASSES = 64, 7, 150  # images; boxes an image, as in COCO; classes, as in ADE20K
BATCH = 2


def photos() -> Path:
    """JPEGs of 640x480 pixels and some 110 kB with random boxes as COCO's folder and labels in blocks as one's own."""
    def write(folder: Path) -> None:
        rng, data = np.random.default_rng(0), {'images': [], 'annotations': [], 'categories': [
            {'id': number + 1, 'name': f'class {number}'} for number in range(CLASSES)]}
        names = ('train2017', 'images/train', 'labels/train', 'annotations')
        coco, images, labels, annotations = (folder / name for name in names)
        for each in (coco, images, labels, annotations):
            each.mkdir(parents=True)
        for number, image in enumerate(draw_photos(COUNT, SIZE)):
            for each in (coco, images):
                image.save(each / f'{number}.jpg', quality=93)
            blocks = Image.fromarray(rng.integers(0, CLASSES, (7, 9), np.uint8))
            blocks.resize(SIZE, Image.Resampling.NEAREST).rotate(rng.uniform(-20, 20)).save(labels / f'{number}.png')
            data['images'].append({'id': number, 'file_name': f'{number}.jpg', 'width': SIZE[0], 'height': SIZE[1]})
            for box in rng.uniform(0, 200, (BOXES, 4)).tolist():
                data['annotations'].append({'id': len(data['annotations']), 'image_id': number, 'bbox': box,
                                            'category_id': int(rng.integers(CLASSES)) + 1})
        (annotations / 'instances_train2017.json').write_text(json.dumps(data))
        (folder / 'classes.txt').write_text('\n'.join(category['name'] for category in data['categories']))

    return in_cache('photos-dense', write)


class Presets:
    """torchvision's detection reference: references/detection/presets.py on PIL images, with the model's resizing."""

    def __init__(self, recipe: Recipe):
        steps = [v2.RandomShortestSize((min(recipe.image_scale),), max_size=max(recipe.image_scale)),
                 v2.RandomHorizontalFlip(recipe.hflip), v2.PILToTensor()]
        self._transform = v2.Compose(steps)

    def __call__(self, path: str, notes: Any) -> Any:
        image = Image.open(path).convert('RGB')
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(notes.boxes), format='XYXY', canvas_size=notes.size)
        return self._transform(image, {'boxes': boxes, 'labels': torch.from_numpy(notes.labels)})


class Pillow:
    """The segmentor's augmentation with Pillow's operations, and NumPy where Pillow has none."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def __call__(self, path: str, file: Any) -> Any:
        recipe = self._recipe
        image, labels = Image.open(path).convert('RGB'), Image.open(file.path)
        ratio = random.uniform(*recipe.scale_range)
        height, width = dense.fit((image.height, image.width), tuple(int(ratio * side) for side in recipe.image_scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        labels = labels.resize((width, height), Image.Resampling.NEAREST)
        for _ in range(11):
            left, top = (random.randint(0, max(side - recipe.crop_size, 0)) for side in (width, height))
            box = (left, top, min(left + recipe.crop_size, width), min(top + recipe.crop_size, height))
            crop = labels.crop(box)
            counts = np.bincount(np.asarray(crop).ravel(), minlength=256)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < recipe.max_class_share:
                break
        image = image.crop(box)
        if random.random() < recipe.hflip:
            image, crop = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (image, crop))
        return self._tensors(np.asarray(self._distort(image)), np.asarray(crop))

    def _distort(self, image: Image.Image) -> Image.Image:
        def levels(factor: float, shift: float) -> list[int]:
            return [min(max(int(level * factor + shift), 0), 255) for level in range(256)]

        def sometimes(change: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
            return change(image) if random.random() < self._recipe.photometric else image

        def contrast(image: Image.Image) -> Image.Image:
            return image.point(levels(random.uniform(0.5, 1.5), 0) * 3)

        image = sometimes(lambda image: image.point(levels(1, random.uniform(-32, 32)) * 3), image)
        first = random.random() < 0.5
        if first:
            image = sometimes(contrast, image)
        rate = self._recipe.photometric
        factor = random.uniform(0.5, 1.5) if random.random() < rate else 1.0
        turn = random.randint(-18, 17) * 256 // 180 if random.random() < rate else 0
        if factor != 1 or turn:
            hue, saturation, value = image.convert('HSV').split()
            hue = hue.point([(level + turn) % 256 for level in range(256)])
            image = Image.merge('HSV', (hue, saturation.point(levels(factor, 0)), value)).convert('RGB')
        return image if first else sometimes(contrast, image)

    def _tensors(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (height, width), side = labels.shape, self._recipe.crop_size
        found = np.full((side, side), IGNORED, np.uint8)
        found[:height, :width] = labels
        image = np.zeros((side, side, 3), np.uint8)
        image[:height, :width] = pixels
        return image, found


COMMON = {'tasks.detection:Detection': Presets, 'tasks.segmentation:Segmentation': Pillow}


def measure(recipe: Recipe, *, images: int = COUNT, rounds: int = 7) -> dict[str, Any]:
    """Measures both data paths on the same files, one thread, files in the page cache.

    Args:
        images: how many a round takes.
        rounds: alternations; ratios are formed within a round.

    Returns:
        `ratio_uint8` (uint8 tensors on both sides) with its spread, and images per second and core.
    """
    if recipe.task not in COMMON:
        raise UserError(f'--recipe {recipe.name} has neither boxes nor labels of pixels; measure it by '
                        'tools/benchmark.py data')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task: Task = create_task(recipe, Run(data_path=str(photos())))
    source = task.open('train')
    task.learn_classes([source])
    chosen = np.resize(np.arange(len(source)), -(-images // BATCH) * BATCH)
    keys = np.stack([np.zeros_like(chosen), chosen, np.zeros_like(chosen)], axis=1).reshape(-1, BATCH, 3)
    items = [(source.name(int(index)), source.read(int(index))[1]) for index in chosen]
    batches = MapBatches(source, task, training=True)

    def ours(batch: int) -> None:
        made = batches[keys[batch]]
        if isinstance(made, str):
            raise UserError(made)

    def theirs(batch: int, transform: Callable[[str, Any], Any]) -> None:
        for path, target in items[BATCH * batch:BATCH * (batch + 1)]:
            transform(path, target)

    common = COMMON[recipe.task](recipe)
    pipelines: dict[str, Callable[[int], None]] = {
        'this_uint8': ours, 'common_uint8': lambda batch: theirs(batch, common)}
    taken = alternate_workers(pipelines, batches=len(keys), rounds=rounds)
    torch.set_num_threads(threads)
    return {
        'recipe': recipe.name, 'images': len(chosen), 'rounds': rounds,
        'kilobytes_per_image': round(statistics.mean(Path(path).stat().st_size for path, _ in items) / 1e3, 1),
        'ratio_uint8': spread([each['common_uint8'] / each['this_uint8'] for each in taken]),
        'images_per_second_and_core': {name: round(len(chosen) / statistics.median(each[name] for each in taken), 1)
                                       for name in pipelines}}
