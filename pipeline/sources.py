"""Where the images come from: image folders, ImageNet's tar files, digits, made-up images, and all that timm reads.

A map-style source has `len`, `classes`, `read(i) -> (image, label)` and `name(i)`; `image` is the undecoded file as
bytes, or pixels as a PIL image or a uint8 array [H, W, 3]. Sources travel to the worker processes: what is large in
them is one array, which the workers share.
"""
import contextlib
import hashlib
import heapq
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from tqdm import tqdm

from pipeline import labels
from pipeline.loaders import BadLabel
from recipes import Recipe, Run
from utils import UserError, derive_seed, expand, log, nearest, write_atomically, write_json

Split = Literal['train', 'val']
# The endings of what Pillow reads, but for documents, drawings, films and scientific data
Image.init()
NO_IMAGES = {'BUFR', 'EPS', 'FITS', 'FLI', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PDF', 'WMF'}
EXTENSIONS = tuple(sorted(ending for ending, form in Image.registered_extensions().items()
                          if (form in Image.OPEN or form == 'MPO') and form not in NO_IMAGES))
# An index that was built by other rules is built again: raise the number where a rule of the walk changes
RULES = f'2 {" ".join(EXTENSIONS)}'
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
    class_map = labels.read_class_map(run.class_map, Path(root)) if run.class_map else None
    try:
        data = create_dataset(
            recipe.data_set, root=root, split='train' if split == 'train' else 'validation', class_map=class_map,
            is_training=split == 'train', batch_size=run.batch_size or 1, seed=recipe.seed, **more)
    except (Exception, SystemExit) as error:  # anything that a foreign reader raises
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'--data_set {recipe.data_set}: the {split} images under {root} cannot be opened ({reason}); '
                        'check --data_path and that the package of the reader is installed') from error
    if not isinstance(data, torch.utils.data.IterableDataset):
        return TimmSource(data, class_map)
    data.class_map = class_map  # for the checkpoints
    return data


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
        known = self._label_of is not None and isinstance(label, (int, np.integer)) and 0 <= label < len(self._label_of)
        return self._label_of[label] if known else label

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[Any, int]:
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


# ---- Files ----------------------------------------------------------------------------------------------------------

def find_files(root: Path, split: Split, *, given: bool = False) -> Path:
    """The folder or tar file with the images of one half of a data set.

    Args:
        root: folder that has it.
        given: `root` may be the folder itself.

    Raises:
        UserError: with what was looked for.
    """
    names = (*FOLDERS[split], TARS[split])
    try:
        if not root.exists():
            raise UserError(f'{root} does not exist; give --data_path the folder that has train/ and val/')
        if root.is_file():
            return root
        for name in names:
            if (root / name).exists():
                return root / name
    except OSError as error:
        raise _cannot_read(root, error) from None
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


def _ending(name: str) -> str:
    """How a file that is no image is told."""
    return os.path.splitext(name)[1].lower() or 'without an ending'


def _cannot_read(path: str | Path, error: OSError) -> UserError:
    cure = ('allow it to be read (chmod -R a+rX), or move it away' if isinstance(error, PermissionError) else
            'check that it is there, is a folder, and that its disk is well')
    return UserError(f'{path} cannot be read ({error.strerror or error}); {cure}')


def kind_of(entry: os.DirEntry[str]) -> str:
    """What an entry of a folder is: 'image', 'folder', 'link' (to a folder), 'hidden', or how it is told if left out.

    Opens nothing, and asks the disk about links alone: a named pipe would wait for its writer forever.
    """
    if entry.name.startswith('.'):
        return 'hidden'
    try:
        if entry.is_dir():
            return 'link' if entry.is_symlink() else 'folder'
        if entry.is_file():
            return 'image' if is_image(entry.name) else _ending(entry.name)
        return 'broken links' if entry.is_symlink() and not os.path.exists(entry.path) else 'special files'
    except PermissionError:
        raise
    except OSError:  # a link that leads to itself
        return 'broken links'


@dataclass
class _Walk:
    """What lies below a folder: images, change times of the folders, links to folders, files left out by their kind."""

    images: list[str] = field(default_factory=list)
    stamps: dict[str, int] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def _identity(path: str, facts: os.stat_result) -> Any:
    """What two routes to one folder have in common; some network file systems number no folders."""
    return (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(path)


def _walk(root: str, top: str, claims: Mapping[Any, str]) -> tuple[_Walk, dict[Any, str]]:
    """Walks a folder below `root`, without following links.

    Args:
        root: where the paths begin.
        top: path of the folder below the root.
        claims: folders that are not entered unless by this path.

    Returns:
        what was found, and the folders that were entered, as `claims`.

    Raises:
        UserError: for a folder that cannot be read.
    """
    found, entered, pending = _Walk(), {}, [top]
    while pending:
        folder = pending.pop()
        full = os.path.join(root, folder)
        try:
            facts = os.stat(full)
            identity = _identity(full, facts)
            if claims.get(identity, folder) != folder:
                found.others['folders read by another path'] += 1
                continue
            entered[identity] = folder
            found.stamps[folder] = facts.st_mtime_ns  # before reading, so that a file added meanwhile is noticed
            with os.scandir(full) as entries:
                for entry in entries:
                    path, kind = os.path.join(folder, entry.name), kind_of(entry)
                    if kind == 'image':
                        found.images.append(path)
                    elif kind == 'folder':
                        pending.append(path)
                    elif kind == 'link':
                        found.links.append(path)
                    elif kind != 'hidden':
                        found.others[kind] += 1
        except OSError as error:
            raise _cannot_read(error.filename or full, error) from None  # a link out of it may be the closed one
    return found, entered


def walk(root: str, tops: Sequence[str], claims: Mapping[Any, str]) -> Iterator[_Walk]:
    """Walks folders below `root`, following links; each real folder is entered once, and hidden ones are not.

    Where several paths lead to a folder, the path with the fewest links wins, then the first in the alphabet: a link to
    what is there without it changes nothing. Threads, since a network file system answers a folder in milliseconds.

    Args:
        root: where the paths begin.
        tops: the folders; all that is found below one of them belongs to it.
        claims: paths of the folders that may be entered by that path alone, by identity: `tops` and what lies above.

    Yields:
        what was found below each, with sorted images.

    Raises:
        UserError: for a folder that cannot be read.
    """
    entered, walks, links = dict(claims), [], []
    with ThreadPoolExecutor(16) as pool:
        for number, (found, folders) in enumerate(tqdm(
                pool.map(lambda top: _walk(root, top, claims), tops), f'indexing {root}', len(tops), unit=' folders',
                disable=None)):
            walks.append(found)
            entered |= folders
            links += [(1, link, number) for link in found.links]
    heapq.heapify(links)
    while links:
        count, link, number = heapq.heappop(links)
        found, folders = _walk(root, link, entered)
        entered |= folders
        walks[number].images += found.images
        walks[number].stamps |= found.stamps
        walks[number].others += found.others
        for further in found.links:
            heapq.heappush(links, (count + 1, further, number))
    for found in walks:
        found.images.sort()
        yield found


def _claims(root: str) -> dict[Any, str]:
    """The root and the folders above it, which a link below it must not lead to."""
    claims = {}
    for folder in (root, *Path(root).resolve().parents):
        with contextlib.suppress(OSError):  # a folder above may be closed; one that is to be read is told by the walk
            claims[_identity(str(folder), os.stat(folder))] = ''
    return claims


def find_images(folder: str) -> list[str]:
    """All images below a folder, as training would find them. Raises UserError for a folder that cannot be read."""
    found, = walk(folder, [''], _claims(folder))
    return list(map(str, sorted(Path(folder, path) for path in found.images)))


def _scan_folder(root: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Indexes a folder of class folders; a link to a folder is a class of its own name.

    Raises:
        UserError: for a folder that cannot be read, and for two classes that are one folder.
    """
    classes, others, claims = [], Counter(), _claims(root)
    try:
        stamps = {'': os.stat(root).st_mtime_ns}
        with os.scandir(root) as entries:
            kinds = {entry.name: kind_of(entry) for entry in entries}
        for name in sorted(name for name, kind in kinds.items() if kind in ('folder', 'link')):
            full = os.path.join(root, name)
            other = claims.setdefault(_identity(full, os.stat(full)), name)
            if other == name:
                classes.append(name)
            elif other:
                raise UserError(f'{root}: the class folders {other} and {name} are one folder, {os.path.realpath(full)}'
                                ', whose images would be of two classes; remove one of the links')
            else:
                others['folders read by another path'] += 1
    except OSError as error:
        raise _cannot_read(error.filename or root, error) from None
    others['broken links'] += sum(kind == 'broken links' for kind in kinds.values())
    found = []
    for label, below in enumerate(walk(root, classes, claims)):
        found += [(path, label, 0, -1) for path in below.images]
        stamps |= below.stamps
        others += below.others
    loose = sum(kind == 'image' for kind in kinds.values())
    return _records(found), {'classes': classes, 'stamps': stamps, 'loose': loose, 'others': dict(+others)}


# First bytes of what is handed over as a tar file and is none
PACKED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ\x00': 'xz', b'(\xb5/\xfd': 'zstd', b'\x04"M\x18': 'lz4',
          b']\x00\x00': 'lzma', b'\x1f\x9d': 'compress', b'PK': 'zip', b'7z\xbc\xaf': '7z', b'Rar!': 'rar'}


@contextlib.contextmanager
def _open_tar(shown: str, file: Any) -> Iterator[tarfile.TarFile]:
    """A plain tar file, which must have been read to its end without fault when the body is left.

    Args:
        shown: path for messages.
        file: open for reading, at its beginning.

    Raises:
        UserError: for a file that is compressed, cut off, damaged or no tar file, whatever tarfile raises about it.
    """
    archive = None
    try:
        archive = tarfile.open(fileobj=file, mode='r:')  # noqa: SIM115
        yield archive
        # tarfile takes a header that is cut off or damaged for the end, which is a block of zeros
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError('its end is missing')
    except UserError:
        raise
    except Exception as error:  # tarfile passes on what its parts raise: OSError, EOFError, ValueError, RecursionError
        reason = ' '.join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno:
            raise UserError(f'{shown} cannot be read ({reason}); check its permissions and its disk') from None
        if archive is not None and archive.members:
            raise UserError(f'{shown} is cut off or damaged after {len(archive.members):,} members ({reason}); copy or '
                            'download it again, and compare its size and checksum') from None
        file.seek(0)
        start = file.read(8)
        packed = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
        if packed:
            raise UserError(f'{shown} is compressed ({packed}); unpack it to a plain tar file or to class folders: '
                            'images are read from their places in the file') from None
        raise UserError(f'{shown} is {"no tar file" if start else "empty"} ({reason}); give a tar file of classes, '
                        'downloaded to its end, or a folder') from None


def _members(shown: str, file: Any, others: Counter[str], start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, position in the outermost file, and size of the images in a tar file and in the tar files in it.

    Args:
        shown: path for messages.
        file: open for reading, at its beginning.
        others: counts what is left out.
        start: where the file begins in the outermost one.
    """
    with _open_tar(shown, file) as archive:
        last = -1
        for member in archive:
            if member.offset <= last or member.size < 0:  # tarfile would go back and read the same again, forever
                raise tarfile.ReadError('a header names a wrong size')
            last = member.offset
            parts = member.name.split('/')
            if member.isdir() or any(part.startswith('.') and part not in ('.', '..') for part in parts):
                continue
            if not member.isfile() or member.issparse():
                others['links' if member.issym() or member.islnk() else 'special files'] += 1
            elif member.name.endswith('.tar'):
                inside = _members(f'{shown}:{member.name}', archive.extractfile(member), others,
                                  start + member.offset_data)
                for name, offset, size in inside:
                    yield f'{Path(member.name).stem}/{name}', offset, size
            elif is_image(parts[-1]):
                yield member.name, start + member.offset_data, member.size
            else:
                others[_ending(parts[-1])] += 1


def _scan_tar(path: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Indexes a tar file of classes, which are folders or tar files in it, without extracting it.

    A flat one, as ImageNet's test images are, takes its classes from a ground-truth file that lies beside it. Of two
    members of one name the last counts, as in unpacking.

    Raises:
        UserError: for a file that is no whole and plain tar file.
    """
    others: Counter[str] = Counter()
    try:
        with open(path, 'rb') as file:
            stamps = {'': os.fstat(file.fileno()).st_mtime_ns}
            members = tqdm(_members(path, file, others), f'indexing {path}', unit=' images', disable=None)
            places = {}
            for name, offset, size in members:
                others['members that a later one replaces'] += name in places
                places[name] = offset, size
    except OSError as error:
        raise _cannot_read(path, error) from None
    entries = sorted((name, *place) for name, place in places.items())
    # Names may be absolute, or lead upwards or nowhere (`./`)
    folders = [posixpath.basename(posixpath.dirname(posixpath.normpath(f'/{name}'))) for name, _, _ in entries]
    for name in GROUND_TRUTHS:
        truth = Path(path).with_name(name)
        if not any(folders) and truth.is_file():
            labels = read_ground_truth(truth)
            folders = [labels.get(Path(name).stem, '') for name, _, _ in entries]
            stamps[str(truth)] = truth.stat().st_mtime_ns
    loose = folders.count('')
    classes = sorted(set(folders) - {''})
    number = {name: label for label, name in enumerate(classes)}
    found = [(name, number[folder], offset, size) for (name, offset, size), folder in zip(entries, folders, strict=True)
             if folder]
    return _records(found), {'classes': classes, 'stamps': stamps, 'loose': loose, 'others': dict(+others)}


def show_others(others: Mapping[str, int]) -> str:
    """The files that were left out, by their endings, the most frequent first."""
    counts = Counter(others).most_common()
    more = sum(count for _, count in counts[5:])
    return ', '.join(f'{count:,} {kind}' for kind, count in counts[:5]) + (f', {more:,} others' if more else '')


def read_ground_truth(path: Path) -> dict[str, str]:
    """The class folder of each of ImageNet's test images, by the image's name without its ending.

    Takes the development kit's `ILSVRC2012_validation_ground_truth.txt` (numbers, with `meta.mat` beside it), a list
    of wordnet ids in the images' order, or Kaggle's `LOC_val_solution.csv`.

    Raises:
        UserError: where the file is none of these.
    """
    try:
        lines = path.read_text(encoding='utf-8-sig').split('\n')
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error}); give the ground-truth file of the test images') from None
    lines = [line.strip() for line in lines if line.strip()]
    if lines and lines[0].startswith('ImageId'):
        rows = [re.fullmatch(r'([^,\s]+),"?(\w[\w.-]{0,254})((?: \d+){4}.*)', line) for line in lines[1:]]
        if not rows or None in rows:
            bad = lines[rows.index(None) + 1] if rows else lines[0]
            raise UserError(f'{path} is cut off or damaged at the line {bad[:40]!r}; get the file again')
        return {row[1]: row[2] for row in rows}
    if lines and all(re.fullmatch('[0-9]{1,9}', line) for line in lines):
        wordnet = _wordnet_ids(path.with_name('meta.mat'))
        if unknown := set(map(int, lines)) - set(wordnet):
            raise UserError(f'{path}: class {min(unknown)} is not in meta.mat; take both from one development kit')
        lines = [wordnet[int(line)] for line in lines]
    if not lines or not all(re.fullmatch(r'\w[\w.-]{0,254}', line) for line in lines):  # they become folders
        raise UserError(f'{path} is no ground-truth file; give ILSVRC2012_validation_ground_truth.txt with meta.mat '
                        'beside it, LOC_val_solution.csv, or a wordnet id a line')
    return {f'ILSVRC2012_val_{number:08d}': line for number, line in enumerate(lines, start=1)}


def _wordnet_ids(path: Path) -> dict[int, str]:
    """The wordnet ids of ImageNet's 1000 classes by the numbers of its development kit, from its meta.mat."""
    try:
        from scipy.io import loadmat
        synsets = loadmat(path, squeeze_me=True)['synsets']
        # Inner nodes of the hierarchy have children; the classes are its leaves
        return {int(synset['ILSVRC2012_ID']): str(synset['WNID']) for synset in synsets if synset['num_children'] == 0}
    except ImportError:
        raise UserError(f'{path} needs scipy: pip install scipy') from None
    except Exception as error:  # a damaged file makes scipy raise anything
        raise UserError(f"{path} cannot be read ({error}); it belongs to ImageNet's development kit, beside the "
                        'ground-truth file') from None


def cache_folder() -> Path:
    """Where indices are kept: in the user's cache, since data is often read-only and shared."""
    return Path(expand(os.environ.get('XDG_CACHE_HOME') or '~/.cache')) / 'moganet'


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
        (images outside of any class), `others` (how many files were left out, by their endings).

    Raises:
        UserError: for what cannot be read.
    """
    resolved = str(root.resolve())
    note = cache_folder() / f'{root.name}-{hashlib.blake2b(os.fsencode(resolved), digest_size=8).hexdigest()}.json'
    try:
        facts = json.loads(note.read_text())
        if facts['root'] == resolved and facts['rules'] == RULES and _unchanged(resolved, facts['stamps']):
            return np.load(note.with_name(facts['records']), mmap_mode='r'), facts
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # none yet, or a damaged one
        pass
    log.info('indexing the images of %s, once', root)
    records, facts = (_scan_tar if root.is_file() else _scan_folder)(resolved)
    # About to be refused, or a disk is not mounted: the cure may not show in the folders
    if not len(records) or 'broken links' in facts['others']:
        return records, facts
    name = f'{note.stem}-{hashlib.blake2b(records.tobytes(), digest_size=8).hexdigest()}.npy'
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note.with_name(name), lambda file: np.save(file, records))
        write_json(note, {'root': resolved, 'rules': RULES, 'records': name, **facts})
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
        errors.append(f'the class folders differ: {apart}; the labels are positions in the sorted names, so make both '
                      'folders hold the same classes, or give --class_map')
    return errors, warnings
