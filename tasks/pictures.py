"""Pictures of batches, results and predictions, for TensorBoard, Weights & Biases and predict.py."""
import colorsys
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def visible(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalised images [B, 3, H, W] as their values in 0..1, on the CPU."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    return (images.cpu() * scale + shift).clamp(0, 1)


def draw_images(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The first 32 of a batch of normalised images [B, 3, H, W], eight in a row."""
    return to_pil_image(make_grid(visible(images[:32], mean, std), nrow=8))


def draw_boxes(image: Image.Image, boxes: Any, names: Sequence[str] | None = None) -> Image.Image:
    """An image with boxes [n, 4] (x1, y1, x2, y2): those of the ground truth blue, those with names orange."""
    pixels, boxes = pil_to_tensor(image.convert('RGB')), torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    if not len(boxes):
        return image
    return to_pil_image(draw_bounding_boxes(pixels, boxes, list(names) if names else None,
                                            colors=ORANGE if names else BLUE, width=2))


def draw_masks(image: Image.Image, masks: torch.Tensor) -> Image.Image:
    """An image below masks, bool [n, h, w], half of each, every one in a colour of its own."""
    return to_pil_image(draw_segmentation_masks(pil_to_tensor(image.convert('RGB')), masks, alpha=0.5,
                                                colors=distinct_colors(len(masks))))


def draw_batch_of_boxes(images: torch.Tensor, targets: Sequence[dict[str, Any]], *, mean: Sequence[float],
                        std: Sequence[float], names: Sequence[str]) -> Image.Image:
    """The first eight of a batch of normalised images [B, 3, H, W] with their ground truth, four in a row."""
    drawn = []
    for image, target in zip(visible(images[:8], mean, std), targets, strict=False):
        labels = [names[label] if names else str(label) for label in target['labels'].tolist()]
        picture = draw_boxes(to_pil_image(image), target['boxes'].cpu(), labels)
        drawn.append(pil_to_tensor(picture))
    return to_pil_image(make_grid(drawn, nrow=4))


def draw_bars(image: Image.Image, bars: Sequence[tuple[str, float]]) -> Image.Image:
    """An image above its classes and their probabilities (name, 0..1) as bars, at least 320 pixels wide."""
    font, line = ImageFont.load_default(14), 22
    width = max(320, image.width)
    picture = Image.new('RGB', (width, image.height + line * len(bars) + 6), 'white')
    picture.paste(image.convert('RGB'), ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(picture)
    for row, (name, probability) in enumerate(bars):
        top = image.height + 6 + row * line
        draw.rectangle((0, top, max(1, round(probability * width)), top + line - 4), fill=(189, 215, 238))
        draw.text((6, top + line / 2 - 2), f'{100 * probability:6.2f} %  {name}', font=font, anchor='lm', fill='black')
    return picture


def draw_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Image.Image:
    """A confusion matrix, rows for the true classes: blue what is right, orange what is wrong, deeper for more.

    Args:
        matrix: counts, [true][predicted].
        classes: their names; may be empty.
    """
    counts = np.array(matrix)
    size = len(counts)
    cell, font = (40, ImageFont.load_default(14)) if size <= 20 else (12, ImageFont.load_default(10))
    share = counts / counts.sum(1, keepdims=True).clip(1)
    depth = np.sqrt(share)[..., None]  # a mistake in a hundred is to be seen
    colour = np.where(np.eye(size, dtype=bool)[..., None], BLUE, ORANGE)
    pixels = (255 - depth * (255 - colour)).astype(np.uint8)
    cells = Image.fromarray(pixels.repeat(cell, 0).repeat(cell, 1))
    if size <= 20:
        draw = ImageDraw.Draw(cells)
        for row, column in zip(*counts.nonzero(), strict=True):
            draw.text(((column + 0.5) * cell, (row + 0.5) * cell), str(counts[row, column]), font=font, anchor='mm',
                      fill='white' if depth[row, column, 0] > 0.7 else 'black')
    names = [name[:20] for name in classes] or [str(label) for label in range(size)]
    width = 10 + max(int(font.getlength(name)) for name in names)
    labels = Image.new('RGB', (width, size * cell), 'white')
    for row, name in enumerate(names):
        ImageDraw.Draw(labels).text((width - 5, (row + 0.5) * cell), name, font=font, anchor='rm', fill='black')
    head, caption, large = 24, 'rows: true class; columns: predicted', ImageFont.load_default(13)
    whole = max(width + size * cell, 10 + int(large.getlength(caption)))
    picture = Image.new('RGB', (whole, head + size * cell + width), 'white')
    ImageDraw.Draw(picture).text((5, head / 2), caption, anchor='lm', fill='black', font=large)
    picture.paste(labels, (0, head))
    picture.paste(cells, (width, head))
    picture.paste(labels.rotate(90, expand=True), (width, head + size * cell))
    return picture


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """So many colours far from one another's: the hue goes on by the golden ratio, every third is lighter or darker."""
    colors = []
    for i in range(count):
        red, green, blue = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.6, 0.9)[i % 3], (0.95, 0.9, 0.6)[i % 3])
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def overlay(pixels: np.ndarray, labels: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """An image below the colours of its labels, half of each; where a label has no colour, the image alone.

    Args:
        pixels: uint8 [H, W, 3].
        labels: integers [H, W].
        colors: by label.
    """
    known = labels < len(colors)
    painted = np.array(colors, np.uint8)[np.where(known, labels, 0)]
    return np.where(known[..., None], ((pixels.astype(np.uint16) + painted + 1) // 2).astype(np.uint8), pixels)


def draw_labels(image: Image.Image, labels: np.ndarray, colors: Sequence[tuple[int, int, int]],
                legend: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """An image below the colours of its labels, and to its right the legend (name, colour)."""
    pixels = np.asarray(image.convert('RGB'))
    font, line = ImageFont.load_default(14), 22
    names = [name for name, _ in legend]
    width = 40 + max((math.ceil(font.getlength(name)) for name in names), default=0)
    canvas = Image.new('RGB', (pixels.shape[1] + width, max(pixels.shape[0], line * len(legend) + 8)), 'white')
    canvas.paste(Image.fromarray(overlay(pixels, labels, colors)), (0, 0))
    draw, left = ImageDraw.Draw(canvas), pixels.shape[1] + 8
    for row, (name, color) in enumerate(legend):
        top = 4 + line * row
        draw.rectangle((left, top + 3, left + 14, top + 17), color)
        draw.text((left + 20, top), name, 'black', font)
    return canvas


def draw_batch_of_labels(images: torch.Tensor, labels: Iterable[torch.Tensor], *, mean: Sequence[float],
                         std: Sequence[float], colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """The first eight of a batch of normalised images [B, 3, H, W] below the colours of their labels, four in a row."""
    drawn = []
    for image, label in zip(visible(images[:8], mean, std), labels, strict=False):
        pixels = np.asarray(to_pil_image(image))
        drawn.append(torch.from_numpy(overlay(pixels, label.cpu().numpy(), colors)).permute(2, 0, 1))
    return to_pil_image(make_grid(drawn, nrow=4))
