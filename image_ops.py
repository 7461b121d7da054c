"""From an image file to augmented pixels: decoding, random crop, RandAugment, test crop, random erasing's boxes.

Everything random is drawn by timm's and torchvision's own code, in their order, from one seed an image.
"""
import io
import math
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from recipes import Recipe


def decode(image: Any) -> Image.Image:
    """An undecoded file, an array [H, W, 3] or a PIL image as an RGB image. Raises OSError and ValueError."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    if image.mode.startswith('I'):  # 16 bits a pixel, which convert would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert('RGB')


def seed_image(seed: int) -> None:
    """Seeds the generators from which augmentation draws: Python's, NumPy's and torch's on the CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


class TrainTransform:
    """The recipe's augmentation up to uint8 pixels."""

    def __init__(self, recipe: Recipe):
        self.size = recipe.input_size
        self._transform = create_transform(
            recipe.input_size, is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip,
            vflip=recipe.vflip, color_jitter=recipe.color_jitter, auto_augment=recipe.aa,
            interpolation=recipe.train_interpolation, mean=recipe.mean, std=recipe.std, use_prefetcher=True)

    def __call__(self, image: Any) -> np.ndarray:
        """uint8 [H, W, 3] of an image that `decode` takes. Draws from the generators that `seed_image` seeds."""
        return self._transform(decode(image)).permute(1, 2, 0).numpy()


class TestTransform:
    """timm's test transform with the recipe's settings, up to uint8 pixels."""

    def __init__(self, recipe: Recipe):
        self.size = recipe.test_size
        self._transform = create_transform(
            recipe.test_size, interpolation=recipe.interpolation, crop_pct=recipe.crop_pct, crop_mode=recipe.crop_mode,
            mean=recipe.mean, std=recipe.std, use_prefetcher=True)

    def __call__(self, image: Any) -> np.ndarray:
        """uint8 [H, W, 3] of an image that `decode` takes."""
        return self._transform(decode(image)).permute(1, 2, 0).numpy()


def erasing_boxes(recipe: Recipe) -> np.ndarray:
    """Boxes to erase in one image, int32 [recount, 4]: top, left, height, width; height 0 erases nothing.

    Random Erasing (arXiv 1708.04896) with timm's areas (2 % to a third, shared among the boxes) and aspect ratios (0.3
    to 3.3), drawn here from the image's seed since the erasing itself happens on the device.
    """
    boxes, side = np.zeros((recipe.recount, 4), np.int32), recipe.input_size
    if random.random() >= recipe.reprob:
        return boxes
    count = random.randint(1, recipe.recount)
    for box in boxes[:count]:
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * side * side / count
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < side and width < side:
                box[:] = random.randint(0, side - height), random.randint(0, side - width), height, width
                break
    return boxes
