"""Checks a data set before it costs GPU hours, and sorts ImageNet's flat test folder into classes.

    python tools/check_dataset.py --data_path /path/to/imagenet                 # class folders and counts, in seconds
    python tools/check_dataset.py --data_path /path/to/imagenet --decode        # and every file, on all cores
    python tools/check_dataset.py --data_path /path/to/own/classes --leaks      # images in both halves, and advice
    python tools/check_dataset.py --recipe retinanet_moganet_tiny_1x --data_path /path/to/coco   # boxes
    python tools/check_dataset.py --recipe upernet_moganet_tiny_160k --data_path /path/to/ade    # labels of pixels
    python tools/check_dataset.py --data_path /path/to/imagenet --sort_val ILSVRC2012_validation_ground_truth.txt

--sort_val takes the ground truth of ImageNet's development kit (with its meta.mat beside it), Kaggle's
LOC_val_solution.csv, or a file with a wordnet id a line. The exit status is 0 where all is well, else 1.
"""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from pipeline import augmentation
from pipeline.ade20k import open_ade20k
from pipeline.coco import check_coco, open_coco
from pipeline.files import Split, find_files, kind_of, read_ground_truth
from pipeline.labels import BadLabel
from pipeline.sources import ImageFiles, check_files
from recipes import RECIPES, Recipe, Run
from tools import doctor
from utils import UserError, as_path, expand, nearest, run_cli, write_json


def _why_bad(files: Any, index: int) -> dict[str, str] | None:
    """Path and reason of an image that cannot be decoded, or that is another than its targets describe; else None."""
    try:
        with augmentation.refusing_bad_images():
            files.check(index)
    except (augmentation.BadImage, BadLabel) as error:
        return {'path': files.name(index), 'reason': str(error)}
    return None


def decode_all(files: Any, *, workers: int | None = None) -> list[dict[str, str]]:
    """Decodes every image; returns path and reason of those that fail."""
    found = doctor.each_image(files, _why_bad, workers=workers, what='decoding')
    return sorted(filter(None, found), key=lambda bad: bad['path'])


def sort_val(folder: Path, truth: Path) -> int:
    """Moves the images of a flat folder into class folders; a run that was interrupted continues.

    Returns:
        how many were moved.

    Raises:
        UserError: before anything is moved, where the ground truth does not know an image, or its place is taken; and
            where the folder may not be written, with what was moved until then.
    """
    labels, moved = read_ground_truth(truth), 0
    try:
        with os.scandir(folder) as entries:
            images = sorted(entry.name for entry in entries if kind_of(entry) == 'image')
        unknown = [name for name in images if Path(name).stem not in labels]
        if unknown:
            raise UserError(f'{truth} does not know {len(unknown)} images of {folder}, {unknown[0]} for example; '
                            'nothing was moved. Is it the ground truth of these images?')
        targets = {name: folder / labels[Path(name).stem] / name for name in images}
        for name, target in targets.items():
            if os.path.lexists(target):
                raise UserError(f'{target} is there already, and so is {folder / name}; nothing was moved. Remove one '
                                'of them')
        for name in tqdm(images, f'sorting {folder}', unit=' images', disable=None):
            targets[name].parent.mkdir(exist_ok=True)
            os.rename(folder / name, targets[name])
            moved += 1
    except OSError as error:
        raise UserError(f'{folder} cannot be sorted ({error.strerror or error}; {moved:,} images were moved); '
                        'copy it to a folder that you may write, on one disk, or leave its tar file packed beside the '
                        'ground truth') from None
    return moved


def _open_folder(recipe: Recipe, run: Run, split: Split) -> ImageFiles:
    root = Path(run.eval_data_path) if split == 'val' and run.eval_data_path else Path(run.data_path)
    return ImageFiles(find_files(root, split, given=split == 'val' and run.eval_data_path is not None))


# By a recipe's task: the function that opens a half of its data, and the one that checks both halves together
KINDS = {'tasks.classification:Classification': (_open_folder, check_files),
         'tasks.detection:Detection': (open_coco, check_coco),
         'tasks.segmentation:Segmentation': (open_ade20k, lambda train, val: ([], []))}


def check(recipe: Recipe, run: Run, *, decode: bool = False, leaks: bool = False,
          workers: int | None = None) -> dict[str, Any]:
    """Examines both halves of a data set.

    Returns:
        `errors`, `warnings`, and for `train` and `val` what the source tells of itself (`facts`) and, with `decode`,
        the images that cannot be decoded; with `leaks`, what `doctor.examine` returns, a `command` and `advice`.
    """
    report: dict[str, Any] = {'errors': [], 'warnings': []}
    open_half, check_halves = KINDS[recipe.task]
    found: dict[str, Any] = {'train': None, 'val': None}
    for split in found:
        try:
            found[split] = open_half(recipe, run, split)
        except UserError as error:
            report['errors'].append(str(error))
    errors, cautions = check_halves(found['train'], found['val'])
    report['errors'] += errors
    report['warnings'] += cautions
    for split, files in found.items():
        if files is None:
            continue
        report[split] = files.facts()
        if decode:
            broken = decode_all(files, workers=workers)
            report[split]['not_decodable'] = broken
            if broken:
                report['errors'].append(f'{files.shown}: {len(broken)} images cannot be used, such as '
                                        f'{broken[0]["path"]} ({broken[0]["reason"]}); replace or remove them')
    if leaks and None not in found.values():
        report['leaks'] = examined = doctor.examine(found['train'], found['val'], workers=workers)
        for kind in ('errors', 'warnings'):
            report[kind] += examined.pop(kind)
        examined['command'], examined['advice'] = doctor.advise(examined['train'], run.data_path)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', default='data/ImageNet', type=expand, help='folder of the data, as for main.py')
    parser.add_argument('--eval_data_path', type=expand,
                        help='folder of the test images, where it is not under --data_path')
    parser.add_argument('--recipe', default='moganet_small', help='recipe whose task reads the data: that of a '
                                                                  'classifier, a detector or a segmentor')
    for name, text in (('train_json', 'COCO JSON of the training images'), ('val_json', 'COCO JSON of the test images'),
                       ('image_dir', 'folder of the images that these JSONs name')):
        parser.add_argument(f'--{name}', type=expand, help=text)
    parser.add_argument('--decode', action='store_true', help='decode every image')
    parser.add_argument('--leaks', action='store_true',
                        help='look for images of val that are in train too, equal or nearly; describe balance and '
                             'sizes, and advise how to train (of class folders; needs ImageHash)')
    parser.add_argument('--workers', type=int, help='processes to decode with; all cores by default')
    parser.add_argument('--sort_val', type=as_path, metavar='FILE',
                        help='sort the flat test folder by this ground truth')
    parser.add_argument('--report', type=as_path, metavar='FILE', help='write the findings as JSON')
    args = parser.parse_args(argv)
    if args.sort_val:
        root = find_files(Path(args.eval_data_path or args.data_path), 'val', given=args.eval_data_path is not None)
        print(f'{sort_val(root, args.sort_val):,} images of {root} were sorted into class folders')
    if args.recipe not in RECIPES:
        raise UserError(f'--recipe {args.recipe} is unknown{nearest(args.recipe, RECIPES)}')
    run = Run(**{name: getattr(args, name) for name in ('data_path', 'eval_data_path', 'train_json', 'val_json',
                                                        'image_dir')})
    RECIPES[args.recipe].check_run(run)
    if args.leaks and RECIPES[args.recipe].task != 'tasks.classification:Classification':
        raise UserError(f'--leaks looks at class folders, which {args.recipe} does not read; leave it out')
    report = check(RECIPES[args.recipe], run, decode=args.decode, leaks=args.leaks, workers=args.workers)
    if args.report:
        write_json(args.report, report)
    for split in ('train', 'val'):
        if split in report:
            facts = {name: value for name, value in report[split].items() if name != 'not_decodable'}
            print(f'{split}: {json.dumps(facts)}')
            for broken in report[split].get('not_decodable', ()):
                print(f'  {broken["path"]}: {broken["reason"]}')
    if examined := report.get('leaks'):
        print('\n'.join(doctor.show(examined)))
    for kind in ('warnings', 'errors'):
        for line in report[kind]:
            print(f'{kind[:-1]}: {line}')
    return 1 if report['errors'] else 0


if __name__ == '__main__':
    run_cli(main)
