"""Where the images come from: image folders, ImageNet's tar files, digits, made-up images, and all that timm reads.

A map-style source has `len`, `classes`, `read(i) -> (image, label)` and `name(i)`; `image` is the undecoded file as
bytes, or pixels as a PIL image or a uint8 array [H, W, 3]. Sources travel to the worker processes: what is large in
them is one array, which the workers share.
"""
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from recipes import Recipe, Run
from utils import UserError, derive_seed, log, nearest, write_atomically, write_json

Split = Literal['train', 'val']
EXTENSIONS = (*IMG_EXTENSIONS, '.gif')
FOLDERS = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid')}
GROUND_TRUTHS = ('ILSVRC2012_validation_ground_truth.txt', 'LOC_val_solution.csv')
TARS = {'train': 'ILSVRC2012_img_train.tar', 'val': 'ILSVRC2012_img_val.tar'}


def open_source(recipe: Recipe, run: Run, split: Split) -> Any:
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


def open_timm(recipe: Recipe, run: Run, split: Split) -> Any:
    """A data set by its name in timm's `create_dataset`. Raises UserError with timm's reason where it has none."""
    kind = recipe.data_set.partition('/')[0]
    if kind not in ('torch', 'hfds', 'hfids', 'wds', 'tfds'):
        known = ('image_folder', 'digits', 'fake', 'torch/cifar100', 'hfds/NAME', 'hfids/NAME', 'wds/NAME', 'tfds/NAME')
        raise UserError(f'--data_set {recipe.data_set} is unknown{nearest(recipe.data_set, known)}; '
                        f'choose from {", ".join(known)}')
    root = run.eval_data_path if split == 'val' and run.eval_data_path else run.data_path
    # Which members of a shard are images: for timm by itself, .jpg, .png and .webp alone
    more = {'input_key': ';'.join(dict.fromkeys(('jpg', 'png', 'webp', *(ending[1:] for ending in EXTENSIONS))))
            } if kind == 'wds' else {}
    try:
        data = create_dataset(
            recipe.data_set, root=root, split='train' if split == 'train' else 'validation', class_map=run.class_map,
            is_training=split == 'train', batch_size=run.batch_size or 1, seed=recipe.seed, **more)
    except (Exception, SystemExit) as error:  # anything that a foreign reader raises
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'--data_set {recipe.data_set}: the {split} images under {root} cannot be opened ({reason}); '
                        'check --data_path and that the package of the reader is installed') from error
    return data if isinstance(data, torch.utils.data.IterableDataset) else TimmSource(data)


def class_names(data: Any) -> list[str]:
    """The classes of one of timm's data sets by index, empty where it does not know them."""
    reader = getattr(data, 'reader', data)
    index = getattr(reader, 'class_to_idx', None) or {}
    return [str(name) for name, _ in sorted(index.items(), key=lambda item: item[1])]


class TimmSource:
    """A map-style data set of timm or torchvision."""

    in_memory = False

    def __init__(self, data: Any):
        self._data = data
        self.classes = class_names(data)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[Any, int]:
        """The undecoded file where there is one, else the pixels, and the label."""
        if not hasattr(self._data, 'reader'):
            return self._data[index]
        file, label = self._data.reader[index][:2]
        with file:
            return file.read(), label

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


# ---- Files ----------------------------------------------------------------------------------------------------------

def find_files(root: Path, split: Split, *, given: bool = False) -> Path:
    """The folder or tar file with the images of one half of a data set.

    Args:
        root: folder that has it.
        given: `root` may be the folder itself.

    Raises:
        UserError: with what was looked for.
    """
    if not root.exists():
        raise UserError(f'{root} does not exist; give --data_path the folder that has train/ and val/')
    if root.is_file():
        return root
    names = (*FOLDERS[split], TARS[split])
    for name in names:
        if (root / name).exists():
            return root / name
    if given:
        return root
    cure = ', --eval_data_path the folder of the test classes, or --disable_eval' if split == 'val' else ''
    raise UserError(f'{root} has none of {", ".join(names)}; give --data_path the folder with train/ and val/{cure}')


# One image: its path below the root, the number of its class folder, and where it lies in a tar file (size -1: it is a
# file of its own). 1.28 million of them are one array, mapped into memory, which all worker processes share.
def _records(found: list[tuple[str, int, int, int]]) -> np.ndarray:
    paths = [os.fsencode(path) for path, *_ in found]
    dtype = [('path', f'S{max(map(len, paths), default=1)}'), ('label', '<i4'), ('offset', '<i8'), ('size', '<i8')]
    records = np.empty(len(found), dtype)
    records['path'] = paths
    for column, name in enumerate(('label', 'offset', 'size'), start=1):
        records[name] = [entry[column] for entry in found]
    return records


def is_image(name: str) -> bool:
    """Whether a file counts as an image, by its ending."""
    return not name.startswith('.') and name.lower().endswith(EXTENSIONS)


def _scan_class(root: str, name: str, label: int) -> tuple[list[tuple[str, int, int, int]], dict[str, int], int]:
    """The images under a class folder, the change times of its folders, and how many files are no images."""
    found, stamps, others, pending = [], {}, 0, [name]
    while pending:
        folder = pending.pop()
        full = os.path.join(root, folder)
        stamps[folder] = os.stat(full).st_mtime_ns  # before reading, so that a file added meanwhile is noticed
        with os.scandir(full) as entries:
            for entry in entries:
                if is_image(entry.name):
                    found.append((os.path.join(folder, entry.name), label, 0, -1))
                elif entry.is_dir():
                    pending.append(os.path.join(folder, entry.name))
                else:
                    others += 1
    return sorted(found), stamps, others


def _scan_folder(root: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Indexes a folder of class folders. Threads, since a network file system answers a folder in milliseconds."""
    stamps = {'': os.stat(root).st_mtime_ns}
    with os.scandir(root) as entries:
        listing = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith('.')]
    classes = sorted(name for name, is_folder in listing if is_folder)
    loose = sum(is_image(name) for name, is_folder in listing if not is_folder)
    found, others = [], 0
    with ThreadPoolExecutor(16) as pool:
        scans = pool.map(lambda label: _scan_class(root, classes[label], label), range(len(classes)))
        for images, folders, ignored in tqdm(scans, f'indexing {root}', len(classes), unit=' classes', disable=None):
            found += images
            stamps |= folders
            others += ignored
    return _records(found), {'classes': classes, 'stamps': stamps, 'loose': loose, 'others': others}


def _members(archive: tarfile.TarFile, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, position in the outermost file, and size of all files in a tar file and in the tar files in it."""
    for member in archive:
        if member.isfile() and member.name.endswith('.tar'):
            with tarfile.open(fileobj=archive.extractfile(member)) as inner:
                for name, offset, size in _members(inner, start + member.offset_data):
                    yield os.path.join(Path(member.name).stem, name), offset, size
        elif member.isfile():
            yield member.name, start + member.offset_data, member.size


def _scan_tar(path: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Indexes a tar file of classes, which are folders or tar files in it, without extracting it.

    A flat one, as ImageNet's test images are, takes its classes from a ground-truth file that lies beside it.
    """
    with tarfile.open(path) as archive:
        members = tqdm(_members(archive), f'indexing {path}', unit=' images', disable=None)
        entries = sorted(entry for entry in members if is_image(os.path.basename(entry[0])))
    folders = [os.path.basename(os.path.dirname(name)) for name, _, _ in entries]
    stamps = {'': os.stat(path).st_mtime_ns}
    for name in GROUND_TRUTHS:
        truth = Path(path).with_name(name)
        if not any(folders) and truth.exists():
            labels = read_ground_truth(truth)
            folders = [labels.get(Path(name).stem, '') for name, _, _ in entries]
            stamps[str(truth)] = truth.stat().st_mtime_ns
    loose = folders.count('')
    classes = sorted(set(folders) - {''})
    number = {name: label for label, name in enumerate(classes)}
    found = [(name, number[folder], offset, size) for (name, offset, size), folder in zip(entries, folders, strict=True)
             if folder]
    return _records(found), {'classes': classes, 'stamps': stamps, 'loose': loose, 'others': 0}


def read_ground_truth(path: Path) -> dict[str, str]:
    """The class folder of each of ImageNet's test images, by the image's name without its ending.

    Takes the development kit's `ILSVRC2012_validation_ground_truth.txt` (numbers, with `meta.mat` beside it), a list
    of wordnet ids in the images' order, or Kaggle's `LOC_val_solution.csv`.

    Raises:
        UserError: where the file is none of these.
    """
    try:
        lines = path.read_text().split('\n')
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error}); give the ground-truth file of the test images') from None
    lines = [line.strip() for line in lines if line.strip()]
    if lines and lines[0].startswith('ImageId'):
        return {name: boxes.split()[0] for name, boxes in (line.split(',', 1) for line in lines[1:])}
    if lines and all(line.isdecimal() for line in lines):
        wordnet = _wordnet_ids(path.with_name('meta.mat'))
        if unknown := set(map(int, lines)) - set(wordnet):
            raise UserError(f'{path}: class {min(unknown)} is not in meta.mat; take both from one development kit')
        lines = [wordnet[int(line)] for line in lines]
    if not lines or any(len(line.split()) != 1 for line in lines):
        raise UserError(f'{path} is no ground-truth file; give ILSVRC2012_validation_ground_truth.txt with meta.mat '
                        'beside it, LOC_val_solution.csv, or a wordnet id a line')
    return {f'ILSVRC2012_val_{number:08d}': line for number, line in enumerate(lines, start=1)}


def _wordnet_ids(path: Path) -> dict[int, str]:
    """The wordnet ids of ImageNet's 1000 classes by the numbers of its development kit, from its meta.mat."""
    try:
        from scipy.io import loadmat
        synsets = loadmat(path, squeeze_me=True)['synsets']
    except ImportError:
        raise UserError(f'{path} needs scipy: pip install scipy') from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); it belongs to ImageNet's development kit, beside the "
                        'ground-truth file') from None
    # Inner nodes of the hierarchy have children; the classes are its leaves
    return {int(synset['ILSVRC2012_ID']): str(synset['WNID']) for synset in synsets if synset['num_children'] == 0}


def cache_folder() -> Path:
    """Where indices are kept: in the user's cache, since data is often read-only and shared."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'moganet'


def _unchanged(root: str, stamps: dict[str, int]) -> bool:
    """Whether no folder of an index has gained, lost or renamed anything."""
    try:
        with ThreadPoolExecutor(16) as pool:
            now = pool.map(lambda name: os.stat(os.path.join(root, name) if name else root).st_mtime_ns, stamps)
            return all(a == b for a, b in zip(stamps.values(), now, strict=True))
    except OSError:
        return False


def load_index(root: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The index of a folder or tar file: read from the user's cache where nothing has changed, else built and kept.

    Returns:
        records with the fields path, label, offset, size, mapped into memory; and `classes` (folder names), `loose`
        (images outside of any class), `others` (files that are no images).
    """
    resolved = str(root.resolve())
    note = cache_folder() / f'{root.name}-{hashlib.blake2b(os.fsencode(resolved), digest_size=8).hexdigest()}.json'
    try:
        facts = json.loads(note.read_text())
        if facts['root'] == resolved and _unchanged(resolved, facts['stamps']):
            return np.load(note.with_name(facts['records']), mmap_mode='r'), facts
    except (OSError, ValueError, KeyError, EOFError):  # none yet, or a damaged one
        pass
    log.info('indexing the images of %s, once', root)
    records, facts = (_scan_tar if root.is_file() else _scan_folder)(resolved)
    if not len(records):
        return records, facts  # about to be refused, and the cure may not show in the folders
    name = f'{note.stem}-{hashlib.blake2b(records.tobytes(), digest_size=8).hexdigest()}.npy'
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note.with_name(name), lambda file: np.save(file, records))
        write_json(note, {'root': resolved, 'records': name, **facts})
        for old in note.parent.glob(f'{note.stem}-*.npy'):
            if old.name != name:
                old.unlink()
        return np.load(note.with_name(name), mmap_mode='r'), facts
    except OSError as error:
        log.warning('the index of %s cannot be kept (%s); it will be built again next time', root, error)
        return records, facts


class ImageFiles:
    """The images of a folder of class folders, or of a tar file of classes, in sorted order."""

    in_memory = False

    def __init__(self, root: Path, *, class_map: str | None = None):
        """
        Args:
            root: folder or tar file.
            class_map: file that maps class names to labels; other classes are left out. By default the labels are the
                positions of the sorted names.

        Raises:
            UserError: where no image lies in a class.
        """
        self.root, self._folder = root, os.fsencode(root) + b'/'
        self._records, facts = load_index(root)
        self._records = self._records.view(np.ndarray)  # numpy takes ten times as long over an item of a memmap
        names: list[str] = facts['classes']
        if not len(self._records) and facts['loose']:
            cure = (f'put {" (with meta.mat) or ".join(GROUND_TRUTHS)} beside it' if root.is_file() else
                    'give each class a folder of its own; tools/check_dataset.py --sort_val FILE does it for ImageNet')
            raise UserError(f'{root} holds {facts["loose"]:,} images in no class folder; {cure}')
        if not len(self._records):
            raise UserError(f'{root} holds no image in a class folder ({root}/CLASS/IMAGE with an ending of '
                            f'{", ".join(EXTENSIONS)}); check --data_path')
        if class_map is None:
            self.classes, self._label_of = names, np.arange(len(names))
        else:
            try:
                labels = load_class_map(class_map, root)
            except (OSError, AssertionError, ValueError, KeyError) as error:
                raise UserError(f'--class_map {class_map} cannot be read ({error}); give a text file with a class name '
                                'a line, or NAME LABEL lines') from None
            self.classes = [name for name, _ in sorted(labels.items(), key=lambda item: item[1])]
            self._label_of = np.array([labels.get(name, -1) for name in names])
        kept = self._label_of[self._records['label']] >= 0
        self._chosen = None if kept.all() else np.flatnonzero(kept)
        # Images of each class folder, which with a class map are not the classes
        self.folders, self.counts = names, np.bincount(self._records['label'], minlength=len(names))
        self.loose, self.others = facts['loose'], facts['others']

    def __getstate__(self) -> dict[str, Any]:
        """Spawned workers map the index again instead of receiving a copy of it."""
        mapped = self._records.base
        return self.__dict__ | {'_records': mapped.filename if isinstance(mapped, np.memmap) else self._records}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not isinstance(self._records, np.ndarray):
            self._records = np.load(self._records, mmap_mode='r').view(np.ndarray)

    def __len__(self) -> int:
        return len(self._records) if self._chosen is None else len(self._chosen)

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
        wordnet = [name for name in files.folders if re.fullmatch(r'n\d{8}', name)]
        if len(wordnet) == len(files.folders) == 1000 and files.counts.sum() != expected:
            warnings.append(f"{files.root}: {files.counts.sum():,} images, but ImageNet's are {expected:,}; was it "
                            'unpacked to the end?')
    if train is not None and val is not None and train.classes != val.classes:
        missing, more = sorted(set(train.classes) - set(val.classes)), sorted(set(val.classes) - set(train.classes))
        parts = [f'{len(names)} only in {files.root} ({", ".join(names[:3])})'
                 for names, files in ((missing, train), (more, val)) if names]
        errors.append(f'the class folders differ: {" and ".join(parts)}; the labels are positions in the sorted names, '
                      'so make both folders hold the same classes, or give --class_map')
    return errors, warnings
