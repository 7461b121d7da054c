"""Where the images come from: image folders, ImageNet's tar files, digits, made-up images, and all that timm reads.

A map-style source has `len`, `classes`, `read(i) -> (image, label)` and `name(i)`; `image` is the undecoded file as
bytes, or pixels as a PIL image or a uint8 array [H, W, 3]. `labels`, where a source has it, are all images' labels.
Sources travel to the worker processes: what is large in them is one array, which the workers share.
"""
import contextlib
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from timm.data import IterableImageDataset, create_dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from pipeline import labels
from pipeline.augmentation import Picture, decode
from pipeline.files import EXTENSIONS, GROUND_TRUTHS, Split, find_files, from_file, load_index, show_others, to_file
from pipeline.labels import BadLabel
from recipes import Recipe, Run
from utils import UserError, derive_seed, nearest, reason_of


def open_source(recipe: Recipe, run: Run, split: Split) -> 'Images':
    """The images of one half of the recipe's data set.

    Returns:
        a map-style source, or timm's IterableImageDataset for streams (`wds/`, `hfids/`, `tfds/`).

    Raises:
        UserError: where there is nothing, with the path and the cure.
    """
    if recipe.data_set == 'image_folder':
        root = Path(run.eval_data_path or run.data_path) if split == 'val' else Path(run.data_path)
        return ImageFiles(find_files(root, split, given=split == 'val' and run.eval_data_path is not None),
                          class_map=run.class_map)
    if recipe.data_set == 'digits':
        return Digits(split)
    if recipe.data_set == 'fake':
        return Fake(split, size=10 * recipe.total_batch_size, num_classes=recipe.num_classes or 1000)
    return open_timm(recipe, run, split)


def open_timm(recipe: Recipe, run: Run, split: Split) -> 'TimmSource | IterableImageDataset':
    """A data set by its name in timm's `create_dataset`. Raises UserError with timm's reason where it has none."""
    kind = recipe.data_set.partition('/')[0]
    if kind not in ('torch', 'hfds', 'hfids', 'wds', 'tfds'):
        known = ('image_folder', 'digits', 'fake', 'torch/cifar100', 'hfds/NAME', 'hfids/NAME', 'wds/NAME', 'tfds/NAME')
        raise UserError(f'--data_set {recipe.data_set} is unknown{nearest(recipe.data_set, known)}; '
                        f'choose from {", ".join(known)}')
    root = run.eval_data_path if split == 'val' and run.eval_data_path else run.data_path
    # Which members of a shard are images: for timm by itself, .jpg, .png and .webp alone
    more = {'input_key': ';'.join(dict.fromkeys(('jpg', 'png', 'webp', *(ending[1:] for ending in EXTENSIONS))))
            } if kind == 'wds' else {'download': run.download or has_archive(recipe.data_set, Path(root))}
    class_map = labels.read_class_map(run.class_map, Path(root)) if run.class_map else None
    try:
        with _patience():
            data = create_dataset(
                recipe.data_set, root=root, split='train' if split == 'train' else 'validation', class_map=class_map,
                is_training=split == 'train', batch_size=run.batch_size or 1, seed=recipe.seed, **more)
    except (Exception, SystemExit) as error:  # anything that a foreign reader raises
        reason = reason_of(error).removesuffix(' You can use download=True to download it')
        cure = ('check --data_path, or fetch them into it by --download' if kind == 'torch' else
                'check --data_path and that the package of the reader is installed')
        raise UserError(f'--data_set {recipe.data_set}: the {split} images under {root} cannot be opened ({reason}); '
                        f'{cure}') from error
    if not isinstance(data, IterableImageDataset):
        return TimmSource(data, class_map)
    data.class_map = class_map  # for the checkpoints
    return data


@contextlib.contextmanager
def _patience(seconds: float = 30) -> Iterator[None]:
    """Within it, a server that sends nothing is given up: torchvision would wait for it without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def has_archive(data_set: str, root: Path) -> bool:
    """Whether a folder has the archive of CIFAR-10 or 100 as it is offered: torchvision then unpacks it beside.

    Their files are pickles. torchvision opens none that has another checksum than the official one.
    """
    kind = {'torch/cifar10': CIFAR10, 'torch/cifar100': CIFAR100}.get(data_set.lower())
    return kind is not None and check_integrity(root / kind.filename, kind.tgz_md5)


def class_names(data: Any) -> list[str]:
    """The classes of one of timm's data sets by index, empty where it does not know them."""
    reader = getattr(data, 'reader', data)
    index = getattr(reader, 'class_to_idx', None) or {}
    return [str(name) for name, _ in sorted(index.items(), key=lambda item: item[1])]


class TimmSource:
    """A map-style data set of timm or torchvision."""

    in_memory = False

    def __init__(self, data: Any, class_map: dict[str, int] | None = None):
        """
        Args:
            class_map: labels by class name, by which timm maps them.
        """
        self._data, self.class_map = data, class_map
        self.classes = labels.names_of_map(class_map) if class_map else class_names(data)
        self._label_of: list[int] | None = None

    def relabel(self, classes: Sequence[str]) -> None:
        """Takes the labels from the names' positions in a list that has them all."""
        self._label_of, self.classes = labels.find(self.classes, classes), list(classes)

    def _label(self, label: Any) -> Any:
        if self._label_of is None or not isinstance(label, (int, np.integer)) or not 0 <= label < len(self._label_of):
            return label
        return self._label_of[label]

    @property
    def labels(self) -> list[Any] | None:
        """The label of each image, where the data set tells them without reading the images; else None."""
        reader = getattr(self._data, 'reader', self._data)
        found = reader.iter_targets() if hasattr(reader, 'iter_targets') else getattr(reader, 'targets', None)
        return None if found is None else [self._label(label) for label in found]

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[Picture, int]:
        """The undecoded file where there is one, else the pixels, and the label."""
        if not hasattr(self._data, 'reader'):
            image, label = self._data[index]
            return image, self._label(label)
        try:
            file, label = self._data.reader[index][:2]
        except LookupError as error:
            if self.class_map is None:
                raise
            raise BadLabel(f'has label {error}, which --class_map does not name; add it') from None
        with file:
            return file.read(), self._label(label)

    def name(self, index: int) -> str:
        try:
            return str(self._data.filename(index))
        except Exception:  # many sources have no names
            return f'image {index}'


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, in a fixed split: 1,437 to train, 360 to test."""

    in_memory = True
    classes = tuple('0123456789')

    def __init__(self, split: Split):
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise UserError("--data_set digits needs scikit-learn: pip install 'scikit-learn>=1.3'") from None
        digits = load_digits()
        # The levels 0..16 as 0..255, in three equal channels
        pixels = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
        halves = train_test_split(np.arange(len(pixels)), test_size=360, random_state=0, stratify=digits.target)
        chosen = np.sort(halves[0] if split == 'train' else halves[1])
        self._pixels, self.labels = pixels[chosen], digits.target[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        return self._pixels[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f'digit {index}'


class Fake:
    """Noise with labels, for dry runs: ten updates to train, 1,000 images to test."""

    in_memory = False

    def __init__(self, split: Split, *, size: int, num_classes: int):
        self._split, self._size = split, size if split == 'train' else 1000
        self.classes = [str(label) for label in range(num_classes)]

    def __len__(self) -> int:
        return self._size

    def read(self, index: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(derive_seed('fake', self._split, index))
        return rng.integers(0, 256, (256, 256, 3), np.uint8), int(rng.integers(len(self.classes)))

    def name(self, index: int) -> str:
        return f'made-up image {index}'


class ImageFiles:
    """The images of a folder of class folders, or of a tar file of classes, in sorted order."""

    in_memory = False

    def __init__(self, root: Path, *, class_map: str | None = None):
        """
        Args:
            root: folder or tar file.
            class_map: file that maps class names to labels; other classes are left out. By default the labels are the
                positions of the names, sorted; numbers as numbers.

        Raises:
            UserError: where no image lies in a class.
        """
        self.root, self._folder = root, os.fsencode(root) + b'/'
        records, facts = load_index(root)
        self._records = from_file(records)
        names: list[str] = facts['classes']
        if not len(self._records) and facts['loose']:
            cure = (f'put {" (with meta.mat) or ".join(GROUND_TRUTHS)} beside it' if root.is_file() else
                    'give each class a folder of its own; tools/check_dataset.py --sort_val FILE does it for ImageNet')
            raise UserError(f'{root} holds {facts["loose"]:,} images in no class folder; {cure}')
        if not len(self._records):
            left_out = f'; left out: {show_others(facts["others"])}' if facts['others'] else ''
            raise UserError(f'{root} holds no image in a class folder ({root}/CLASS/IMAGE, with an ending that Pillow '
                            f'knows, such as .jpg or .png{left_out}); check --data_path')
        if class_map is None:
            self.class_map, self.missing = None, []
            self.classes = labels.in_order(names)
            self._label_of = np.array(labels.find(names, self.classes))
        else:
            self.class_map = labels.read_class_map(class_map, root, names=names)
            mapped, numbers = list(map(str, self.class_map)), list(self.class_map.values())
            self._label_of = np.array([numbers[place] if place >= 0 else -1 for place in labels.find(names, mapped)])
            self.classes, self.missing = labels.names_of_map(self.class_map), labels.lacking(mapped, names)
        kept = self._label_of[self._records['label']] >= 0
        self._chosen = None if kept.all() else np.flatnonzero(kept)
        if not kept.any():
            raise UserError(f'--class_map {class_map} names no class folder of {root} that has images: it has '
                            f'{labels.some(mapped)}, the folder {labels.some(names)}; give a text file with the name '
                            'of a folder a line, or NAME LABEL lines')
        # Images of each class folder, which with a class map are not the classes
        self.folders, self.counts = names, np.bincount(self._records['label'], minlength=len(names))
        self.loose, self.others = facts['loose'], facts['others']

    def relabel(self, classes: Sequence[str]) -> None:
        """Takes the labels from the names' positions in a list that has them all. The order of the images stays."""
        new = np.array([*labels.find(self.classes, classes), -1])
        self._label_of, self.classes = new[self._label_of], list(classes)

    def __getstate__(self) -> dict[str, Any]:
        """Spawned workers map the index again instead of receiving a copy of it."""
        return self.__dict__ | {'_records': to_file(self._records)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {'_records': from_file(state['_records'])})

    def __len__(self) -> int:
        return len(self._records) if self._chosen is None else len(self._chosen)

    @property
    def labels(self) -> np.ndarray:
        """The label of each image."""
        of_records = self._records['label'] if self._chosen is None else self._records['label'][self._chosen]
        return self._label_of[of_records]

    def _record(self, index: int) -> Any:
        return self._records[index if self._chosen is None else self._chosen[index]]

    def read(self, index: int) -> tuple[bytes, int]:
        """The undecoded file and its label. Raises OSError where it cannot be read."""
        record = self._record(index)
        label = int(self._label_of[record['label']])
        if record['size'] < 0:
            with open(self._folder + record['path'], 'rb', buffering=0) as file:
                return file.read(), label
        with open(self.root, 'rb', buffering=0) as file:
            return os.pread(file.fileno(), int(record['size']), int(record['offset'])), label

    def name(self, index: int) -> str:
        """Path of an image for messages; inside a tar file after a colon."""
        record = self._record(index)
        return f'{self.root}{"/" if record["size"] < 0 else ":"}{os.fsdecode(record["path"])}'


    @property
    def shown(self) -> str:
        """The source in messages."""
        return str(self.root)

    def facts(self) -> dict[str, Any]:
        """What there is, for a report."""
        return {'path': str(self.root), 'images': len(self), 'classes': len(self.classes),
                'smallest_class': int(self.counts.min()), 'largest_class': int(self.counts.max()),
                'other_files': sum(self.others.values()), 'other_endings': self.others}

    def check(self, index: int) -> None:
        """Decodes an image. Raises anything for one that cannot be."""
        decode(self.read(index)[0])


# What has images and a label for each
Images: TypeAlias = ImageFiles | TimmSource | Digits | Fake | IterableImageDataset


def check_files(train: ImageFiles | None, val: ImageFiles | None) -> tuple[list[str], list[str]]:
    """What can be seen in the indices without opening an image.

    Returns:
        errors, with which the results would be worthless, and warnings; each names the path and the cure.
    """
    errors, warnings = [], []
    for files, expected in ((train, 1_281_167), (val, 50_000)):
        if files is None:
            continue
        empty = [name for name, count in zip(files.folders, files.counts, strict=True) if not count]
        if empty:
            warnings.append(f'{files.root}: {len(empty)} class folders hold no image ({", ".join(empty[:5])}); add '
                            'images, or remove the folders')
        if files.loose:
            warnings.append(f'{files.root}: {files.loose:,} images lie in no class folder and are left out; move them '
                            'into one (tools/check_dataset.py --sort_val does it for ImageNet)')
        if files.others:
            warnings.append(f'{files.root}: {sum(files.others.values()):,} entries are no images and are left out: '
                            f'{show_others(files.others)}; give images an ending that Pillow knows, as .jpg or .png')
        if files.missing:
            warnings.append(f'{files.root}: {len(files.missing)} names of --class_map have no folder '
                            f'({labels.some(files.missing)}); check their spelling')
        if files.class_map and (left_out := int(files.counts.sum()) - len(files)):
            unmapped = labels.lacking(files.folders, list(map(str, files.class_map)))
            warnings.append(f'{files.root}: {left_out:,} images in {len(unmapped)} class folders that --class_map does '
                            f'not name ({labels.some(unmapped)}) are left out')
        if len(set(map(labels.normal, files.folders))) < len(files.folders):
            warnings.append(f'{files.root}: two class folders have one name, in two Unicode forms; merge them')
        wordnet = [name for name in files.folders if re.fullmatch(r'n\d{8}', name)]
        if len(wordnet) == len(files.folders) == 1000 and files.counts.sum() != expected:
            warnings.append(f"{files.root}: {files.counts.sum():,} images, but ImageNet's are {expected:,}; was it "
                            'unpacked to the end?')
    if train is not None and val is not None and (apart := labels.difference(
            train.classes, val.classes, we=str(train.root), they=str(val.root))):
        errors.append(f'the class folders differ: {apart}; a label is a position among the names, so make both '
                      'folders hold the same classes, or give --class_map')
    return errors, warnings
