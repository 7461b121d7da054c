"""The data-set doctor (`tools/check_dataset.py --leaks`): images in both halves, balance, sizes, how to train.

Two images are equal where their files are equal. They are near where their perceptual hashes are near: one was resized,
compressed again or made a little brighter. An image that was cropped or mirrored is not found.
"""
import hashlib
import itertools
import math
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline import augmentation
from pipeline.sources import ImageFiles
from utils import UserError

try:
    import imagehash
except ImportError:
    imagehash = None

# Hashes of 64 bits are near where at most so many bits differ. Of random hashes, two in 10^13 pairs are near
NEAR = 4
BANDS = (0, 13, 26, 39, 52, 64)  # bits: where at most four differ, one of the five bands is equal
UNBALANCED = 10  # times as many images in the largest class as in the smallest
FACTS = np.dtype([('file', 'S16'), ('hash', np.uint64), ('label', np.int64), ('width', np.int64),
                  ('height', np.int64), ('bad', bool)])
EXAMPLES = 5

_files: ImageFiles  # of a worker process


# ---- Every image, on all cores --------------------------------------------------------------------------------------

def _open(files: ImageFiles) -> None:
    global _files
    _files = files


def _look(look: Callable[[ImageFiles, int], Any], index: int) -> Any:
    return look(_files, index)


def each_image(files: ImageFiles, look: Callable[[ImageFiles, int], Any], *, workers: int | None,
               what: str) -> list[Any]:
    """What `look(files, index)`, a module's function, returns for each image.

    Args:
        workers: processes; all cores by default.
        what: the word for the work, which the bar shows.

    Raises:
        UserError: where a process is killed.
    """
    # multiprocessing.Pool would wait for ever for the work that a killed process had begun
    with ProcessPoolExecutor(workers, initializer=_open, initargs=(files,)) as pool:
        results = pool.map(_look, [look] * len(files), range(len(files)), chunksize=64)
        try:
            return list(tqdm(results, f'{what} {files.shown}', len(files), unit=' images', disable=None))
        except BrokenProcessPool:
            raise UserError('a decoding process was killed, as the system does when memory runs out: give fewer '
                            '--workers, or more memory') from None


def _facts(files: ImageFiles, index: int) -> tuple[Any, ...]:
    """A row of FACTS. A file that is no image has its hash alone."""
    content, label = files.read(index)
    file = hashlib.blake2b(content, digest_size=16).digest()
    try:
        with augmentation.refusing_bad_images():
            pixels = augmentation.decode(content)
            bits = imagehash.phash(Image.fromarray(pixels)).hash.flatten()
    except augmentation.BadImage:
        return file, 0, label, 0, 0, True
    return file, int(np.packbits(bits).view('>u8')[0]), label, pixels.shape[1], pixels.shape[0], False


# ---- Leaks ----------------------------------------------------------------------------------------------------------

def nearest_hash(ours: np.ndarray, theirs: np.ndarray, *, within: int = NEAR) -> np.ndarray:
    """The place of a hash [n] in `theirs` [m] that is near, the nearest of all, or -1. Both uint64, n and m any.

    A million on both sides take seconds: only hashes with an equal band are compared.
    """
    distance, place = np.full(len(ours), within + 1), np.full(len(ours), -1)
    for low, high in itertools.pairwise(BANDS):
        mask = np.uint64(2 ** (high - low) - 1)
        our_band, their_band = (hashes >> np.uint64(low) & mask for hashes in (ours, theirs))
        order = np.argsort(their_band, kind='stable')
        begin, end = (np.searchsorted(their_band[order], our_band, side) for side in ('left', 'right'))
        for block in np.array_split(np.arange(len(ours)), math.ceil((end - begin).sum() / 2**20) or 1):
            counts = (end - begin)[block]
            mine = np.repeat(block, counts)
            # begin, begin + 1, ... end - 1 of each
            steps = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
            other = order[np.repeat(begin[block], counts) + steps]
            bits = np.unpackbits((ours[mine] ^ theirs[other]).view(np.uint8).reshape(-1, 8), axis=1).sum(1)
            best = np.lexsort((other, bits, mine))  # the nearest of each comes first
            mine, other, bits = mine[best], other[best], bits[best].astype(np.int64)
            first = np.flatnonzero(np.diff(mine, prepend=-1))
            mine, other, bits = mine[first], other[first], bits[first]
            better = bits < distance[mine]
            distance[mine[better]], place[mine[better]] = bits[better], other[better]
    return place


def find_leaks(train: np.ndarray, val: np.ndarray) -> dict[str, np.ndarray]:
    """The images of `val` that are in `train` too, as rows (place in val, place in train), by 'equal' and 'near'."""
    _, place = np.unique(train['file'], return_index=True)
    files = train['file'][place]
    found = np.searchsorted(files, val['file']).clip(max=len(files) - 1)
    equal = files[found] == val['file']
    pairs = {'equal': np.stack((np.flatnonzero(equal), place[found[equal]]), axis=1)}
    theirs, ours = np.flatnonzero(~train['bad']), np.flatnonzero(~equal & ~val['bad'])
    near = nearest_hash(val['hash'][ours], train['hash'][theirs])
    pairs['near'] = np.stack((ours[near >= 0], theirs[near[near >= 0]]), axis=1)
    return pairs


def find_conflicts(facts: np.ndarray) -> np.ndarray:
    """Rows (place, place) of equal files with different labels in one half."""
    order = np.lexsort((facts['label'], facts['file']))
    sorted_facts = facts[order]
    same = sorted_facts['file'][1:] == sorted_facts['file'][:-1]
    other = sorted_facts['label'][1:] != sorted_facts['label'][:-1]
    return np.stack((order[:-1][same & other], order[1:][same & other]), axis=1)


# ---- What is told ---------------------------------------------------------------------------------------------------

def describe(files: ImageFiles, facts: np.ndarray) -> dict[str, Any]:
    """Balance and sizes of one half."""
    good = facts[~facts['bad']]
    sides = np.sort(np.minimum(good['width'], good['height'])) if len(good) else np.zeros(1, np.int64)
    counts = np.bincount(facts['label'], minlength=len(files.classes))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    return {'images': len(facts), 'not_decodable': int(facts['bad'].sum()), 'classes': len(files.classes),
            'smallest_class': [files.classes[smallest], int(counts[smallest])],
            'largest_class': [files.classes[largest], int(counts[largest])],
            'shorter_side': {name: int(np.quantile(sides, q)) for name, q in (('least', 0), ('median', 0.5),
                                                                              ('most', 1))}}


def advise(train: dict[str, Any], data_path: str) -> tuple[str, list[str]]:
    """A command to train with, and the reason of each of its flags, from what `describe` says of the images."""
    count, side = train['images'], train['shorter_side']['median']
    if count >= 300_000:
        words, why = ['--model', 'moganet_small'], [f'--model moganet_small: {count:,} images are enough to begin '
                                                    'without any weights']
    else:
        words = ['--recipe', 'moganet_small_transfer', '--finetune', 'released:moganet_small']
        why = [f'--recipe moganet_small_transfer: {count:,} images are few, so that the training '
               'begins from ImageNet weights']
        if count < 5 * 32:  # its batch
            batch = 2 ** max(count.bit_length() - 3, 2)
            words += ['--total_batch_size', str(batch), '--scale_lr']
            why.append(f'--total_batch_size {batch}: an epoch then has several updates; --scale_lr fits the rate to it')
    if 0 < side < 160:
        size = max(32 * round(side / 32), 32)
        words += ['--input_size', str(size)]
        why.append(f'--input_size {size}: half of the images have a side below {side} pixels')
    if train['not_decodable']:
        words += ['--on_bad_image', 'skip']
        why.append(f'--on_bad_image skip: {train["not_decodable"]:,} images cannot be read; it is better to remove '
                   'them')
    return shlex.join(['python', 'main.py', *words, '--data_path', data_path]), why


def show(report: dict[str, Any]) -> list[str]:
    """What `examine` returned, with the advice, as lines."""
    lines = []
    for kind, text in (('equal', 'images of val equal to one of train'), ('near', 'images of val near to one of train'),
                       ('conflicts', 'images of train under two classes')):
        lines.append(f'{text}: {report[kind]["images"]:,}')
        lines += [f'  {a}  {b}' for a, b in report[kind]['examples']]
    for split in ('train', 'val'):
        half = report[split]
        sides = ', '.join(f'{name} {value}' for name, value in half['shorter_side'].items())
        lines.append(f'{split}: classes of {half["smallest_class"][1]:,} to {half["largest_class"][1]:,} images '
                     f'({half["smallest_class"][0]}, {half["largest_class"][0]}); shorter sides in pixels: {sides}')
    return [*lines, f'to train: {report["command"]}', *(f'  {reason}' for reason in report['advice'])]


def _examples(pairs: np.ndarray, ours: ImageFiles, theirs: ImageFiles) -> list[list[str]]:
    return [[ours.name(int(a)), theirs.name(int(b))] for a, b in pairs[:EXAMPLES]]


def examine(train: ImageFiles, val: ImageFiles, *, workers: int | None = None) -> dict[str, Any]:
    """Looks at every image of both halves.

    Returns:
        `errors` and `warnings`, lines with the cure; for `train` and `val` what `describe` says; of the images of val
        that are `equal` to one of train, or `near`, and of the `conflicts` within train, the number and examples.

    Raises:
        UserError: without the package of the perceptual hash.
    """
    if imagehash is None:
        raise UserError("--leaks needs ImageHash: pip install -e '.[doctor]'")
    halves: Sequence[ImageFiles] = (train, val)
    facts = [np.array(each_image(files, _facts, workers=workers, what='comparing'), FACTS) for files in halves]
    report: dict[str, Any] = {'errors': [], 'warnings': [], 'train': describe(train, facts[0]),
                              'val': describe(val, facts[1])}
    leaks, conflicts = find_leaks(*facts), find_conflicts(facts[0])
    for kind, pairs in leaks.items():
        report[kind] = {'images': len(pairs), 'examples': _examples(pairs, val, train)}
    report['conflicts'] = {'images': len(conflicts), 'examples': _examples(conflicts, train, train)}
    for kind, where, text in (
            ('equal', 'errors', 'images of {val} are in {train} too, {0} as {1} for example: the accuracy will be of '
                                'images that were learnt; remove them from one of the two'),
            ('near', 'warnings', 'images of {val} look like one of {train}, {0} like {1} for example: look at them, '
                                 'and remove those that are the same picture'),
            ('conflicts', 'warnings', 'images of {train} appear a second time under another class, {0} and {1} for '
                                      'example: keep the one in the right class')):
        if report[kind]['images']:
            line = text.format(*report[kind]['examples'][0], val=val.root, train=train.root)
            report[where].append(f'{report[kind]["images"]:,} {line}')
    small, large = report['train']['smallest_class'], report['train']['largest_class']
    if large[1] > UNBALANCED * small[1]:
        report['warnings'].append(
            f'{train.root}: class {large[0]} has {large[1]:,} images and {small[0]} {small[1]:,}; top-1 will hardly '
            'show the small classes: see the confusion matrix, or give them more images')
    return report
