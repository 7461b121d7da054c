"""Images with a label for each pixel: ADE20K's folder and one's own, and the transforms that take labels with them.

Labels are PNGs of class numbers, of a palette or grey, in 1 to 16 bits. What reaches the model is uint8: a class, or
255 where a pixel counts for nothing.
"""
import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from pipeline import ade20k_classes, dense, labels
from pipeline.augmentation import TINY, Picture
from pipeline.coco import DIGITS
from pipeline.files import FOLDERS, Split, find_images
from pipeline.labels import BadLabel
from recipes import Run
from recipes.ade20k import Segmentation as Recipe
from utils import UserError, reason_of

IGNORED, UNKNOWN = 255, 254  # labels that are no class: left out, and none that the data may have
MAX_CLASSES = UNKNOWN
LABEL_FOLDERS = ('annotations', 'labels')  # ADE20K's and one's own
NAMES = 'classes.txt'  # a class a line, beside the folders
LOOKED_AT = 16  # label files, at the beginning of a run


# ---- Label files ----------------------------------------------------------------------------------------------------

@functools.lru_cache
def label_table(num_classes: int | None, *, reduce_zero_label: bool, ignore_label: int | None,
                order: tuple[int, ...] | None = None) -> np.ndarray:
    """The label of each number that a file may hold, uint8 [65536].

    Args:
        num_classes: of the model; None: all numbers that fit.
        reduce_zero_label: 0 is left out, and the others count from 1, as in ADE20K.
        ignore_label: a number that is left out beside 255.
        order: the model's class of each of the file's.
    """
    count = MAX_CLASSES if num_classes is None else num_classes
    classes = np.arange(count) if order is None else np.array(order)
    table = np.full(65536, UNKNOWN, np.uint8)
    table[:len(classes)] = classes
    if reduce_zero_label:
        table = np.concatenate([np.array([IGNORED], np.uint8), table[:-1]])
    table[[IGNORED] if ignore_label is None else [IGNORED, ignore_label]] = IGNORED
    return table


@dataclass
class LabelFile:
    """An undecoded label file.

    Attributes:
        path: for messages.
        content: the PNG.
        reduce_zero_label, ignore_label, order: as of `label_table`.
    """

    path: str
    content: bytes
    reduce_zero_label: bool = False
    ignore_label: int | None = None
    order: tuple[int, ...] | None = None

    def numbers(self) -> np.ndarray:
        """The numbers in the file, [H, W]. Raises BadLabel where there are none."""
        try:
            image = Image.open(io.BytesIO(self.content))
            kind, mode, numbers = image.format, image.mode, np.asarray(image)
        except Exception as error:  # anything that Pillow raises
            raise BadLabel(f'has labels that cannot be read, {self.path} ({reason_of(error)}): write them again'
                           ) from None
        if kind != 'PNG':
            raise BadLabel(f'has labels in a file of the form {kind}, {self.path}: write PNGs, which keep each number')
        if numbers.ndim != 2:
            raise BadLabel(f'has labels in colours ({mode}), {self.path}: write the number of its class for each pixel '
                           'as a PNG of one channel, grey or with a palette')
        depth, color = self.content[24], self.content[25]
        if color == 0 and depth in (2, 4):  # grey, which Pillow stretches to 0..255
            return numbers // (255 // (2**depth - 1))
        return numbers.astype(np.uint8) if numbers.dtype == bool else numbers

    def decode(self, num_classes: int | None, size: tuple[int, int]) -> np.ndarray:
        """The label of each pixel, uint8 [H, W].

        Args:
            num_classes: of the model, where it is known.
            size: height and width of the image.

        Raises:
            BadLabel: for a number that is no class, and for labels of another size.
        """
        numbers = self.numbers()
        if numbers.shape != size:
            raise BadLabel(f'is {size[1]} x {size[0]} pixels, and its labels {self.path} are {numbers.shape[1]} x '
                           f'{numbers.shape[0]}: make both of one size')
        table = label_table(num_classes, reduce_zero_label=self.reduce_zero_label, ignore_label=self.ignore_label,
                            order=self.order)
        found = dense.relabel(numbers, table)
        if (found == UNKNOWN).any():
            first = int(self.reduce_zero_label)
            raise BadLabel(f'has the label {numbers[found == UNKNOWN].max()} in {self.path}, but the classes are '
                           f'{first} to {first + (num_classes or MAX_CLASSES) - 1}: give --num_classes, the number '
                           'that means nothing by --ignore_label, or --reduce_zero_label where they count from 1')
        return found


# ---- The source -----------------------------------------------------------------------------------------------------

class LabelledImages:
    """The images of a folder with a label file each, of the same name with the ending .png.

    Attributes:
        root: folder of the images; label_root: of the labels.
        classes: names by label, empty where none are known.
        groups: int64 [n], in an evaluation: a batch is one image, whose size is its own.
    """

    in_memory = False
    class_map = None

    def __init__(self, root: Path, label_root: Path, *, classes: Sequence[str] = (), num_classes: int | None = None,
                 training: bool, reduce_zero_label: bool = False, ignore_label: int | None = None):
        """
        Args:
            num_classes: where no names are known.
            reduce_zero_label: as of `label_table`.
            ignore_label: as of `label_table`.

        Raises:
            UserError: where there is no image, or one without labels.
        """
        self.root, self.label_root, self.classes = root, label_root, list(classes)
        self.reduce_zero_label, self.ignore_label = reduce_zero_label, ignore_label
        self._num_classes = len(self.classes) or num_classes
        images, found = (find_images(str(folder)) for folder in (root, label_root))
        if not images:
            raise UserError(f'{root} holds no image; check --data_path')
        label_files = {os.path.relpath(path, label_root): path for path in found}
        stems = {os.path.splitext(name)[0]: name for name in label_files if not name.lower().endswith('.png')}
        names = [os.path.relpath(path, root) for path in images]
        pairs = [(name, f'{os.path.splitext(name)[0]}.png') for name in names]
        if missing := [(name, label) for name, label in pairs if label not in label_files]:
            name, label = missing[0]
            other = stems.get(os.path.splitext(name)[0])
            why = (f'{label_root / other} is no PNG, and a lossy form changes numbers: write PNGs' if other else
                   f'{label_root / label} is missing: add it, or take the image away')
            raise UserError(f'{len(missing):,} of the {len(names):,} images of {root} have no labels; {why}')
        # One array each, which the workers share
        self._images, self._labels = (np.array([os.fsencode(pair[place]) for pair in pairs]) for place in (0, 1))
        self._order: tuple[int, ...] | None = None
        if not training:
            self.groups = np.arange(len(pairs))

    def __len__(self) -> int:
        return len(self._images)

    def relabel(self, classes: Sequence[str]) -> None:
        """Takes the labels from the names' positions in a list that has them all."""
        places = labels.find(self.classes, classes)
        self._order = tuple(places if self._order is None else (places[place] for place in self._order))
        self.classes = list(classes)

    def name(self, index: int) -> str:
        """Path of an image."""
        return f'{self.root}/{os.fsdecode(self._images[index])}'

    def read(self, index: int) -> tuple[bytes, LabelFile]:
        """The undecoded image and its labels. Raises OSError where they cannot be read."""
        paths = [os.fsencode(folder) + b'/' + bytes(names[index]) for folder, names in (
            (self.root, self._images), (self.label_root, self._labels))]
        contents = []
        for path in paths:
            with open(path, 'rb', buffering=0) as file:
                contents.append(file.read())
        return contents[0], LabelFile(os.fsdecode(paths[1]), contents[1], self.reduce_zero_label, self.ignore_label,
                                      self._order)

    @property
    def shown(self) -> str:
        """The source in messages."""
        return str(self.root)

    def facts(self) -> dict[str, Any]:
        """What there is, for a report."""
        return {'path': str(self.root), 'labels': str(self.label_root), 'images': len(self),
                'classes': self._num_classes}

    def check(self, index: int) -> None:
        """Decodes an image and its labels. Raises BadLabel for labels that do not fit, else anything."""
        image, file = self.read(index)
        file.decode(self._num_classes, dense.decode_upright(image).shape[:2])


def find_folders(root: Path, split: Split) -> tuple[Path, Path]:
    """The folders of the images and of the labels of one half of a data set. Raises UserError."""
    for name in FOLDERS[split]:
        if (root / 'images' / name).is_dir():
            for kind in LABEL_FOLDERS:
                if (root / kind / name).is_dir():
                    return root / 'images' / name, root / kind / name
            wanted = ' or '.join(f'{kind}/{name}/' for kind in LABEL_FOLDERS)
            raise UserError(f'{root} has images/{name}/, but no {wanted}; put the label PNGs there')
    if not root.is_dir():
        raise UserError(f'{root} is no folder; give --data_path the folder with images/ and annotations/ (ADE20K) or '
                        'labels/')
    raise UserError(f'{root} has none of {", ".join(f"images/{name}/" for name in FOLDERS[split])}; give --data_path '
                    'ADEChallengeData2016, or a folder with images/train, labels/train, images/val, labels/val')


def read_names(root: Path) -> list[str]:
    """The class names in classes.txt, a line each; none where the file is missing. Raises UserError."""
    try:
        lines = [line.strip() for line in (root / NAMES).read_text(encoding='utf-8-sig').splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f'{root / NAMES} cannot be read ({reason_of(error)}); write a class name a line') from None
    names = [line for line in lines if line]
    if len(set(map(labels.normal, names))) < len(names):
        raise UserError(f'{root / NAMES} names a class twice; give each class a line of its own')
    return names


def open_ade20k(recipe: Recipe, run: Run, split: Split) -> LabelledImages:
    """The images of one half of the recipe's data set, of which some label files are looked at.

    Unless the recipe says otherwise, labels count from 1 in a folder of ADE20K's shape, and from 0 in one's own.

    Raises:
        UserError: where there is nothing, or what is there is wrong, with the path and the cure.
    """
    if recipe.data_set == 'digits_ade':
        from pipeline import digits_coco
        root, names = digits_coco.root(train=DIGITS), list(digits_coco.LABELS[1:])
    else:
        root = Path(run.eval_data_path or run.data_path) if split == 'val' else Path(run.data_path)
        names = read_names(root)
    if max(len(names), recipe.num_classes or 0) > MAX_CLASSES:
        raise UserError(f'{max(len(names), recipe.num_classes or 0)} classes are more than the {MAX_CLASSES} that this '
                        'program tells apart; merge some')
    images, label_files = find_folders(root, split)
    of_ade20k, reduce = label_files.parent.name == LABEL_FOLDERS[0], recipe.reduce_zero_label
    if of_ade20k and not names and recipe.num_classes in (None, len(ade20k_classes.NAMES)):
        names = ade20k_classes.NAMES  # ADE20K's folder has no list that we read
    source = LabelledImages(
        images, label_files, classes=names, num_classes=recipe.num_classes, training=split == 'train',
        reduce_zero_label=of_ade20k if reduce is None else reduce,
        ignore_label=recipe.ignore_label)
    look(source)
    return source


def look(source: LabelledImages) -> None:
    """Reads a few label files, so that what is wrong with all is told before a run begins. Raises UserError."""
    seen: set[int] = set()
    for index in range(0, len(source), max(1, len(source) // LOOKED_AT)):
        try:
            seen |= set(np.unique(source.read(index)[1].numbers()).tolist())
        except BadLabel as error:
            raise UserError(f'{source.name(index)} {error}') from None
    ignored = {IGNORED, source.ignore_label} | ({0} if source.reduce_zero_label else set())
    if seen == {0, IGNORED}:
        raise UserError(f'{source.label_root}: all labels are 0 or 255, and 255 counts for nothing: where it is a '
                        'class, as in masks, write 1 for it')
    if seen <= ignored:
        raise UserError(f'{source.label_root}: all labels are {" or ".join(map(str, sorted(seen)))}, which counts for '
                        'nothing; check --ignore_label and --reduce_zero_label')


# ---- Transforms -----------------------------------------------------------------------------------------------------

def align(size: tuple[int, int], stride: int = dense.STRIDE) -> tuple[int, int]:
    """Height and width rounded up to whole strides."""
    return dense.padded([size], stride)


def levels(factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """The level of each level after a factor and a shift, uint8 [256]: cut off, not rounded."""
    return np.clip(np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift), 0, 255).astype(np.uint8)


def distort(pixels: np.ndarray, rng: np.random.Generator, rate: float = 0.5) -> np.ndarray:
    """Random brightness, contrast, saturation and hue, uint8 [H, W, 3].

    By the authors' ranges: +-32 levels, factors of 0.5 to 1.5, +-18 of 180 steps of the hue. The contrast comes before
    or after the colours.

    Args:
        rate: probability of each.
    """
    before = levels(shift=rng.uniform(-32, 32) if rng.random() < rate else 0.0)
    contrast_first = rng.random() < 0.5
    contrast = levels(rng.uniform(0.5, 1.5) if rng.random() < rate else 1.0)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < rate else 1.0
    hue = int(rng.integers(-18, 18)) if rng.random() < rate else 0
    return dense.recolor(pixels, before=contrast[before] if contrast_first else before, saturation=saturation, hue=hue,
                         after=levels() if contrast_first else contrast)


class Sample(TypedDict, total=False):
    """What a worker makes of an image and its labels."""

    labels: np.ndarray  # uint8 [h, w]; in a test of the whole image, [H, W]
    original_size: tuple[int, int]  # (H, W)
    pixels: np.ndarray  # in training: uint8 [h, w, 3], unpadded
    size: tuple[int, int]  # in training: (h, w)
    views: list[np.ndarray]  # in a test: the pixels at each scale


class Transform:
    """An image and its labels as the network takes them."""

    def __init__(self, scale: tuple[int, int], *, crop: int, ratios: tuple[float, float] = (0.5, 2.0),
                 max_class: float = 0.75, hflip: float = 0.5, photometric: float = 0.5, aligned: bool = True,
                 test_ratios: Sequence[float] = (1.0,)):
        """
        Args:
            scale: longest and shortest side within which an image is resized.
            crop: side of the training crop.
            ratios: training: by which the scale is multiplied, uniformly between the two.
            max_class: training: a crop with a larger share of one class is drawn again, ten times at most; 1 is off.
            hflip: training: probability of mirroring.
            photometric: training: probability of each part of `distort`.
            aligned: test: resized a second time, up to whole strides, as the authors do.
            test_ratios: test: by which the scale is multiplied, for a view each.
        """
        self.scale, self.crop, self.ratios, self.max_class = scale, crop, ratios, max_class
        self.hflip, self.photometric, self.aligned, self.test_ratios = hflip, photometric, aligned, test_ratios
        # Compiles them, before the workers start
        distort(dense.mirror(TINY), np.random.default_rng(0), 1.0)
        tiny = dense.relabel(TINY[..., 0], label_table(None, reduce_zero_label=False, ignore_label=None))
        for labels_of in (tiny, tiny[:, 1:]):  # a whole image, and a part of one
            dense.count_labels(labels_of)

    def __call__(self, item: tuple[Picture, LabelFile], seed: int | None, *, num_classes: int | None) -> Sample:
        """The sample of an image as `LabelledImages.read` gives it.

        Args:
            seed: from which all is drawn; None is the test's.
            num_classes: of the model.

        Raises:
            BadLabel: for a label that is no class, and for labels of another size than the image.
            Exception: anything, for an image that cannot be decoded.
        """
        image, file = item
        pixels = dense.decode_upright(image)
        original = pixels.shape[:2]
        found = file.decode(num_classes, original)
        if seed is None:
            return {'views': self.views(pixels), 'labels': found, 'original_size': original}
        pixels, found = self._augment(pixels, found, np.random.default_rng(seed))
        return {'pixels': pixels, 'labels': found, 'size': pixels.shape[:2], 'original_size': original}

    def views(self, pixels: np.ndarray) -> list[np.ndarray]:
        """A test image at each of the scales."""
        return [self.prepare(pixels, ratio) for ratio in self.test_ratios]

    def prepare(self, pixels: np.ndarray, ratio: float = 1.0) -> np.ndarray:
        """A test image, uint8 [h, w, 3], at the scale times a ratio."""
        size = dense.fit(pixels.shape[:2], self._scaled(ratio))
        pixels = dense.resize(pixels, size)
        return dense.resize(pixels, align(size)) if self.aligned else pixels

    def _scaled(self, ratio: float) -> tuple[int, int]:
        return int(self.scale[0] * ratio), int(self.scale[1] * ratio)

    def _augment(self, pixels: np.ndarray, found: np.ndarray,
                 rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        size = dense.fit(found.shape, self._scaled(rng.uniform(*self.ratios)))
        found = dense.resize_labels(found, size)
        top, left = self._draw_crop(found, rng)
        window = slice(top, top + self.crop), slice(left, left + self.crop)
        found, pixels = found[window], dense.resize(pixels, size)[window]
        if rng.random() < self.hflip:
            found, pixels = dense.mirror(found), dense.mirror(pixels)
        return distort(pixels, rng, self.photometric) if self.photometric else pixels, found

    def _draw_crop(self, found: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """Top and left of a crop in which no class has too large a share of what counts, if ten draws find one."""
        for attempt in range(11):
            top, left = (int(rng.integers(max(side - self.crop, 0) + 1)) for side in found.shape)
            if attempt == 10 or self.max_class >= 1:
                break
            counts = dense.count_labels(found[top:top + self.crop, left:left + self.crop])[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < self.max_class:
                break
        return top, left
