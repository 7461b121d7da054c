"""Which image files there are: the walk over folders, tar files as they are, ground truths, and the kept index."""
import contextlib
import functools
import hashlib
import heapq
import json
import os
import posixpath
import re
import socket
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import UserError, expand, log, rank_zero_first, write_atomically, write_json

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
    claims: dict[Any, str] = {}
    for folder in (root, *map(str, Path(root).resolve().parents)):
        with contextlib.suppress(OSError):  # a folder above may be closed; one that is to be read is told by the walk
            claims[_identity(folder, os.stat(folder))] = ''
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
    classes: list[str] = []
    others: Counter[str] = Counter()
    claims = _claims(root)
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
        # The members that it has come to; getmembers() would read on
        found = archive.members if archive is not None else ()  # type: ignore[attr-defined]
        if found:
            raise UserError(f'{shown} is cut off or damaged after {len(found):,} members ({reason}); copy or '
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


_found: dict[str, str] = {}  # by identity, the digest of the index that this process has read or built
_told: dict[str, str] = {}  # within `indexing`, the same of rank 0


@contextlib.contextmanager
def indexing() -> Iterator[None]:
    """Within it, rank 0 looks through the data first; a rank that finds rank 0's index in its cache takes it as it is.

    So the folders are looked at once, and not by hundreds of ranks. Where the home folder is not shared, the first rank
    of each node builds the index anew.
    """
    with rank_zero_first('index', lambda: json.dumps(_found)) as told:
        _told.update(json.loads(told or '{}'))
        try:
            yield
        finally:
            _told.clear()


def _note_index(identity: str, digest: str) -> None:
    """Notes which index this process takes. Raises UserError where rank 0 has another: they would mix up the images."""
    _found[identity] = digest
    if _told.get(identity, digest) != digest:
        raise UserError(f'{identity} holds other images here, on {socket.gethostname()}, than where rank 0 is; copy '
                        'the data anew, or give a --data_path that all nodes share')


def keep_index(identity: str, stem: str, *, rules: str, unchanged: Callable[[dict[str, Any]], bool],
               build: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any], bool]]
               ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An index: read from the user's cache where nothing has changed, else built and kept.

    Args:
        identity: what it is an index of, whole paths.
        stem: beginning of the names of its files.
        rules: by which it is built; one that was built by others is built again.
        unchanged: whether what the index holds is still true, by its facts.
        build: returns arrays by name, facts, and whether they may be kept.

    Returns:
        the arrays, mapped into memory where they are kept, and the facts.

    Raises:
        UserError: for another index than rank 0 has.
    """
    note = cache_folder() / f'{stem}-{hashlib.blake2b(os.fsencode(identity), digest_size=8).hexdigest()}.json'
    try:
        facts = json.loads(note.read_text())
        digest = ' '.join(file.removesuffix('.npy')[-16:] for file in facts['arrays'].values())
        if facts['root'] == identity and facts['rules'] == rules and (
                _told.get(identity) == digest or unchanged(facts)):
            arrays = {name: np.load(note.with_name(file), mmap_mode='r') for name, file in facts['arrays'].items()}
            _note_index(identity, digest)
            return arrays, facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):  # none yet, or a damaged one
        pass
    arrays, facts, lasting = build()
    digests = {name: hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest() for name, array in arrays.items()}
    _note_index(identity, ' '.join(digests.values()))
    if not lasting:
        return arrays, facts
    files = {name: f'{note.stem}-{name}-{digest}.npy' for name, digest in digests.items()}
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            write_atomically(note.with_name(file), functools.partial(np.save, arr=arrays[name]))
        write_json(note, {'root': identity, 'rules': rules, 'arrays': files, **facts})
        for old in note.parent.glob(f'{note.stem}-*.npy'):
            if old.name not in files.values():
                old.unlink()
        return {name: np.load(note.with_name(file), mmap_mode='r') for name, file in files.items()}, facts
    except OSError as error:
        log.warning('the index of %s cannot be kept (%s); it will be built again next time', stem, error)
        return arrays, facts


def to_file(array: np.ndarray) -> np.ndarray | str:
    """An array for a spawned worker: the file that it is mapped from, which costs the worker no copy."""
    base = array if isinstance(array, np.memmap) else array.base
    return str(base.filename) if isinstance(base, np.memmap) else array


def from_file(array: np.ndarray | str) -> np.ndarray:
    """What `to_file` gave, as a plain array: numpy takes ten times as long over an item of a memmap."""
    return (np.load(array, mmap_mode='r') if isinstance(array, str) else array).view(np.ndarray)


def load_index(root: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The index of a folder or tar file, kept in the user's cache.

    Returns:
        records with the fields path, label, offset, size, mapped into memory; and `classes` (folder names), `loose`
        (images outside of any class), `others` (how many files were left out, by their endings).

    Raises:
        UserError: for what cannot be read, and for other images than rank 0 has.
    """
    resolved = str(root.resolve())

    def build() -> tuple[dict[str, np.ndarray], dict[str, Any], bool]:
        log.info('indexing the images of %s, once', root)
        records, facts = (_scan_tar if root.is_file() else _scan_folder)(resolved)
        # About to be refused, or a disk is not mounted: the cure may not show in the folders
        return {'records': records}, facts, len(records) > 0 and 'broken links' not in facts['others']

    arrays, facts = keep_index(resolved, root.name, rules=RULES, build=build,
                               unchanged=lambda facts: _unchanged(resolved, facts['stamps']))
    return arrays['records'], facts
