"""Handwritten digits on photographs: a made-up data set for demos and tests, as COCO's folder and as ADE20K's in one.

scikit-learn's digits are enlarged, inked in a colour that the place does not have, and laid on crops of photographs
that it and scikit-image bring, each digit above those before it. Whatever troubles a reader of COCO occurs: overlaps,
ids with gaps, images without objects, crowds, portraits, and masks as polygons and as both forms of run-length codes.
"""
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.files import Split, cache_folder
from pipeline.sources import Digits
from utils import UserError, derive_seed

CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # of the digits 0 to 9
# Of the label pictures: 0 is what ADE20K leaves out of training and metric, here the crowds, in which no digit is told
# from its neighbour. The mean IoU is then over the background and the digits
LABELS = ('ignored', 'background', *Digits.classes)
PHOTOGRAPHS = {'train': ('astronaut', 'coffee', 'stereo_motorcycle', 'immunohistochemistry', 'retina',
                         'hubble_deep_field', 'brick', 'camera', 'cell', 'clock', 'grass', 'gravel', 'moon',
                         'china.jpg', 'flower.jpg'),
               'val': ('chelsea', 'rocket', 'coins')}
ADE_FOLDERS = {'train': 'training', 'val': 'validation'}
LUMINANCE = np.array([0.299, 0.587, 0.114])
CONTRAST = 80  # of 255, between the ink and the mean of the photograph below it
VISIBLE = 0.75  # the part of each digit that is never covered, so that it can be told


def root(*, train: int = 1000) -> Path:
    """The folder of the whole set in the user's cache, which is written once for each version of this file.

    Args:
        train: images to train on.

    Raises:
        UserError: the folder cannot be written, or a package is missing.
    """
    version = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()
    folder = cache_folder() / f'digits_coco-{train}-{version}'
    if folder.is_dir():
        return folder
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(prefix=f'.{folder.name}-', dir=folder.parent)
        write(Path(beside), train=train)
        os.chmod(beside, 0o755)  # mkdtemp's folders are closed to others
        os.rename(beside, folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have come first
            raise UserError(f'{folder} cannot be written ({error}); give another cache folder in the environment '
                            'variable XDG_CACHE_HOME') from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def write(root: Path, *, train: int = 1000, val: int = 200, seed: int = 0) -> None:
    """Writes the set, a pure function of its arguments: equal bytes each time.

    COCO's reader finds `train2017/`, `val2017/` and `annotations/instances_*.json`; ADE20K's reader finds
    `images/{training,validation}/` and `annotations/{training,validation}/`, whose labels are positions in LABELS.

    Args:
        root: an empty folder, or one that does not exist yet.
        train, val: images of each half. The halves share neither a photograph nor a digit.
        seed: gives another set.

    Raises:
        UserError: a package of the demos is missing.
        OSError: the folder holds such a set, or the disk is full.
    """
    counts: dict[Split, int] = {'train': train, 'val': val}
    for split, count in counts.items():
        pictures, photographs, digits = root / f'{split}2017', _photographs(split), Digits(split)
        copies, labels = root / 'images' / ADE_FOLDERS[split], root / 'annotations' / ADE_FOLDERS[split]
        for folder in (pictures, copies, labels):
            folder.mkdir(parents=True)
        facts: dict[str, list] = {'images': [], 'annotations': [], 'categories': [
            {'id': number, 'name': name, 'supercategory': 'digit'}
            for number, name in zip(CATEGORY_IDS, digits.classes, strict=True)]}
        for index in tqdm(range(count), f'drawing {split} images of digits', unit=' images', disable=None):
            rng = np.random.default_rng(derive_seed('digits_coco', seed, split, index))
            scene = Scene(index, photographs, digits, rng)
            height, width = scene.owner.shape
            image = {'id': 100 + 3 * index, 'file_name': f'{100 + 3 * index:012d}.jpg', 'height': height,
                     'width': width}
            facts['images'].append(image)
            facts['annotations'] += scene.annotations(image['id'], first=1 + len(facts['annotations']))
            picture = pictures / image['file_name']
            Image.fromarray(scene.pixels.round().astype(np.uint8)).save(picture, quality=95)
            shutil.copyfile(picture, copies / picture.name)
            Image.fromarray(scene.label_map()).save((labels / picture.name).with_suffix('.png'))
        (root / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(facts, separators=(',', ':')))


def _photographs(split: Split) -> list[Image.Image]:
    try:
        import sklearn.datasets
        from skimage import data
    except ImportError as error:
        raise UserError(f"digits on photographs need scikit-learn and scikit-image ({error}): pip install -e '.[demo]'"
                        ) from None
    arrays = [sklearn.datasets.load_sample_image(name) if '.' in name else getattr(data, name)()
              for name in PHOTOGRAPHS[split]]
    return [Image.fromarray(array[0] if isinstance(array, tuple) else array).convert('RGB') for array in arrays]


class Scene:
    """A crop of a photograph with 4 to 10 digits, or none in one of 20; a crowd of one digit in one of 10.

    Attributes:
        pixels: float64 [h, w, 3], 0 to 255.
        owner: int64 [h, w], the object that is seen at a pixel, counted from 1; 0 is the photograph.
        objects: (digit, whether it is a crowd) of each object; the later lie above.
        areas: pixels of each owner, were nothing above it; the first counts none.
    """

    def __init__(self, index: int, photographs: Sequence[Image.Image], digits: Digits, rng: np.random.Generator):
        self._digits, self._rng = digits, rng
        short, long = int(rng.integers(128, 144)), int(rng.integers(144, 161))
        size = (short, long) if index % 3 == 2 else (long, short)  # width, height: one in three is a portrait
        self.pixels = np.asarray(self._crop(photographs[int(rng.integers(len(photographs)))], size), np.float64).copy()
        self.owner = np.zeros(self.pixels.shape[:2], np.int64)
        self.objects: list[tuple[int, bool]] = []
        self.areas = [0]
        if index % 20 == 13:
            return
        if index % 10 == 4:
            self._add_crowd()
        for _ in range(rng.integers(4, 11)):
            which = int(rng.integers(len(digits)))
            # From 16 to 64 pixels, as many between 16 and 32 as between 32 and 64
            self._add(which, side=round(16 * 4 ** rng.random()))

    def _crop(self, photograph: Image.Image, size: tuple[int, int]) -> Image.Image:
        """A part of the photograph, reduced by a factor of 1 to 1.8 (the smallest of them is 300 pixels high)."""
        factor = self._rng.uniform(1, 1.8)
        width, height = (round(side * factor) for side in size)
        left = int(self._rng.integers(photograph.width - width + 1))
        top = int(self._rng.integers(photograph.height - height + 1))
        part = photograph.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self._rng.random() < 0.5 else part

    def _glyph(self, which: int, side: int) -> np.ndarray:
        """A digit whose longer side is `side` pixels, as opacity [h, w] from 0 to 1, with an edge of about 2 pixels."""
        grey = self._digits.read(which)[0][..., 0]
        rows, columns = np.flatnonzero(grey.max(1) > 127), np.flatnonzero(grey.max(0) > 127)
        grey = np.pad(grey[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], 1)  # the ink ends inside the picture
        scale = side / (max(grey.shape) - 2)
        size = [max(3, round(length * scale)) for length in grey.shape[::-1]]
        smooth = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC), np.float64) / 255
        return np.clip((smooth - 0.5) * max(2, scale) + 0.5, 0, 1)

    def _add(self, which: int, *, side: int) -> None:
        """Lays a digit where it hides no more than a quarter of any other; after ten trials, nowhere."""
        opacity = self._glyph(which, side)
        for _ in range(10):
            top, left = (int(self._rng.integers(whole - part + 1)) for whole, part in
                         zip(self.owner.shape, opacity.shape, strict=True))
            window = slice(top, top + opacity.shape[0]), slice(left, left + opacity.shape[1])
            covered = np.bincount(self.owner[window][opacity >= 0.5], minlength=len(self.areas))
            seen = np.bincount(self.owner.flat, minlength=len(self.areas))
            if all(seen[i] - covered[i] >= VISIBLE * self.areas[i] for i in range(1, len(self.areas))):
                self.objects.append((self._digits.read(which)[1], False))
                self.areas.append(int((opacity >= 0.5).sum()))
                self._ink(opacity, window)
                return

    def _add_crowd(self) -> None:
        """Six small examples of one digit beside and over one another, as one object."""
        first = int(self._rng.integers(len(self._digits)))
        label = self._digits.read(first)[1]
        same = np.flatnonzero(self._digits.labels == label)
        self.objects.append((label, True))
        top, left = (int(self._rng.integers(whole - 40)) for whole in self.owner.shape)
        for i in range(6):
            opacity = self._glyph(int(self._rng.choice(same)), side=int(self._rng.integers(12, 17)))
            y = top + 18 * (i // 3) + int(self._rng.integers(4))
            x = left + 11 * (i % 3) + int(self._rng.integers(4))
            self._ink(opacity, (slice(y, y + opacity.shape[0]), slice(x, x + opacity.shape[1])))
        self.areas.append(int((self.owner == 1).sum()))

    def _ink(self, opacity: np.ndarray, window: tuple[slice, slice]) -> None:
        """Draws the last object's shape in a random colour that differs in brightness from the place."""
        below = self.pixels[window]
        place = below.mean((0, 1)) @ LUMINANCE
        while abs((colour := self._rng.uniform(0, 255, 3)) @ LUMINANCE - place) < CONTRAST:
            pass
        self.pixels[window] = below + opacity[..., None] * (colour - below)
        self.owner[window][opacity >= 0.5] = len(self.objects)

    def label_map(self) -> np.ndarray:
        """The positions in LABELS of what is seen, uint8 [h, w]."""
        position = [1, *(0 if crowd else 2 + digit for digit, crowd in self.objects)]
        return np.array(position, np.uint8)[self.owner]

    def annotations(self, image_id: int, *, first: int) -> list[dict[str, Any]]:
        """The objects as COCO's JSON has them, with ids from `first`; boxes and areas are of what is seen."""
        records = []
        for number, (digit, crowd) in enumerate(self.objects, start=1):
            mask = self.owner == number
            rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
            # Crowds have run lengths in COCO too; the others take turns among the forms that its readers know
            form = run_lengths if crowd else (polygons, compressed, run_lengths)[number % 3]
            records.append({
                'id': first + number - 1, 'image_id': image_id, 'category_id': CATEGORY_IDS[digit],
                'bbox': [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]],
                'area': int(mask.sum()), 'iscrowd': int(crowd), 'segmentation': form(mask)})
        return records


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask [h, w] as lengths of runs down the columns, of zeros and ones in turn, zeros first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {'size': list(mask.shape), 'counts': np.diff(changes, prepend=0, append=len(flat)).tolist()}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    """A mask [h, w] as run lengths in COCO's text."""
    from faster_coco_eval.core import mask as codes
    return {'size': list(mask.shape),
            'counts': codes.encode(np.asfortranarray(mask.astype(np.uint8)))['counts'].decode()}


def polygons(mask: np.ndarray) -> list[list[int]]:
    """A mask [h, w] as one rectangle for each run of a column, whose union is the mask to the pixel."""
    change = np.diff(np.pad(mask, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
    (columns, tops), (_, bottoms) = np.nonzero(change == 1), np.nonzero(change == -1)
    return [[x, top, x + 1, top, x + 1, bottom, x, bottom]
            for x, top, bottom in zip(columns.tolist(), tops.tolist(), bottoms.tolist(), strict=True)]
