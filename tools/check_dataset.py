"""Checks an image folder before it costs GPU hours, and sorts ImageNet's flat test folder into classes.

    python tools/check_dataset.py --data_path /path/to/imagenet                 # class folders and counts, in seconds
    python tools/check_dataset.py --data_path /path/to/imagenet --decode        # and every file, on all cores
    python tools/check_dataset.py --data_path /path/to/imagenet --sort_val ILSVRC2012_validation_ground_truth.txt

--sort_val takes the ground truth of ImageNet's development kit (with its meta.mat beside it), Kaggle's
LOC_val_solution.csv, or a file with a wordnet id a line. Exit status: 0 all is well, 1 something is not.
"""
import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

import image_ops
from image_sources import ImageFiles, check_files, find_files, is_image, read_ground_truth
from utils import UserError, run_cli, write_json

_files: ImageFiles  # of a worker process


def _open(files: ImageFiles) -> None:
    global _files
    _files = files


def _decode(index: int) -> tuple[str, str] | None:
    """Name and reason of an image that cannot be decoded."""
    try:
        with image_ops.refusing_bad_images():
            image_ops.decode(_files.read(index)[0])
    except image_ops.BadImage as error:
        return _files.name(index), str(error)
    return None


def decode_all(files: ImageFiles, *, workers: int | None = None) -> list[dict[str, str]]:
    """Decodes every image; returns path and reason of those that fail."""
    with multiprocessing.Pool(workers, _open, (files,)) as pool:
        results = pool.imap_unordered(_decode, range(len(files)), chunksize=64)
        bar = tqdm(results, f'decoding {files.root}', len(files), unit=' images', disable=None)
        return [{'path': found[0], 'reason': found[1]} for found in sorted(filter(None, bar))]


def sort_val(folder: Path, truth: Path) -> int:
    """Moves the images of a flat folder into class folders; a run that was interrupted continues.

    Returns:
        how many were moved.

    Raises:
        UserError: before anything is moved, where the ground truth does not know an image.
    """
    labels = read_ground_truth(truth)
    images = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and is_image(entry.name))
    unknown = [name for name in images if Path(name).stem not in labels]
    if unknown:
        raise UserError(f'{truth} does not know {len(unknown)} images of {folder}, {unknown[0]} for example; nothing '
                        'was moved. Is it the ground truth of these images?')
    for name in tqdm(images, f'sorting {folder}', unit=' images', disable=None):
        target = folder / labels[Path(name).stem]
        target.mkdir(exist_ok=True)
        os.rename(folder / name, target / name)
    return len(images)


def check(data_path: str, *, eval_data_path: str | None = None, decode: bool = False,
          workers: int | None = None) -> dict[str, Any]:
    """Examines both halves of a data set.

    Returns:
        `errors`, `warnings`, and for `train` and `val` their path, images, classes, the smallest and largest class, the
        files that are no images and, with `decode`, those that cannot be decoded.
    """
    report: dict[str, Any] = {'errors': [], 'warnings': []}
    found: dict[str, ImageFiles | None] = {'train': None, 'val': None}
    for split in found:
        try:
            root = Path(eval_data_path) if split == 'val' and eval_data_path else Path(data_path)
            found[split] = ImageFiles(find_files(root, split, given=split == 'val' and eval_data_path is not None))
        except UserError as error:
            report['errors'].append(str(error))
    errors, cautions = check_files(found['train'], found['val'])
    report['errors'] += errors
    report['warnings'] += cautions
    for split, files in found.items():
        if files is None:
            continue
        report[split] = {'path': str(files.root), 'images': len(files), 'classes': len(files.classes),
                         'smallest_class': int(files.counts.min()), 'largest_class': int(files.counts.max()),
                         'other_files': files.others}
        if decode:
            broken = decode_all(files, workers=workers)
            report[split]['not_decodable'] = broken
            if broken:
                report['errors'].append(f'{files.root}: {len(broken)} images cannot be decoded, such as '
                                        f'{broken[0]["path"]}; replace or remove them')
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', default='data/ImageNet', help='folder with train/ and val/')
    parser.add_argument('--eval_data_path', help='folder of the test images, where it is not under --data_path')
    parser.add_argument('--decode', action='store_true', help='decode every image')
    parser.add_argument('--workers', type=int, help='processes to decode with; all cores by default')
    parser.add_argument('--sort_val', type=Path, metavar='FILE', help='sort the flat test folder by this ground truth')
    parser.add_argument('--report', type=Path, metavar='FILE', help='write the findings as JSON')
    args = parser.parse_args(argv)
    if args.sort_val:
        root = find_files(Path(args.eval_data_path or args.data_path), 'val', given=args.eval_data_path is not None)
        print(f'{sort_val(root, args.sort_val):,} images of {root} sorted into class folders')
    report = check(args.data_path, eval_data_path=args.eval_data_path, decode=args.decode, workers=args.workers)
    if args.report:
        write_json(args.report, report)
    for split in ('train', 'val'):
        if split in report:
            facts = {name: value for name, value in report[split].items() if name != 'not_decodable'}
            print(f'{split}: {json.dumps(facts)}')
            for broken in report[split].get('not_decodable', ()):
                print(f'  {broken["path"]}: {broken["reason"]}')
    for kind in ('warnings', 'errors'):
        for line in report[kind]:
            print(f'{kind[:-1]}: {line}')
    return 1 if report['errors'] else 0


if __name__ == '__main__':
    run_cli(main)
