"""Evaluating checkpoints (`main.py --eval`): each as it was made to be tested, beside its published accuracy."""
import csv
import dataclasses
import functools
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import datasets
import engine
import recipes
import utils
from models.dense import classes_of_dense
from models.weights import Weights, apply_weights, classes_of, load_weights
from pipeline import labels
from recipes import Recipe, Run
from recipes.command_line import check_data_path
from recipes.dense import Dense
from tasks import Task, create_task, evidence
from training import suite
from training.start import (
    adapt_to_device,
    compile_errors,
    compile_model,
    prepare_model,
    settle_arithmetic,
    show_precision,
)
from utils import UserError, log


def evaluate_sources(recipe: Recipe, run: Run, processes: utils.Processes) -> int:
    """Evaluates checkpoints, each with its own test size, crop, interpolation and gate unless a flag says otherwise.

    Prints a line each, a table for several, and writes `eval.json`, what lies beside it, and `--results_file`. Returns
    the exit status, 0.
    """
    done: list[Evaluated] = []
    kinds: set[type[Recipe]] = set()
    several = len(run.checkpoint) > 1 or run.suite or run.test_sizes
    for number, source in enumerate(run.checkpoint or (None,)):
        weights, found, meta = find_recipe(source, recipe, run)
        kinds.add(type(found))
        if len(kinds) > 1:
            raise UserError(f'{source}: {found.name or found.model} is of another task than the checkpoint before it; '
                            'evaluate them by a command each')
        kept: dict[str, Any] = {}
        for part in suite.parts(found, run):
            here = dataclasses.replace(found, **part.changes)
            known = meta if part.published else {key: value for key, value in meta.items() if key not in here.metrics}
            evaluate_run = functools.partial(evaluate_one, weights, here, known, processes=processes, kept=kept)
            result = {'checkpoint': source, **part.evaluate(evaluate_run)}
            right, classes = (result.pop(name, None) for name in ('right', 'classes'))
            place = run.checkpoint[0] if run.suite and run.checkpoint else source
            folder = Path(run.output_dir) if run.output_dir else evaluation_folder(place, result['model'])
            same = (part.name, part.changes.get('test_size'), here.data_set, result['count'])
            done.append(Evaluated(folder, result, number, same, right, classes))
            compare(done)
            if processes.first:  # at once: the next checkpoint may be a wrong one
                beside = [other for other in done if other.folder == folder]
                files = files_beside(beside)
                results = [other.result for other in beside]
                write_results(folder, results if several else result, files)
                if run.results_file:
                    append_result(Path(run.results_file), result, found)
    if len(done) > 1:
        log.info('\n%s', results_table([one.result for one in done], found))
    return 0


@dataclasses.dataclass
class Evaluated:
    """A line of the table of results, and what its single images and classes say.

    Attributes:
        folder: of its eval.json.
        checkpoint: its number on the command line.
        same: equal for the results on the same images.
        right: bool [images], where the task says which are right.
        classes: rows of a table.
    """

    folder: Path
    result: dict[str, Any]
    checkpoint: int
    same: tuple[Any, ...]
    right: torch.Tensor | None
    classes: list[dict[str, Any]] | None


def compare(done: Sequence[Evaluated]) -> None:
    """Compares the last of some results with those that other checkpoints have on the same images (McNemar's test)."""
    last = done[-1]
    for other in done[:-1]:
        if last.right is None or other.right is None or other.same != last.same or other.checkpoint == last.checkpoint:
            continue
        there, here, chance = evidence.mcnemar(other.right, last.right)
        against = other.result['checkpoint'] or other.result['model']
        last.result.setdefault('compared', []).append(
            {'with': against, 'right_there_alone': there, 'right_here_alone': here, 'p': chance})
        log.info("against %s: %d images are right there alone, %d here alone; McNemar's exact test: p = %.3g%s",
                 against, there, here, chance, '' if chance < 0.05 else ', which may be chance')


def files_beside(done: Sequence[Evaluated]) -> dict[str, bytes]:
    """The files beside an eval.json, by name: a row a class, and a bit an image, whether it is right.

    `numpy.unpackbits(numpy.load('eval-bits.npz')[NAME], count=COUNT)` gives the bits of a result that names them
    `bits`, in the order of the source's images.
    """
    bits: dict[str, np.ndarray] = {}
    table, writer = io.StringIO(), None
    for number, one in enumerate(done):
        if one.right is not None:
            one.result['bits'] = f'right{number}'
            bits[one.result['bits']] = np.packbits(one.right.numpy())
        about = {name: one.result.get(name) for name in ('set', 'checkpoint', 'weights', 'test_size')}
        for row in one.classes or ():
            if writer is None:
                writer = csv.DictWriter(table, [*about, *row], lineterminator='\n')
                writer.writeheader()
            writer.writerow(about | row)
    files = {'eval-classes.csv': table.getvalue().encode()} if writer else {}
    if bits:
        archive = io.BytesIO()
        np.savez(archive, **bits)
        files['eval-bits.npz'] = archive.getvalue()
    return files


def find_recipe(source: str | None, recipe: Recipe, run: Run) -> tuple[Weights | None, Recipe, dict[str, Any]]:
    """A checkpoint (None: timm's pretrained weights), the recipe by which to test it, and what is known about it."""
    weights = None
    if source is not None:
        with utils.rank_zero_first(f'download {source}'):
            weights = load_weights(source, run.weights)
    return (weights, *recipe_of(weights, recipe, run))


def recipe_of(weights: Weights | None, recipe: Recipe, run: Run) -> tuple[Recipe, dict[str, Any]]:
    """The recipe by which to test weights (None: timm's), with the number of their classes, and what is known of them.

    Args:
        recipe: what was asked for; the fields of `run.given` win over the weights' own.
    """
    meta = weights.meta if weights is not None else {}
    name = recipe.model or str(meta.get('model', ''))
    if not recipes.is_moganet(name):  # those have rows of their own
        meta = settings_of_timm(name) | meta
    recipe = recipes.of_weights(meta, weights and weights.gate, recipe, run.given)
    if run.knn:  # nothing was published for it, and the classes are those of the data
        meta = {key: value for key, value in meta.items() if key not in recipe.metrics}
        return weights, recipe if 'num_classes' in run.given else dataclasses.replace(
            recipe, num_classes=None), meta
    if recipe.num_classes is None:
        known = getattr(timm.get_pretrained_cfg(recipe.model), 'num_classes', None)
        if weights is not None:
            dense = isinstance(recipe, Dense)
            known = classes_of_dense(weights.state_dict, recipe) if dense else classes_of(weights, recipe.model)
        recipe = dataclasses.replace(recipe, num_classes=known)
    return recipe, meta


def load_task(source: str, recipe: Recipe, run: Run, device: torch.device) -> tuple[Task, nn.Module, Weights]:
    """The task and the model of a checkpoint, in evaluation mode on the device, as `evaluate` would test it.

    Args:
        recipe: what was asked for; the fields of `run.given` win over the checkpoint's own.

    Raises:
        UserError: where the file cannot be read, or is of another kind.
    """
    weights, recipe, _ = find_recipe(source, recipe, run)
    task, model = build_task(weights, recipe, run, device)
    task.name_classes(model, labels.known_names(weights.meta.get('classes')))
    return task, model, weights


def build_task(weights: Weights | None, recipe: Recipe, run: Run, device: torch.device, *, pretrained: bool = False
               ) -> tuple[Task, nn.Module]:
    """The task of a recipe and its model in evaluation mode on the device, with the weights given, or timm's."""
    run = settle_arithmetic(run, device)
    task = create_task(recipe, run)
    model = prepare_model(task, run, device, pretrained=pretrained)
    if weights is not None:
        apply_weights(model, weights)
    return task, model.eval()


def evaluate_one(weights: Weights | None, recipe: Recipe, meta: dict[str, Any], run: Run, detailed: bool, *,
                 processes: utils.Processes, kept: dict[str, Any]) -> dict[str, Any]:
    """Evaluates what `find_recipe` found.

    Args:
        detailed: whether to tell of single images and classes too.
        kept: holds the model and its recipe from one call to the next.

    Returns:
        what eval.json holds, and in detail what `tasks.Metric` gives for files.
    """
    recipe = adapt_to_device(dataclasses.replace(recipe, sync_bn=False), run, processes.device)
    run = settle_arithmetic(run, processes.device)
    check_data_path(recipe, run)  # of the checkpoint's own data set
    recipe.check_run(run)
    task = create_task(recipe, run)
    if not run.knn:  # else the classes are the data's, whatever the model was trained on
        task.trained, task.trained_map = labels.known_names(meta.get('classes')), meta.get('class_map')
    loaders = datasets.build_loaders(task, run, rank=processes.rank, device=processes.device, augmented=False,
                                     splits=('train', 'val') if run.knn else ('val',))
    recipe = task.recipe
    check_classes(task.classes, task.trained, run, num_classes=recipe.num_classes, cure=task.class_cure)
    which = 'pretrained' if weights is None else weights.which
    if kept.get('recipe') != recipe:  # the sets of a suite have one model
        model = prepare_model(task, run, processes.device, pretrained=weights is None)
        if weights is not None:
            log.info('%s: %s', weights, apply_weights(model, weights, drop_classifier=bool(run.knn)))
        if run.compile:
            compile_model(model, processes.device)
        kept |= {'recipe': recipe, 'model': model}
    model = kept['model']
    cuda = f', in {show_precision(recipe, run, processes.device)}' if processes.device.type == 'cuda' else ''
    log.info('Evaluating the %s weights of %s, on %d images%s', which, task.show_settings(), loaders.val.count, cuda)
    metric = task.metric(processes.device, names=lambda: loaders.val.names, detailed=detailed)
    begin = time.perf_counter()
    # No signals, which end an evaluation at once, but a limit to its waits
    with utils.StopRequest(processes, ()), compile_errors():
        with engine.autocast(processes.device, recipe.precision):
            judge = task.nearest_neighbours(model.eval(), loaders.train) if run.knn else model
        result = engine.evaluate({'': judge}, loaders.val, metric, count=loaders.val.count, exact=loaders.val.exact,
                                 device=processes.device, precision=recipe.precision, compiling=run.compile)['']
    seconds = time.perf_counter() - begin
    log.info('%s  (%s weights, %d images)', task.show_result(result), which, result['count'])
    for line in task.show_details(result) if detailed else ():
        log.info('%s', line)
    if not loaders.val.exact:  # a stream's images have no order by which two results could be compared
        result.pop('right', None)
    for name in recipe.expected():
        if (published := meta.get(name)) is not None:
            (label, unit), difference = recipe.metrics[name], result[name] - published
            result |= {f'published_{name}': published, f'difference_{name}': difference}
            log.info('%s: published %.1f%s, difference %+.3f%s', label, published, unit, difference,
                     placed(published, result.get(f'interval_{name}')))
    if run.throughput:
        batch = next(iter(loaders.val))
        result['throughput'] = engine.throughput(model, batch, task.forward, device=processes.device,
                                                 precision=recipe.precision)
        log.info('%.0f images/s, of the model alone in batches of %d', result['throughput'], len(batch))
    loaders.close()
    return result | {
        'weights': which, 'model': recipe.model,
        **recipe.settings(), **({'tta': run.tta} if run.tta else {}), **({'knn': run.knn} if run.knn else {}),
        'precision': recipe.precision, 'seconds': seconds, 'images_per_second': result['count'] / seconds}


def placed(published: float, interval: Sequence[float] | None) -> str:
    """Where a published value lies, by the 95 % interval of the measured one."""
    if interval is None:
        return ''
    low, high = interval
    where = 'below' if published < low else 'above' if published > high else 'within'
    return f', {where} the 95 % interval {low:.2f} to {high:.2f}'


def write_results(folder: Path, result: dict[str, Any] | list[dict[str, Any]], files: dict[str, bytes]) -> None:
    """Writes eval.json: one evaluation, or a list where a call has several. Raises UserError where it cannot.

    Args:
        files: the contents of the files beside it, by name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            utils.write_atomically(folder / name, lambda file, content=content: file.write(content))
        utils.write_json(folder / 'eval.json', result)
    except OSError as error:
        raise UserError(f'cannot write {folder / "eval.json"} ({error.strerror}); give another --output_dir') from None


def settings_of_timm(model: str) -> dict[str, Any]:
    """Test size, crop, interpolation and normalisation by which timm itself evaluates one of its models."""
    try:
        cfg = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # an unknown tag
        raise UserError(f'--model {model}: {error}') from None
    if cfg is None:
        return {}
    settings = resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=True)
    return {'test_size': settings.pop('input_size')[-1], **settings}


def check_classes(ours: list[str], known: Sequence[str], run: Run, *, num_classes: int, cure: str) -> None:
    """Warns where the data's classes `ours` are not those of the model: the accuracy would be that of chance."""
    numbers = num_classes == len(ours) == 1000 and labels.are_numbers(ours)  # ImageNet's, as ImageNet-V2 has them
    if not ours or run.valid_labels or run.class_map or numbers:
        return
    if len(ours) < num_classes:
        log.warning("The data has %d classes, the model %d: %s, else they are taken for the model's first.", len(ours),
                    num_classes, cure)
    elif known and labels.find(ours, known) != list(range(len(ours))):
        log.warning('The data has other classes (%s, ...) than the checkpoint was trained on (%s, ...), and they are '
                    'taken one for one: %s.', ours[0], known[0], cure)


def evaluation_folder(source: str | None, model: str) -> Path:
    """Where eval.json goes without --output_dir: beside a checkpoint file where that can be, else runs/<model>."""
    file = Path(utils.expand(source)) if source else None
    beside = file is not None and file.is_file() and os.access(file.parent, os.W_OK)
    return file.parent if beside else Path('runs') / model


# Further columns of the table: what a result may hold beside its task's metrics, its heading and its decimals
EXTRA = {'mean_class_acc1': ('class top-1', 3), 'real_acc1': ('ReaL', 3), 'loss': ('NLL', 4), 'ece': ('ECE', 2),
         'temperature': ('T', 3), 'corruption_error': ('corruption error', 2), 'mce': ('mCE', 1)}


def results_table(results: list[dict[str, Any]], recipe: Recipe) -> str:
    """Several evaluations by recipes of one class as a table of text."""
    def number(value: float | None, digits: int) -> str:
        return '-' if value is None else f'{value:.{digits}f}'

    columns: dict[str, list[str]] = {'set': [row.get('set', '-') for row in results]} if 'set' in results[0] else {}
    for name in recipe.expected():
        columns[recipe.metrics[name][0]] = [number(row.get(name), 3) for row in results]
        if name == recipe.best and any(f'interval_{name}' in row for row in results):
            columns['interval'] = ['-'.join(f'{bound:.2f}' for bound in row.get(f'interval_{name}', ())) or '-'
                                   for row in results]
    for name, (label, digits) in EXTRA.items():
        if any(name in row for row in results):
            columns[label] = [number(row.get(name), digits) for row in results]
    columns |= {'published': [number(row.get(f'published_{recipe.best}'), 1) for row in results],
                'weights': [row['weights'] for row in results],
                'size': [str(row.get('test_size', '-')) for row in results]}
    widths = {head: max(map(len, (head, *cells))) for head, cells in columns.items()}
    lines = [[*columns, 'checkpoint'], *(
        [*cells, row['checkpoint'] or row['model']]
        for cells, row in zip(zip(*columns.values(), strict=True), results, strict=True))]
    return '\n'.join('  '.join([*(cell.rjust(width) for cell, width in zip(line, widths.values(), strict=False)),
                                line[-1]]) for line in lines)


def append_result(path: Path, result: dict[str, Any], recipe: Recipe) -> None:
    """Appends an evaluation to a CSV file, with a header where it is new. Raises UserError where it cannot."""
    published = [f'{kind}_{name}' for name in recipe.expected() for kind in ('published', 'difference')]
    columns = ('checkpoint', 'model', 'weights', *recipe.settings(), *recipe.metrics, 'count',
               *published, 'images_per_second', 'set', 'tta', 'knn', 'real_acc1', 'ece', 'temperature',
               'corruption_error', 'mce', 'mean_class_acc1')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'a+', newline='') as file:
            file.seek(0)
            known = next(csv.reader(file), None)  # a file keeps the columns that it was begun with
            for wanted in (('checkpoint',), tuple(recipe.metrics)) if known is not None else ():
                if not any(name in known for name in wanted):
                    raise ValueError(f'its first line has no column {wanted[0]}')
            writer = csv.DictWriter(file, known or columns, extrasaction='ignore')
            if known is None:
                writer.writeheader()
            writer.writerow(result)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, 'strerror', None) or utils.reason_of(error)
        raise UserError(f'--results_file {path} cannot be written ({reason}); give a table of results, or a file that '
                        'is not there yet') from None
