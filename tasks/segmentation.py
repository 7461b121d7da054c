"""Semantic segmentation: images with a class for each pixel, the segmentor's own losses, the mean IoU."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from models.dense import NETWORKS
from models.segmentation import IGNORED
from pipeline import ade20k, ade20k_classes
from pipeline.augmentation import Picture, refusing_bad_images
from pipeline.dense import decode_upright, padded, stack
from pipeline.files import Split
from recipes import Run
from recipes.ade20k import Segmentation as Recipe
from tasks import pictures
from tasks.dense import Dense, DenseBatch
from utils import UserError


@dataclass
class SegmentationBatch(DenseBatch):
    """uint8 [B * V, H, W, 3] from a worker, float32 [B * V, 3, H, W] for the model.

    Each of the B images has V views: one, or in a test one for each scale. `sizes` are of the views.
    """

    labels: Tensor | list[Tensor]  # training: uint8 [B, H, W]; test: of each image uint8 [H, W] at its original size

    def __len__(self) -> int:
        return len(self.original_sizes)


def shorten(loss: str) -> str:
    """A loss's name in the log: decode.loss_ce is decode."""
    return loss.split('.')[0]


class Segmentation(Dense[ade20k.LabelledImages, ade20k.Sample, SegmentationBatch]):
    """A class for each pixel, from ADE20K's folder, from one's own, or made up."""

    recipe: Recipe
    class_cure = 'name them in classes.txt as the model has them'

    def __init__(self, recipe: Recipe, run: Run):
        super().__init__(recipe, run)
        losses = tuple(map(shorten, NETWORKS[recipe.network].LOSSES))
        self.losses = losses if len(losses) > 1 else ()
        self._transform = ade20k.Transform(
            recipe.image_scale, crop=recipe.crop_size, ratios=recipe.scale_range, max_class=recipe.max_class_share,
            hflip=recipe.hflip, photometric=recipe.photometric, aligned=recipe.align_resize,
            test_ratios=recipe.test_scales)

    def known_classes(self) -> list[str]:
        return ade20k_classes.NAMES

    # ---- Data

    def open(self, split: Split) -> ade20k.LabelledImages:
        return ade20k.open_ade20k(self.recipe, self.run, split)

    def sample_bytes(self, *, training: bool) -> int:
        return 4 * self.recipe.crop_size ** 2 if training else super().sample_bytes(training=training)

    def sample(self, item: tuple[Picture, ade20k.LabelFile], seed: int | None) -> ade20k.Sample:
        with refusing_bad_images():
            return self._transform(item, seed, num_classes=self.recipe.num_classes)

    def collate(self, samples: Sequence[ade20k.Sample]) -> SegmentationBatch:
        originals = [sample['original_size'] for sample in samples]
        if 'views' in samples[0]:
            views = [view for sample in samples for view in sample['views']]
            sizes = [view.shape[:2] for view in views]
            labels = [torch.from_numpy(sample['labels']) for sample in samples]
            return SegmentationBatch(stack(views, padded(sizes)), sizes, originals, labels)
        crop = (self.recipe.crop_size, self.recipe.crop_size)
        return SegmentationBatch(stack([sample['pixels'] for sample in samples], crop),
                                 [sample['size'] for sample in samples], originals,
                                 stack([sample['labels'] for sample in samples], crop, IGNORED))

    # ---- Model

    def loss(self, model: nn.Module, batch: SegmentationBatch) -> dict[str, Tensor]:
        return {shorten(name): loss for name, loss in model(batch.images, batch.labels).items()}

    def heads_see(self) -> str:
        seen = self.run.batch_size * self.run.world_size
        return (f', and the heads, whose norms are over all GPUs, see {seen} images at a time where the recipe has '
                f'{self.recipe.total_batch_size}')

    def _predict(self, model: nn.Module, batch: SegmentationBatch) -> list[Tensor]:
        """The label of each pixel of each image, int64 [H, W] at its original size."""
        window = self.recipe.crop_size if self.recipe.test_mode == 'slide' else None
        found = model.predict(batch.images, batch.sizes, batch.original_sizes, window=window,
                              flip=self.recipe.test_flip)
        return [result['labels'] for result in found]

    def example_batch(self, size: int, device: torch.device) -> SegmentationBatch:
        """Crops with all classes in each."""
        side = self.recipe.crop_size
        labels = torch.arange(side * side, device=device).view(1, side, side) % self.recipe.num_classes
        images = torch.zeros(size, 3, side, side, device=device).to(memory_format=torch.channels_last)
        sizes = [(side, side)] * size
        return SegmentationBatch(images, sizes, sizes, labels.to(torch.uint8).repeat(size, 1, 1))

    def metric(self, device: torch.device, *, names: Callable[[], Sequence[str]] | None = None,
               detailed: bool = False) -> 'MeanIoU':
        return MeanIoU(self.recipe.num_classes, self._predict, device, names=self.classes if detailed else None)

    # ---- For people

    def show_settings(self) -> str:
        recipe, gate = self.recipe, self.recipe.settings()['gate']
        details = [f'images within {max(recipe.image_scale)} x {min(recipe.image_scale)}']
        details += ['resized to multiples of 32'] if recipe.align_resize else []
        details += [f'windows of {recipe.crop_size}'] if recipe.test_mode == 'slide' else []
        details += ['mirrored too'] if recipe.test_flip else []
        details += [f'at {len(recipe.test_scales)} scales'] if len(recipe.test_scales) > 1 else []
        return f'{recipe.name} ({recipe.model}{f", {gate} gate" if gate else ""}), {", ".join(details)}'

    def show_batch(self, batch: SegmentationBatch) -> Image.Image:
        return pictures.draw_batch_of_labels(batch.images, batch.labels, mean=self.recipe.mean, std=self.recipe.std,
                                             colors=colors_of(self.recipe.num_classes))

    def prepare(self, image: Picture) -> ade20k.Sample:
        with refusing_bad_images():
            pixels = decode_upright(image)
        return {'views': self._transform.views(pixels), 'labels': np.empty((0, 0), np.uint8),
                'original_size': pixels.shape[:2]}

    @torch.inference_mode()
    def predict(self, model: nn.Module, samples: Sequence[ade20k.Sample]) -> list[Tensor]:
        """The class of each pixel of the upright images, int64 [H, W] on the CPU."""
        batches = [self.finish(self.collate([sample]), next(model.parameters()).device, None) for sample in samples]
        return [self._predict(model, batch)[0].cpu() for batch in batches]

    def to_json(self, result: Tensor, *, count: int = 5) -> list[dict[str, Any]]:
        """The classes that take up most of the image, with their shares of its pixels."""
        numbers, pixels = result.unique(return_counts=True)
        order = pixels.argsort(descending=True, stable=True)[:count].tolist()
        return [{'class': int(numbers[i]), 'name': self.classes[int(numbers[i])],
                 'share': int(pixels[i]) / result.numel()} for i in order]

    def to_text(self, result: Tensor, *, count: int = 5) -> list[str]:
        return [f'{100 * entry["share"]:8.2f} %  {entry["name"]}' for entry in self.to_json(result, count=count)]

    def draw(self, image: Image.Image, result: Tensor, *, count: int = 10) -> Image.Image:
        """The image below the colours of its classes, and beside it the names of the largest."""
        colors = colors_of(len(self.classes))
        legend = [(f'{entry["name"]} {100 * entry["share"]:.0f} %', colors[entry['class']])
                  for entry in self.to_json(result, count=count)]
        return pictures.draw_labels(image, result.numpy(), colors, legend)

    def label_picture(self, result: Tensor) -> Image.Image:
        picture = Image.fromarray(result.numpy().astype(np.uint8), 'P')
        picture.putpalette([level for color in colors_of(len(self.classes)) for level in color])
        return picture


def colors_of(count: int) -> list[tuple[int, int, int]]:
    """A colour for each class: ADE20K's for its 150, otherwise colours that are far from one another's."""
    if count == len(ade20k_classes.COLORS):
        return ade20k_classes.COLORS
    return pictures.distinct_colors(count)


class MeanIoU:
    """The mean IoU and the accuracies over a data set that the ranks share out, from one matrix of counted pixels.

    All pixels of the set are counted at the images' original sizes, in whole numbers: the result does not depend on the
    number of ranks or on the order. As in the original, a class that is predicted and nowhere in the labels has an IoU
    of 0, which counts in `miou`, and no accuracy, so that it does not count in `macc`.

    `result` gives, by model, 'miou', 'macc' and 'pixel_acc' in %, 'count', and with names 'classes'.
    """

    def __init__(self, num_classes: int, predict: Callable[[nn.Module, SegmentationBatch], list[Tensor]],
                 device: torch.device, *, names: Sequence[str] | None = None):
        """
        Args:
            predict: gives the labels of a batch's images.
            names: of the classes, where values by class are wanted; [] where they have none.
        """
        self._num_classes, self._predict, self._device, self._names = num_classes, predict, device, names
        self._seen = 0
        self._pixels: dict[str, Tensor] = {}  # by model, int64 [true * num_classes + found]

    def _of(self, model: str) -> Tensor:
        return self._pixels.setdefault(
            model, torch.zeros(self._num_classes**2, dtype=torch.int64, device=self._device))

    def update(self, models: dict[str, nn.Module], batch: SegmentationBatch) -> None:
        for name, model in models.items():
            for truth, found in zip(batch.labels, self._predict(model, batch), strict=True):
                self._of(name).add_(count_pixels(truth.to(self._device), found, self._num_classes))
        self._seen += len(batch)

    def result(self, models: Sequence[str]) -> dict[str, dict[str, Any]]:
        results = {}
        for model in models:  # also where this rank had no image: all ranks take part in the exchange
            packed = torch.cat([self._of(model), torch.tensor([self._seen], device=self._device)])
            if dist.is_initialized():
                dist.all_reduce(packed)
            pixels = packed[:-1].view(self._num_classes, -1).cpu()
            results[model] = summarise(pixels, self._names) | {'count': int(packed[-1])}
        return results


def count_pixels(truth: Tensor, found: Tensor, num_classes: int) -> Tensor:
    """How many pixels of a true class got a label, int64 [num_classes ** 2], the true class first.

    Args:
        truth: [H, W]; IGNORED is not counted.
        found: [H, W].
    """
    pairs = truth.long() * num_classes + found
    # What is not counted has a place of its own behind: picking the others out would wait for the device
    pairs = torch.where(truth == IGNORED, num_classes**2, pairs)
    return torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)[:-1]


def summarise(pixels: Tensor, names: Sequence[str] | None) -> dict[str, Any]:
    """The values, %, of the pixels [true, found].

    Raises:
        UserError: where no pixel has a label.
    """
    if not pixels.sum():
        raise UserError('no pixel of the test images has a class; check --ignore_label and --reduce_zero_label')
    right, true, found = pixels.diagonal().double(), pixels.sum(1).double(), pixels.sum(0).double()
    iou, accuracy = 100 * right / (true + found - right), 100 * right / true  # nan where there is nothing
    result: dict[str, Any] = {'miou': iou.nanmean().item(), 'macc': accuracy.nanmean().item(),
              'pixel_acc': (100 * right.sum() / true.sum()).item()}
    if names is not None:
        rows = zip(true.long().tolist(), iou.tolist(), accuracy.tolist(), strict=True)
        result['classes'] = [{'class': i, 'name': names[i] if i < len(names) else str(i), 'pixels': count,
                              'iou': None if math.isnan(x) else x, 'accuracy': None if math.isnan(y) else y}
                             for i, (count, x, y) in enumerate(rows)]
    return result
