"""What an evaluation goes over: the run's own set, or with --suite the sets that lie in a folder, each by its rules."""
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.data

import recipes
from pipeline.corruptions import CORRUPTIONS, LEAST_SIZE, SEVERITIES, check_package
from pipeline.files import FOLDERS, TARS
from recipes import Recipe, Run
from utils import UserError, log

# AlexNet's top-1 error on ImageNet-C, a share, by corruption and over its severities (arXiv 1903.12261)
ALEXNET = {
    'gaussian_noise': 0.886428, 'shot_noise': 0.894468, 'impulse_noise': 0.922640, 'defocus_blur': 0.819880,
    'glass_blur': 0.826268, 'motion_blur': 0.785948, 'zoom_blur': 0.798360, 'snow': 0.866816, 'frost': 0.826572,
    'fog': 0.819324, 'brightness': 0.564592, 'contrast': 0.853204, 'elastic_transform': 0.646056,
    'pixelate': 0.717840, 'jpeg_compression': 0.606500}
# ReaL's labels, and the model's classes that A and R have
REAL, SUBSETS = 'imagenet_real_labels.json', {'A': 'imagenet_a_indices.txt', 'R': 'imagenet_r_indices.txt'}
# Of a result, what is measured; the rest says how
MEASURED = ('acc1', 'acc5', 'loss', 'count', 'seconds', 'images_per_second', 'throughput')
CALLED = 'val, imagenetv2-matched-frequency-format-val, imagenet-a, imagenet-r, imagenet-sketch, imagenet-c'


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of the table: a set, or the many corruptions of one.

    Attributes:
        name: of the set; None where the run names its images itself.
        run: what to evaluate on; the first of `cases`, if there are several.
        changes: fields of the recipe.
        cases: of corruptions, their names and severities, and the run of each.
        published: whether the published accuracies are of this set.
    """

    name: str | None
    run: Run
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    cases: tuple[tuple[str, int, Run], ...] = ()
    published: bool = False

    def evaluate(self, one: Callable[[Run, bool], dict[str, Any]]) -> dict[str, Any]:
        """The result.

        Args:
            one: evaluates a run, in detail or not.
        """
        named = {} if self.name is None else {'set': self.name}
        if not self.cases:
            return named | one(self.run, True)
        results: list[dict[str, Any]] = []
        for name, severity, run in self.cases:
            log.info('%s: %s, severity %d', self.name, name, severity)
            results.append(one(run, False))
        errors: dict[str, list[float]] = {}
        for (name, _, _), result in zip(self.cases, results, strict=True):
            errors.setdefault(name, []).append(100 - result['acc1'])
        summed = {name: sum(result[name] for result in results) for name in ('count', 'seconds')}
        settings = {name: value for name, value in results[0].items() if name not in MEASURED}
        return named | self._summary(errors) | settings | summed | {
            'images_per_second': summed['count'] / summed['seconds']}

    def _summary(self, errors: dict[str, list[float]]) -> dict[str, Any]:
        """What the errors, %, by corruption and severity come to."""
        means = {name: sum(values) / len(values) for name, values in errors.items()}
        error = sum(means.values()) / len(means)
        found = {'acc1': 100 - error, 'corruption_error': error, 'errors': errors}
        complete = [values for values in errors.values() if len(values) == len(SEVERITIES)]
        if self.name == 'C' and len(complete) == len(CORRUPTIONS):  # ImageNet-C's own files, and all of them
            found['mce'] = sum(mean / ALEXNET[name] for name, mean in means.items()) / len(CORRUPTIONS)
        return found


def parts(recipe: Recipe, run: Run) -> list[Part]:
    """What a checkpoint is to be evaluated on: each set at each test size.

    Args:
        recipe: of the checkpoint.

    Raises:
        UserError: where the folder has no set that is known, or the recipe is of another task.
    """
    if not isinstance(recipe, recipes.Classification):
        for name in ('suite', 'tta', 'test_sizes'):
            if getattr(run, name):
                raise UserError(f'--{name.removesuffix("s")} is of classifiers, and {recipe.name or recipe.model} is '
                                'none; leave it out')
    sets = suite(recipe, run) if run.suite else [Part(None, run, published=True)]
    if run.corruptions and isinstance(recipe, recipes.Classification) and (
            min(run.test_sizes or (recipe.test_size,)) < LEAST_SIZE):
        raise UserError(f'--corruptions are defined from {LEAST_SIZE} pixels on; give a larger --test_size')
    return [dataclasses.replace(part, changes=part.changes | ({'test_size': size} if size else {}))
            for size in run.test_sizes or (None,) for part in sets]


def suite(recipe: Recipe, run: Run) -> list[Part]:
    """The sets in the folder of --suite. Raises UserError where there is none."""
    folder = Path(run.suite)
    found = find_sets(folder)
    if recipe.num_classes not in (None, 1000) and (others := found.keys() - {'val'}):
        log.warning('%s: %s want a model of ImageNet\'s 1000 classes, and this one has %d; left out.', folder,
                    ', '.join(sorted(others)), recipe.num_classes)
        found = {name: path for name, path in found.items() if name == 'val'}
    if not found:
        raise UserError(f'--suite {folder} holds no set that is known; call them {CALLED}')
    if 'data_set' in run.given and recipe.data_set != 'image_folder':
        raise UserError('--suite reads folders of images; leave --data_set out')
    for flag, sets in (('corruptions', {'val'}), ('real_labels', {'val'}), ('valid_labels', {'A', 'R'})):
        if getattr(run, flag) and not found.keys() & sets:
            raise UserError(f'--{flag}: --suite {folder} holds no {" and no ".join(sorted(sets))}; leave the flag out')
    if run.valid_labels and found.keys() >= SUBSETS.keys():
        raise UserError('--valid_labels are of one set, and --suite holds A and R, whose classes are known: leave the '
                        'flag out')
    return [part for name, path in found.items() for part in parts_of_set(name, path, recipe, run)]


def parts_of_set(name: str, path: Path, recipe: Recipe, run: Run) -> list[Part]:
    """A set's line of the table; two of val with --corruptions. Raises UserError."""
    info = Path(timm.data.__file__).parent / '_info'
    valid = (run.valid_labels or str(info / SUBSETS[name])) if name in SUBSETS else None
    real = None
    if name == 'val' and (run.real_labels or (recipe.num_classes in (None, 1000) and (
            path.is_file() or next(path.rglob('ILSVRC2012_val_*'), None)))):
        real = run.real_labels or str(info / REAL)
    changes: dict[str, Any] = {'data_set': 'image_folder'}
    own = dataclasses.replace(run, eval_data_path=str(path), valid_labels=valid, real_labels=real)
    if name == 'C':
        if 'crop_pct' not in run.given:  # its images are crops of 224 pixels
            changes['crop_pct'] = 1.0
        cases = tuple((corruption, severity, dataclasses.replace(own, eval_data_path=str(place)))
                      for corruption, severity, place in find_corruptions(path))
        if not cases:
            raise UserError(f'{path} holds none of ImageNet-C\'s folders, as gaussian_noise/1; unpack its tar files '
                            'there')
        if len(cases) < len(CORRUPTIONS) * len(SEVERITIES):
            log.warning('%s: %d of the %d folders of ImageNet-C are there, so that its mCE cannot be told.', path,
                        len(cases), len(CORRUPTIONS) * len(SEVERITIES))
        return [Part(name, cases[0][2], changes, cases)]
    part = Part(name, own, changes, published=name == 'val')
    if name != 'val' or not run.corruptions:
        return [part]
    check_package()
    chosen = CORRUPTIONS if run.corruptions == ('all',) else run.corruptions
    cases = tuple((corruption, severity, dataclasses.replace(own, real_labels=None, corruption=(corruption, severity)))
                  for corruption in chosen for severity in SEVERITIES)
    return [part, Part('val, corrupted here', own, changes, cases)]


def find_sets(folder: Path) -> dict[str, Path]:
    """The sets in a folder by their names in the table, in its order; what is no set is told in the log.

    Raises:
        UserError: where the folder cannot be read.
    """
    named: dict[str, Path] = {}
    others = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f'--suite {folder} cannot be read ({error.strerror}); give the folder that holds the sets'
                        ) from None
    for path in entries:
        name = set_of(path)
        if name is not None:
            named.setdefault(name, path)
        elif path.is_dir() and path.name.lower() not in FOLDERS['train'] and not path.name.startswith('.'):
            others.append(path.name)
    if others and named:
        log.warning('--suite %s: %s bear no name of a set and are left out; sets are called %s.', folder,
                    ', '.join(others), CALLED)
    order = ['val', 'V2', 'A', 'R', 'Sketch', 'C']
    return dict(sorted(named.items(), key=lambda item: (order.index(item[0].split()[0]), item[0])))


def set_of(path: Path) -> str | None:
    """The name in the table of the set that a file or folder holds, by its own name; None where it is none."""
    if path.name == TARS['val']:
        return 'val'
    if not path.is_dir():
        return None
    name = path.name.lower().replace('_', '-')
    if name in FOLDERS['val']:
        return 'val'
    if found := re.fullmatch(r'(?:imagenet-?)?v2(?:-(.+?))?(?:-format-val)?', name):
        return f'V2 {found[1]}' if found[1] else 'V2'
    short = re.sub(r'^imagenet-?', '', name)
    return {'a': 'A', 'r': 'R', 'sketch': 'Sketch', 'c': 'C'}.get(short)


def find_corruptions(folder: Path) -> list[tuple[str, int, Path]]:
    """ImageNet-C's corruptions and severities that lie in a folder, also one below, as `noise/gaussian_noise/1`."""
    places = {path.name: path for depth in ('*', '*/*') for path in sorted(folder.glob(depth))
              if path.name in CORRUPTIONS}
    return [(name, severity, places[name] / str(severity)) for name in CORRUPTIONS if name in places
            for severity in SEVERITIES if (places[name] / str(severity)).is_dir()]

