"""Pixels of detection and segmentation: upright decoding, resizing as OpenCV does it, batches of unequal images.

Images are uint8 [H, W, 3] until the device normalises them. A batch is as large as its largest image, padded to whole
strides of the network; the padding is 0 after the normalisation, as in the authors' code.
"""
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline import memory
from pipeline.augmentation import decode, kernels, normalise

STRIDE = 32  # of the network's last stage
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def _turn(image: bytes) -> Image.Transpose | None:
    """What makes an image file upright by its EXIF data, which most have not: then the file is not opened."""
    # Of a JPEG one mark is enough; to look for one takes 0.05 ms of a photograph's 2
    marks = (b'Exif\0\0',) if image.startswith(b'\xff\xd8') else (b'Exif\0\0', b'eXIf', b'EXIF', b'II*\0', b'MM\0*')
    if not any(mark in image for mark in marks):
        return None
    return TURNS.get(Image.open(io.BytesIO(image)).getexif().get(ORIENTATION, 1))


def decode_upright(image: Any) -> np.ndarray:
    """RGB pixels, uint8 [H, W, 3], turned as EXIF says: boxes and labels belong to the image as it is looked at.

    Args:
        image: as `augmentation.decode` takes it. Raises what that raises.
    """
    turn = _turn(image) if isinstance(image, bytes) else None
    pixels = decode(image)
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def upright_size(image: bytes) -> tuple[int, int]:
    """Height and width of an image file, turned as EXIF says, from its header. Raises what Pillow raises."""
    width, height = Image.open(io.BytesIO(image)).size
    turned = _turn(image)
    return (width, height) if turned is not None and turned not in (
        TURNS[2], TURNS[3], TURNS[4]) else (height, width)


def fit(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image that keeps its shape and is as large as the scale allows.

    Args:
        size: height and width of the image.
        scale: bounds of the longer and of the shorter side, in any order.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def factors(old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """By which boxes x1, y1, x2, y2 follow from one (height, width) to another, float32 [4]."""
    return np.array([new[1] / old[1], new[0] / old[0]] * 2, np.float32)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear and without antialiasing, as OpenCV resizes: within one level of it. uint8 [H, W, 3] to [*size, 3].

    torch has it in vector instructions; Pillow's filter reaches further where an image gets smaller.
    """
    if pixels.shape[:2] == tuple(size):
        return pixels
    rows = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    resized = F.interpolate(rows, size=tuple(size), mode='bilinear', align_corners=False)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To the nearest as OpenCV takes it, [H, W] to [*size]: the pixel in which an output's corner lies, not its middle.
    """
    rows, columns = (np.minimum(np.arange(new) * (1 / (new / old)), old - 1).astype(np.intp)
                     for old, new in zip(labels.shape, size, strict=True))
    return np.take(np.take(labels, rows, 0), columns, 1)


def relabel(numbers: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The entry of each number, [H, W] of integers from 0, in a table, uint8 [65536]; larger ones take the last."""
    if kernels is None or numbers.dtype not in (np.uint8, np.uint16):
        return np.take(table, numbers, mode='clip')
    return kernels.relabel(np.ascontiguousarray(numbers), table)


def count_labels(labels: np.ndarray) -> np.ndarray:
    """How often each label occurs, uint8 [H, W] to int64 [256]."""
    return np.bincount(labels.ravel(), minlength=256) if kernels is None else kernels.count(labels)


def mirror(pixels: np.ndarray) -> np.ndarray:
    """Left and right exchanged, [H, W] or [H, W, 3]."""
    if kernels is None or pixels.ndim == 2:
        return np.ascontiguousarray(pixels[:, ::-1])
    return kernels.mirror(np.ascontiguousarray(pixels))


def recolor(pixels: np.ndarray, *, before: np.ndarray, saturation: float, hue: int, after: np.ndarray) -> np.ndarray:
    """Levels, saturation and hue changed, as OpenCV's hue, saturation and value in 8 bits do it. uint8 [H, W, 3].

    Without numba Pillow does it, whose hues are others of 8 bits: a few levels apart.

    Args:
        before: uint8 [256], the level of each level, first of all; after: last of all.
        saturation: its factor.
        hue: added to it, in steps of which a circle has 180.
    """
    if kernels is not None:
        return kernels.recolor(np.ascontiguousarray(pixels), before, saturation, hue, after)
    pixels = before[pixels]
    if saturation != 1 or hue:
        colors = np.asarray(Image.fromarray(pixels).convert('HSV')).astype(np.int32)
        colors[..., 0] = (colors[..., 0] + round(hue * 256 / 180)) % 256
        colors[..., 1] = np.minimum(colors[..., 1] * saturation, 255)
        pixels = np.asarray(Image.fromarray(colors.astype(np.uint8), 'HSV').convert('RGB'))
    return after[pixels]


def padded(sizes: Sequence[tuple[int, int]], stride: int = STRIDE) -> tuple[int, int]:
    """Height and width of a batch of images of these sizes: of the largest, rounded up to whole strides."""
    height, width = (-(-max(sides) // stride) * stride for sides in zip(*sizes, strict=True))
    return height, width


def stack(images: Sequence[np.ndarray], size: tuple[int, int], fill: int = 0) -> Tensor:
    """Images or label maps of unequal sizes in one tensor, uint8 [B, *size, ...], each in the upper left corner."""
    batch = memory.empty((len(images), *size, *images[0].shape[2:]), torch.uint8)
    for target, image in zip(batch.numpy(), images, strict=True):
        height, width = image.shape[:2]
        target[:height, :width] = image
        target[height:] = fill
        target[:height, width:] = fill
    return batch


def normalise_padded(images: Tensor, sizes: Sequence[tuple[int, int]], *, mean: Sequence[float],
                     std: Sequence[float]) -> Tensor:
    """A batch as the model's input: normalised, and 0 in the padding.

    Args:
        images: uint8 [B, H, W, 3], on the device.
        sizes: height and width of each image without its padding; numbers of the host, so that nothing waits.
        mean: of values in 0..1.
        std: of values in 0..1.

    Returns:
        float32 [B, 3, H, W], in channels-last memory.
    """
    means, stds = (torch.tensor(values, device=images.device) * 255 for values in (mean, std))
    pixels = normalise(images, means, 1 / stds)
    for image, (rows, columns) in zip(pixels, sizes, strict=True):
        image[:, rows:] = 0
        image[:, :, columns:] = 0
    return pixels
