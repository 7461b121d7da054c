"""COCO: any JSON of its form read once into flat arrays, its images, and the transforms that take boxes with them.

A JSON is walked element by element, so that its objects never stand in memory together. What workers share are two
arrays, mapped from the user's cache: a row an image, and a row an annotation, those of an image one after the other.
Outlines and run lengths (`segmentation`) stay in the JSON, of which a row knows the place.

What is wrong in a file is either dropped by the rules of the authors' code, which `CocoSource` counts, or refused with
the file and the annotation, since a wrong box trains silently.
"""
import json
import math
import os
import posixpath
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
from faster_coco_eval.core import mask as run_lengths
from tqdm import tqdm

from pipeline import dense, labels
from pipeline.augmentation import TINY, Picture
from pipeline.files import Split, from_file, keep_index, to_file
from pipeline.labels import BadLabel
from recipes import Run
from recipes.coco import Detection as Recipe
from utils import UserError, log, reason_of

RULES = '2'  # of the index: raise it where a rule of `scan` changes
SPLITS = {'train': ('train2017', 'train'), 'val': ('val2017', 'val', 'valid', 'validation', 'test')}
EXPORT = '_annotations.coco.json'  # Roboflow's, in the folder of the images
DIGITS = 5000  # made-up images to train on: of 1,000, a detector learns the images and not the digits
MIN_SIDE = 32  # pixels: below, an image is left out of the training, as by the authors
CROWD, IGNORED, MASKLESS = 1, 2, 4  # flags of an annotation
WITHOUT_MASKS = ('train boxes alone by --masks false (and evaluate them by --recipe ROW --masks false), or add its '
                 'segmentation')
IMAGE = [('id', '<i8'), ('height', '<i4'), ('width', '<i4'), ('first', '<i8'), ('count', '<i4')]
ANNOTATION = [('id', '<i8'), ('category', '<i4'), ('flags', 'u1'), ('box', '<f8', 4), ('area', '<f8'),
              ('start', '<i8'), ('end', '<i8')]
SPACE = re.compile(r'[ \t\n\r]*')


# ---- From a JSON to flat arrays -------------------------------------------------------------------------------------

def walk(text: str, take: Mapping[str, Callable[[Any, int, int], None]]) -> set[str]:
    """Goes through a JSON object.

    Args:
        text: of the file.
        take: by key, what receives each element of the list under it, with its begin and end in the text.

    Returns:
        all keys of the object.

    Raises:
        ValueError: for what is no JSON object, or where a list is none.
        RecursionError: for what is nested too deep.
    """
    decode = json.JSONDecoder().raw_decode

    def mark(place: int, marks: str) -> tuple[str, int]:
        """The next mark, which must be one of some, and the place behind it."""
        place = SPACE.match(text, place).end()
        found = text[place:place + 1]
        if not found or found not in marks:
            raise json.JSONDecodeError(f'Expecting {" or ".join(marks)}', text, place)
        return found, place + 1

    def peek(place: int) -> tuple[str, int]:
        place = SPACE.match(text, place).end()
        return text[place:place + 1], place

    keys: set[str] = set()
    outer, place = mark(0, '{')
    while outer != '}':
        following, place = peek(place)
        if following == '}' and not keys:
            outer, place = mark(place, '}')
            continue
        key, place = decode(text, place)
        if not isinstance(key, str):
            raise json.JSONDecodeError('Expecting a name', text, place)
        keys.add(key)
        _, place = mark(place, ':')
        following, place = peek(place)
        if key not in take:
            place = decode(text, place)[1]
        elif following != '[':
            raise json.JSONDecodeError(f'Expecting a list of {key}', text, place)
        else:
            inner, place = mark(place, '[')
            following, place = peek(place)
            if following == ']':
                inner, place = mark(place, ']')
            while inner != ']':
                start = peek(place)[1]
                value, place = decode(text, start)
                take[key](value, start, place)
                inner, place = mark(place, ',]')
        outer, place = mark(place, ',}')
    if peek(place)[0]:
        raise json.JSONDecodeError('Extra data', text, place)
    return keys


def _whole(value: Any) -> int:
    """An id, which some programs write as text or with a point. Raises TypeError, ValueError."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    number = int(value)
    if abs(number) >= 2**63:
        raise ValueError
    return number


class _Scan:
    """The contents of one JSON file, checked element by element."""

    def __init__(self, path: Path):
        self.path = path
        self.images: list[tuple[str, int, int, int]] = []  # file, id, height, width
        self.categories: list[tuple[int, str, str]] = []  # id, name, supercategory
        self.numbers, self.values = array('q'), array('d')  # of annotations: six and five each

    def error(self, what: str, cure: str) -> UserError:
        return UserError(f'{self.path}: {what}; {cure}')

    def read(self) -> None:
        """Reads the file. Raises UserError."""
        try:
            with open(self.path, 'rb') as file:
                # A character a byte, so that places in the text are places in the file; names are decoded by themselves
                text = file.read().decode('latin-1')
        except OSError as error:
            raise self.error(f'cannot be read ({error.strerror or error})', 'check the path and its permissions'
                             ) from None
        if text.startswith('\xef\xbb\xbf'):  # a byte-order mark
            text = '   ' + text[3:]
        bar, shown = tqdm(total=len(text), desc=f'indexing {self.path}', unit='B', unit_scale=True, disable=None), 0

        def taking(method: Callable[[dict[str, Any], int, int], None], key: str) -> Callable[[Any, int, int], None]:
            def take(value: Any, start: int, end: int) -> None:
                nonlocal shown
                if not isinstance(value, dict):
                    raise self.error(f'"{key}" holds {text[start:start + 40]!r} where COCO has an object',
                                     'export the set as COCO JSON (object detection)')
                if key != 'annotations':  # which have no text that is used
                    value = json.loads(text[start:end].encode('latin-1'))
                method(value, start, end)
                if end - shown > 1 << 20:
                    bar.update(end - shown)
                    shown = end
            return take

        methods = {'images': self._image, 'categories': self._category, 'annotations': self._annotation}
        try:
            with bar:
                keys = walk(text, {key: taking(method, key) for key, method in methods.items()})
                bar.update(len(text) - shown)
        except (ValueError, RecursionError) as error:
            if text.lstrip()[:1] == '[':
                raise self.error('is a list, as results are, and no COCO data set', 'give the file with "images", '
                                 '"annotations" and "categories"') from None
            raise self.error(f'is cut off, damaged or no COCO JSON ({reason_of(error)})', 'copy or export it again'
                             ) from None
        if missing := [key for key in methods if key not in keys]:
            cure = ("it is LabelMe's file of one image: export the set as COCO JSON (labelme2coco)"
                    if 'shapes' in keys else 'export the set as COCO JSON (object detection)')
            raise self.error(f'has no "{missing[0]}" and is no COCO data set', cure)

    def _image(self, image: dict[str, Any], _start: int, _end: int) -> None:
        name = image.get('file_name')
        if not isinstance(name, str) or not name:
            raise self.error(f'image {image.get("id")} has no file_name', 'add it')
        try:
            number = _whole(image.get('id'))
        except (TypeError, ValueError):
            raise self.error(f'the image {name} has the id {image.get("id")!r}', 'give each image a whole number'
                             ) from None
        try:
            height, width = (_whole(image.get(side) or 0) for side in ('height', 'width'))
        except (TypeError, ValueError):
            height = width = -1
        if not 0 <= height < 2**31 or not 0 <= width < 2**31 or (height == 0) != (width == 0):
            raise self.error(f'image {number}, {name}, is {image.get("width")!r} x {image.get("height")!r} pixels',
                             'write its width and height, or leave both out')
        self.images.append((name.replace('\\', '/'), number, height, width))

    def _category(self, category: dict[str, Any], _start: int, _end: int) -> None:
        name = category.get('name')
        try:
            number = _whole(category.get('id'))
            if not isinstance(name, str) or not name or not -2**31 <= number < 2**31:
                raise ValueError
        except (TypeError, ValueError):
            raise self.error(f'a category has the id {category.get("id")!r} and the name {name!r}',
                             'give each a whole number and a name') from None
        self.categories.append((number, name, str(category.get('supercategory', ''))))

    def _annotation(self, note: dict[str, Any], start: int, end: int) -> None:
        try:
            number, image = _whole(note.get('id')), _whole(note.get('image_id'))
            category = _whole(note.get('category_id'))
        except (TypeError, ValueError):
            raise self.error(f'annotation {note.get("id")!r} has the image_id {note.get("image_id")!r} and the '
                             f'category_id {note.get("category_id")!r}', 'give whole numbers') from None
        try:
            x, y, width, height = box = [float(value) for value in note['bbox']]
            area = note.get('area')
            area = width * height if area is None else float(area)
            if not all(map(math.isfinite, (*box, area))):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self.error(f'annotation {number} of image {image} has the bbox {note.get("bbox")!r} and the area '
                             f'{note.get("area")!r}', 'give four numbers, x, y, width, height, and one') from None
        flags = (CROWD * bool(note.get('iscrowd')) | IGNORED * bool(note.get('ignore'))
                 | MASKLESS * (not note.get('segmentation')))
        self.numbers.extend((number, image, category, flags, start, end))
        self.values.extend((x, y, width, height, area))


def _refuse_twice(scan: _Scan, ids: np.ndarray, what: str) -> None:
    order = np.sort(ids)
    if len(twice := order[1:][order[1:] == order[:-1]]):
        raise scan.error(f'{len(twice):,} {what} ids stand there twice, {twice[0]} for example', 'number them anew: an '
                         'evaluation takes things of one id for one thing')


def _positions(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The place of each wanted id among the ids, -1 where it is none."""
    order = np.argsort(ids, kind='stable')
    found = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[found] == wanted, found, -1)


def _check_files(scan: _Scan, folder: Path) -> None:
    """Refuses images that are not in the folder, each folder looked at once. Raises UserError."""
    there: dict[str, set[str]] = {}
    missing = []
    for name, number, _, _ in scan.images:
        head, tail = posixpath.split(name)
        if head not in there:
            try:
                there[head] = set(os.listdir(folder / head))
            except (OSError, ValueError):  # ValueError: no name that a file can have
                there[head] = set()
        if tail not in there[head]:
            missing.append((name, number))
    if missing:
        name, number = missing[0]
        raise scan.error(f'{len(missing):,} of its {len(scan.images):,} images are not in {folder} ({name}, image '
                         f'{number}, for example)', 'give their folder by --image_dir, or put them there')


def _kept_categories(scan: _Scan, used: np.ndarray) -> list[tuple[int, str]]:
    """The ids and names of the classes, by id. Raises UserError.

    Without the placeholder that Roboflow writes: a category of the supercategory "none" without boxes, which is the
    supercategory of the others.
    """
    for key, what in ((0, 'id'), (1, 'name')):
        seen: set[Any] = set()
        for category in scan.categories:
            value = labels.normal(category[1]) if key else category[0]
            if value in seen:
                raise scan.error(f'two categories have the {what} {category[key]!r}', f'give each a {what} of its own')
            seen.add(value)
    with_boxes = set(used.tolist())
    parents = {parent for _, _, parent in scan.categories}
    kept = sorted((number, name) for number, name, parent in scan.categories
                  if number in with_boxes or parent != 'none' or name not in parents)
    if not kept:
        raise scan.error('has no category', 'add them under "categories"')
    return kept


def _refuse_corners(scan: _Scan, images: np.ndarray, notes: np.ndarray, image_of: np.ndarray) -> None:
    """Refuses boxes that are corners, x1, y1, x2, y2, or shares of the image, over the whole file. Raises UserError.

    Corners taken for x, y, width, height overflow the image in three boxes of four, and all rise and lie inside it:
    true widths and heights do the one in one box of a thousand, and the other in every other box.
    """
    if not len(notes):
        return
    x, y, w, h = notes['box'].T
    width, height = (images[side][image_of] for side in ('width', 'height'))
    over = (x + w > width + 1) | (y + h > height + 1)
    corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    if over.mean() > 0.5 and corners.mean() > 0.99:
        worst = np.flatnonzero(over)[0]
        raise scan.error(f'{over.mean():.0%} of the boxes leave their image as x, y, width, height, and all are inside '
                         f'as corners x1, y1, x2, y2 (annotation {notes["id"][worst]}: {notes["box"][worst].tolist()} '
                         f'in {width[worst]} x {height[worst]} pixels)', 'write bbox as x, y, width, height')
    if notes['box'].max() <= 1 and (width > 1).all():
        raise scan.error(f'all boxes are shares of the image (annotation {notes["id"][0]}: '
                         f'{notes["box"][0].tolist()})', 'write bbox in pixels')


def scan(path: Path, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a COCO JSON.

    Args:
        path: of the JSON.
        folder: of the images, in which its file names are looked for.

    Returns:
        `images` and `annotations` as in the head of this file, in the JSON's order; and `classes`, their names by
        the ids' order, `category_ids`.

    Raises:
        UserError: with the file and the annotation or image, for what would train or evaluate wrongly.
    """
    found = _Scan(path)
    found.read()
    if not found.images:
        raise found.error('has no images', 'export the set as COCO JSON with its images')
    _check_files(found, folder)
    names = [os.fsencode(name) for name, *_ in found.images]
    images = np.zeros(len(names), [('path', f'S{max(map(len, names))}'), *IMAGE])
    images['path'] = names
    for place, (name, number, height, width) in enumerate(found.images):
        if not height:
            try:
                height, width = dense.upright_size((folder / name).read_bytes())
            except Exception as error:  # anything that Pillow raises
                raise found.error(f'image {number}, {name}, has no width and height, and cannot be read '
                                  f'({reason_of(error)})', 'write both') from None
        images['id'][place], images['height'][place], images['width'][place] = number, height, width
    numbers = np.frombuffer(found.numbers, np.int64).reshape(-1, 6)
    values = np.frombuffer(found.values, np.float64).reshape(-1, 5)
    _refuse_twice(found, images['id'], 'image')
    _refuse_twice(found, numbers[:, 0], 'annotation')
    categories = _kept_categories(found, numbers[:, 2])
    image_of = _positions(numbers[:, 1], images['id'])
    category_of = _positions(numbers[:, 2], np.array([number for number, _ in categories]))
    for places, column, what in ((image_of, 1, 'image'), (category_of, 2, 'category')):
        if len(lost := np.flatnonzero(places < 0)):
            raise found.error(f'annotation {numbers[lost[0], 0]} is of {what} {numbers[lost[0], column]}, which the '
                              f'file does not list ({len(lost):,} such)', f'add the {what}, or remove the annotation')
    notes = np.zeros(len(numbers), ANNOTATION)
    for name, column in (('id', 0), ('flags', 3), ('start', 4), ('end', 5)):
        notes[name] = numbers[:, column]
    notes['category'], notes['box'], notes['area'] = category_of, values[:, :4], values[:, 4]
    _refuse_corners(found, images, notes, image_of)
    order = np.argsort(image_of, kind='stable')
    images['count'] = np.bincount(image_of, minlength=len(images))
    images['first'] = np.cumsum(images['count']) - images['count']
    return {'images': images, 'annotations': notes[order]}, {
        'classes': [name for _, name in categories], 'category_ids': [number for number, _ in categories]}


# ---- The source -----------------------------------------------------------------------------------------------------

@dataclass
class Annotations:
    """What a JSON says of one image. Boxes are x1, y1, x2, y2 in pixels of the upright image.

    Attributes:
        boxes: float32 [n, 4].
        labels: int64 [n], positions among the classes.
        crowd: bool [n]: a region of several objects; only in an evaluation.
        bbox: float64 [n, 4], x, y, width, height as the JSON has them: what an average precision is computed with.
        areas: float64 [n], square pixels.
        ids: int64 [n], of the annotations.
        segments: reads the outlines as the JSON has them, a list of polygons or run lengths a box; None where it has.
        size: height and width, as the JSON says.
        image_id: of the image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    bbox: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    segments: Callable[[], list[Any]] | None
    size: tuple[int, int]
    image_id: int

    @classmethod
    def none(cls, size: tuple[int, int]) -> 'Annotations':
        """Of an image of a size (h, w) of which nothing is known."""
        boxes, numbers = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        return cls(boxes, numbers, numbers > 0, boxes.astype(np.float64), numbers.astype(np.float64), numbers, None,
                   size, 0)


def usable(images: np.ndarray, notes: np.ndarray) -> np.ndarray:
    """Which annotations are trained on, bool [n], by the authors' rules: in the image, a pixel or more, no crowd."""
    x, y, w, h = notes['box'].T
    width, height = (np.repeat(images[side], images['count']) for side in ('width', 'height'))
    inside = (np.minimum(x + w, width) > np.maximum(x, 0)) & (np.minimum(y + h, height) > np.maximum(y, 0))
    return inside & (notes['area'] > 0) & (w >= 1) & (h >= 1) & (notes['flags'] & (CROWD | IGNORED) == 0)


class CocoSource:
    """The images of a COCO JSON, in its order.

    For training, without the images that have a side below 32 pixels or no usable box; for evaluation, all.

    Attributes:
        json: the file; folder: of the images.
        classes: names in the order of their category ids.
        category_ids: by label; None of a class that the JSON has not.
        ids: int64 [n], of the images.
        sizes: int32 [n, 2], height and width.
        groups: [n]: a batch holds images of one group; in training 1 for wider than high, else 0.
        counts: of each class in the JSON, the boxes that a training takes.
        dropped: how many annotations and images the training leaves out, by what they are.
    """

    in_memory = False
    class_map = None

    def __init__(self, path: Path, folder: Path, *, training: bool):
        """
        Raises:
            UserError: for a file that is no COCO data set, or wrong, with the place and the cure.
        """
        self.json, self.folder, self._training = path, folder, training
        self._images, self._notes, facts = self._open()
        self.classes, self.category_ids = facts['classes'], facts['category_ids']
        self._label_of = np.arange(len(self.classes))
        images, good = self._images, usable(self._images, self._notes)
        self._good, self.dropped = good, {}
        chosen = np.ones(len(images), bool)
        if training:
            # Sums over the rows of each image, which may be none
            total = np.concatenate([[0], np.cumsum(good)])
            boxes = total[images['first'] + images['count']] - total[images['first']]
            large = np.minimum(images['height'], images['width']) >= MIN_SIDE
            chosen, crowds = large & (boxes > 0), (self._notes['flags'] & CROWD).astype(bool)
            self.dropped = {'crowds': int(crowds.sum()),
                            'boxes outside their image or below a pixel': int((~good & ~crowds).sum()),
                            'images without boxes': int((large & (boxes == 0)).sum()),
                            'images below 32 pixels': int((~large).sum())}
            if not chosen.any():
                raise UserError(f'{path}: none of its {len(images):,} images has a box to train on (of a pixel or '
                                'more, inside the image, no crowd); check its annotations')
        self._chosen = np.flatnonzero(chosen).astype(np.int32)
        self.counts = np.bincount(self._notes['category'][good], minlength=len(self.classes))
        self.ids = images['id'][self._chosen]
        self.sizes = np.stack([images['height'], images['width']], 1)[self._chosen]
        self.groups: np.ndarray = (self.sizes[:, 1] > self.sizes[:, 0]).astype(np.uint8)

    def _open(self) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """The arrays and facts of the JSON, from the user's cache or by reading it."""
        path, folder = self.json.resolve(), self.folder.resolve()

        def stamp() -> list[int]:
            facts = os.stat(path)
            return [facts.st_size, facts.st_mtime_ns]

        def build() -> tuple[dict[str, np.ndarray], dict[str, Any], bool]:
            log.info('indexing %s, once', self.json)
            before = stamp() if path.exists() else []
            arrays, facts = scan(self.json, self.folder)
            return arrays, facts | {'stamp': before}, True

        arrays, facts = keep_index(f'{path} with {folder}', self.json.stem, rules=RULES, build=build,
                                   unchanged=lambda facts: facts['stamp'] == stamp())
        return from_file(arrays['images']), from_file(arrays['annotations']), facts

    def __getstate__(self) -> dict[str, Any]:
        """Spawned workers map the arrays again instead of receiving copies."""
        return self.__dict__ | {name: to_file(self.__dict__[name]) for name in ('_images', '_notes')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {name: from_file(state[name]) for name in ('_images', '_notes')})

    def __len__(self) -> int:
        return len(self._chosen)

    def relabel(self, classes: Sequence[str]) -> None:
        """Takes the labels from the names' positions in a list that has them all."""
        ours, theirs = np.array(labels.find(self.classes, classes)), labels.find(classes, self.classes)
        self.category_ids = [self.category_ids[place] if place >= 0 else None for place in theirs]
        self._label_of, self.counts = ours[self._label_of], np.bincount(ours, self.counts, len(classes)).astype(int)
        self.classes = list(classes)

    def name(self, index: int) -> str:
        """Path of an image."""
        return os.fsdecode(self._path(index))

    def _path(self, index: int) -> bytes:
        return os.path.join(os.fsencode(self.folder), self._images[self._chosen[index]]['path'])

    def annotations(self, index: int) -> Annotations:
        """What the JSON says of an image: in training what is trained on, else all."""
        image = self._images[self._chosen[index]]
        rows = slice(int(image['first']), int(image['first'] + image['count']))
        notes = self._notes[rows][self._good[rows]] if self._training else self._notes[rows]
        boxes = notes['box'].copy()
        boxes[:, 2:] += boxes[:, :2]
        return Annotations(boxes.astype(np.float32), self._label_of[notes['category']],
                           (notes['flags'] & CROWD).astype(bool), notes['box'].copy(), notes['area'].copy(),
                           notes['id'].copy(), partial(self._segments, notes[['id', 'start', 'end']].copy()),
                           (int(image['height']), int(image['width'])), int(image['id']))

    def without_masks(self) -> np.ndarray:
        """The ids, int64 [n], of the annotations that are taken and have no `segmentation`."""
        notes = self._notes[self._good] if self._training else self._notes
        return notes['id'][(notes['flags'] & MASKLESS).astype(bool)]

    def _segments(self, places: np.ndarray) -> list[Any]:
        """The `segmentation` of annotations, read from their places in the JSON. Raises BadLabel where it changed."""
        found = []
        with open(self.json, 'rb', buffering=0) as file:
            for number, start, end in places.tolist():
                try:
                    note = json.loads(os.pread(file.fileno(), end - start, start))
                    if _whole(note['id']) != number:
                        raise ValueError
                except (ValueError, TypeError, KeyError):
                    raise BadLabel(f'has no annotation {number} any more where {self.json} had it: the file was '
                                   'changed while the run read it; start again') from None
                found.append(note.get('segmentation') or None)
        return found

    def read(self, index: int) -> tuple[bytes, Annotations]:
        """The undecoded image, and what the JSON says of it. Raises OSError where it cannot be read."""
        with open(self._path(index), 'rb', buffering=0) as file:
            return file.read(), self.annotations(index)

    @property
    def shown(self) -> str:
        """The source in messages."""
        return str(self.json)

    def facts(self) -> dict[str, Any]:
        """What there is, for a report."""
        return {'path': str(self.json), 'images': len(self), 'classes': len(self.classes),
                'boxes': int(self.counts.sum()), 'smallest_class': int(self.counts.min()),
                'largest_class': int(self.counts.max()), 'left_out': self.dropped}

    def check(self, index: int) -> None:
        """Decodes an image. Raises BadLabel for one of another size than its boxes, anything for one that cannot be."""
        image, notes = self.read(index)
        check_size(dense.decode_upright(image), notes.size)


def check_coco(train: CocoSource | None, val: CocoSource | None, *, masks: bool = False) -> tuple[list[str], list[str]]:
    """What can be seen of two halves of a data set without opening an image.

    Args:
        masks: whether each annotation must have one.

    Returns:
        errors, with which the results would be worthless, and warnings; each names the file and the cure.
    """
    errors, warnings = [], []
    for source in (train, val):
        if source is None:
            continue
        if masks and len(bare := source.without_masks()):
            errors.append(f'{source.json} has no mask in annotation {bare[0]} ({len(bare):,} such); {WITHOUT_MASKS}')
        left_out = {what: count for what, count in source.dropped.items() if count}
        if left_out:
            warnings.append(f'{source.json}: the training leaves out '
                            f'{", ".join(f"{count:,} {what}" for what, count in left_out.items())}')
        empty = [name for name, count in zip(source.classes, source.counts, strict=True) if not count]
        if empty:
            verb = 'has' if len(empty) == 1 else 'have'
            warnings.append(f'{source.json}: {len(empty)} of its {len(source.classes)} classes {verb} no box '
                            f'({labels.some(empty)}); remove their categories, or add boxes')
    if train is not None and val is not None:
        if lost := labels.lacking(val.classes, train.classes):
            errors.append(f'{val.json} has {len(lost)} classes that {train.json} has not ({labels.some(lost)}); give '
                          'both the same "categories"')
        both = {train.name(index) for index in range(len(train))} & {val.name(index) for index in range(len(val))}
        if both:
            warnings.append(f'{len(both):,} images are in both {train.json} and {val.json}, {min(both)} for example: '
                            'the evaluation flatters the model; divide them')
    return errors, warnings


# ---- Where the files are --------------------------------------------------------------------------------------------

def find_json(root: Path, split: Split) -> tuple[Path, Path]:
    """The JSON of one half of a data set below a folder, and the folder of its images.

    COCO's `annotations/instances_train2017.json` beside `train2017/`, the same without the year, or Roboflow's
    `train/_annotations.coco.json`.

    Raises:
        UserError: with what was looked for.
    """
    if not root.is_dir():
        raise UserError(f'{root} is no folder; give --data_path the folder with train2017/, val2017/ and annotations/, '
                        'or --train_json, --val_json and --image_dir')
    for name in SPLITS[split]:
        for path, folders in ((root / 'annotations' / f'instances_{name}.json', (name, f'images/{name}', 'images')),
                              (root / name / EXPORT, (name,))):
            if path.is_file():
                return path, next((root / folder for folder in folders if (root / folder).is_dir()), root)
    names = ', '.join(f'annotations/instances_{name}.json' for name in SPLITS[split][:2])
    raise UserError(f'{root} has none of {names}, {SPLITS[split][1]}/{EXPORT}; give the JSON by --{split}_json and the '
                    'folder of its images by --image_dir')


def open_coco(recipe: Recipe, run: Run, split: Split) -> CocoSource:
    """The images of one half of the recipe's data set.

    In an evaluation a batch holds images that are padded to one size: padding changes what MogaNet sees.

    Raises:
        UserError: where there is nothing, or what is there is wrong, with the path and the cure.
    """
    given = run.train_json if split == 'train' else run.val_json
    if recipe.data_set == 'digits_coco':
        from pipeline import digits_coco
        path, folder = find_json(digits_coco.root(train=DIGITS), split)
    elif given:
        path = Path(given)
        folder = Path(run.image_dir) if run.image_dir else path.parent
    else:
        path, folder = find_json(Path(run.data_path), split)
        folder = Path(run.image_dir) if run.image_dir else folder
    source = CocoSource(path, folder, training=split == 'train')
    if split == 'val':
        sizes = [dense.padded([dense.fit(tuple(size), recipe.image_scale)]) for size in source.sizes.tolist()]
        source.groups = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
    return source


# ---- Transforms -----------------------------------------------------------------------------------------------------

def scale_boxes(boxes: np.ndarray, factors: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes times the factors of `dense.factors`, clipped to the resized image, float32 [n, 4]."""
    height, width = size
    return np.clip(boxes * factors, 0, np.array([width, height, width, height], np.float32))


def mirror_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes of the mirrored image, float32 [n, 4]."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def crop_boxes(boxes: np.ndarray, top: int, left: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in a crop, clipped to it, float32 [n, 4], and which of them have an area there, bool [n]."""
    height, width = size
    moved = np.clip(boxes - np.array([left, top, left, top], np.float32), 0,
                    np.array([width, height, width, height], np.float32))
    return moved, (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])


def run_lengths_of(segments: Sequence[Any], size: tuple[int, int], ids: Iterable[int]) -> list[dict[str, Any]]:
    """Polygons or run lengths as a JSON has them, as compressed run lengths, by the rules of COCO's own tools.

    Args:
        segments: the `segmentation` of each annotation, None where it has none.
        size: height and width of the image.
        ids: of the annotations, for the message.

    Raises:
        BadLabel: where an annotation has no mask, or one of another form or size.
    """
    found = []
    for segment, number in zip(segments, ids, strict=True):
        if segment is None:
            raise BadLabel(f'has no mask in annotation {number}; {WITHOUT_MASKS}')
        try:
            if isinstance(segment, list):  # polygons, whose union is the object
                code = run_lengths.merge(run_lengths.frPyObjects(segment, *size))
            elif isinstance(segment['counts'], list):
                code = run_lengths.frPyObjects(segment, *segment['size'])
            else:
                code = segment
            if list(code['size']) != list(size):
                raise ValueError(f'a mask of {code["size"][1]} x {code["size"][0]} pixels')
            run_lengths.area(code)
        except Exception as error:  # anything, of code that takes what it is given for right
            raise _unreadable(number, error) from None
        found.append(code)
    return found


def _unreadable(number: int, error: Exception) -> BadLabel:
    return BadLabel(f'has a segmentation that cannot be read in annotation {number} ({error}); give polygons or run '
                    "lengths in COCO's form")


def rasterise(segments: Sequence[Any], size: tuple[int, int], ids: Iterable[int]) -> list[np.ndarray]:
    """Masks, uint8 [h, w] each, of what `run_lengths_of` takes. Raises BadLabel as it does."""
    masks = []
    for code, number in zip(run_lengths_of(segments, size, ids), ids, strict=True):
        try:
            masks.append(run_lengths.decode(code))
        except Exception as error:  # as above
            raise _unreadable(number, error) from None
    return masks


def draw_crop(rng: np.random.Generator, size: tuple[int, int], bounds: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: each side uniform within the bounds and the image, ends included.
    """
    height, width = (int(rng.integers(min(side, bounds[0]), min(side, bounds[1]) + 1)) for side in size)
    top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    return top, left, height, width


class BoxSample(TypedDict):
    """What a sample always has."""

    pixels: np.ndarray  # uint8 [h, w, 3], unpadded
    boxes: np.ndarray  # float32 [n, 4]
    labels: np.ndarray  # int64 [n]
    size: tuple[int, int]  # (h, w)
    original_size: tuple[int, int]
    image_id: int
    flipped: bool


class Sample(BoxSample, total=False):
    """What a worker makes of an image and its annotations."""

    masks: np.ndarray  # bool [n, h, w]; in training, on request


class Transform:
    """An image and its boxes as the network takes them: upright, resized, in training mirrored and cropped."""

    # The authors' longer schedules: of the shorter side after and before the crop, and of the crop
    SIDES: ClassVar[tuple[int, ...]] = tuple(range(480, 801, 32))
    SIDES_BEFORE: ClassVar[tuple[int, ...]] = (400, 500, 600)
    CROP: ClassVar[tuple[int, int]] = (384, 600)

    def __init__(self, scale: tuple[int, int], *, hflip: float = 0.0, multi_scale: bool = False, masks: bool = False):
        """
        Args:
            scale: longest and shortest side within which an image is resized.
            hflip: probability of mirroring, in training.
            multi_scale: in training, the shorter side is one of `SIDES`, in every other image after a random crop.
            masks: whether a sample has them in training.
        """
        self.scale, self.hflip, self.multi_scale, self.masks = scale, hflip, multi_scale, masks
        dense.mirror(TINY)  # compiles it, before the workers start

    def __call__(self, item: tuple[Picture, Annotations], seed: int | None) -> Sample:
        """The sample of an image as `CocoSource.read` gives it.

        Args:
            seed: from which all is drawn; None is the test's.

        Raises:
            BadLabel: where the image has another size than the JSON says.
            Exception: anything, for an image that cannot be decoded.
        """
        image, notes = item
        pixels = dense.decode_upright(image)
        original = check_size(pixels, notes.size)
        boxes, classes, flipped = notes.boxes, notes.labels, False
        rng = None if seed is None else np.random.default_rng(seed)
        wanted = self.masks and rng is not None
        # With the masks, in this order: whatever happens to the pixels happens to them
        masks = rasterise(notes.segments() if notes.segments else [None] * len(boxes), original, notes.ids
                          ) if wanted else []
        if rng is not None and rng.random() < self.hflip:
            pixels, boxes, flipped = dense.mirror(pixels), mirror_boxes(boxes, original[1]), True
            masks = [dense.mirror(mask) for mask in masks]
        scale = self.scale
        if rng is not None and self.multi_scale:
            if rng.random() < 0.5:
                pixels, boxes, masks = self._resize(
                    pixels, boxes, masks, (max(self.scale), int(rng.choice(self.SIDES_BEFORE))))
                top, left, height, width = draw_crop(rng, pixels.shape[:2], self.CROP)
                rows, columns = slice(top, top + height), slice(left, left + width)
                pixels = pixels[rows, columns]
                boxes, kept = crop_boxes(boxes, top, left, (height, width))
                boxes, classes = boxes[kept], classes[kept]
                masks = [mask[rows, columns] for mask, stays in zip(masks, kept, strict=False) if stays]
            scale = (max(self.scale), int(rng.choice(self.SIDES)))
        pixels, boxes, masks = self._resize(pixels, boxes, masks, scale)
        sample: Sample = {'pixels': pixels, 'boxes': boxes, 'labels': classes, 'size': pixels.shape[:2],
                          'original_size': original, 'image_id': notes.image_id, 'flipped': flipped}
        if wanted:
            sample['masks'] = np.array(masks, bool).reshape(len(boxes), *sample['size'])
        return sample

    @staticmethod
    def _resize(pixels: np.ndarray, boxes: np.ndarray, masks: list[np.ndarray], scale: tuple[int, int]
                ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        old = pixels.shape[:2]
        size = dense.fit(old, scale)
        return (dense.resize(pixels, size), scale_boxes(boxes, dense.factors(old, size), size),
                [dense.resize_labels(mask, size) for mask in masks])


def check_size(pixels: np.ndarray, expected: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image. Raises BadLabel where they are not those that its boxes were drawn in."""
    height, width = pixels.shape[:2]
    if (height, width) != expected:
        turned = (width, height) == expected
        cure = ('its EXIF data turn it, and the boxes were drawn in the unturned image: remove the tag of the file '
                '(exiftool -Orientation=), or turn the boxes' if turned else 'resize the image or its boxes')
        raise BadLabel(f'is {width} x {height} pixels, and its boxes belong to one of {expected[1]} x {expected[0]}; '
                       f'{cure}')
    return height, width
