"""Evaluating checkpoints (`main.py --eval`): each as it was made to be tested, beside its published accuracy."""
import csv
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import datasets
import engine
import recipes
import utils
from models.weights import Weights, apply_weights, classes_of, load_weights
from pipeline import labels
from recipes import Recipe, Run
from recipes.command_line import check_data_path
from tasks import Task, create_task
from training.start import (
    adapt_to_device,
    compile_errors,
    compile_model,
    prepare_model,
    settle_arithmetic,
    show_precision,
)
from utils import UserError, log


def evaluate(recipe: Recipe, run: Run, processes: utils.Processes) -> int:
    """Evaluates checkpoints, each with its own test size, crop, interpolation and gate unless a flag says otherwise.

    Prints a line each, a table for several, and writes `eval.json` and `--results_file`. Returns the exit status, 0.
    """
    results: list[tuple[Path, dict[str, Any]]] = []  # each beside the folder of its eval.json
    for source in run.checkpoint or (None,):
        found = find_recipe(source, recipe, run)
        result = {'checkpoint': source, **evaluate_one(*found, run, processes)}
        folder = Path(run.output_dir) if run.output_dir else evaluation_folder(source, result['model'])
        results.append((folder, result))
        if processes.first:  # at once: the next checkpoint may be a wrong one
            beside = [other for place, other in results if place == folder]
            write_results(folder, beside if len(run.checkpoint) > 1 else result)
            if run.results_file:
                append_result(Path(run.results_file), result, found[1])
    if len(results) > 1:
        log.info('\n%s', results_table([result for _, result in results], found[1]))
    return 0


def find_recipe(source: str | None, recipe: Recipe, run: Run) -> tuple[Weights | None, Recipe, dict[str, Any]]:
    """A checkpoint (None: timm's pretrained weights), the recipe by which to test it, and what is known about it."""
    weights, meta = None, {}
    if source is not None:
        with utils.rank_zero_first(f'download {source}'):
            weights = load_weights(source, run.weights)
        meta = weights.meta
    name = recipe.model or str(meta.get('model', ''))
    if not recipes.is_moganet(name):  # those have rows of their own
        meta = settings_of_timm(name) | meta
    recipe = recipes.of_weights(meta, weights and weights.gate, recipe, run.given)
    if recipe.num_classes is None:
        known = classes_of(weights, recipe.model) if weights else getattr(
            timm.get_pretrained_cfg(recipe.model), 'num_classes', None)
        recipe = dataclasses.replace(recipe, num_classes=known)
    return weights, recipe, meta


def load_task(source: str, recipe: Recipe, run: Run, device: torch.device) -> tuple[Task, nn.Module, Weights]:
    """The task and the model of a checkpoint, in evaluation mode on the device, as `evaluate` would test it.

    Args:
        recipe: what was asked for; the fields of `run.given` win over the checkpoint's own.

    Raises:
        UserError: where the file cannot be read, or is of another kind.
    """
    weights, recipe, _ = find_recipe(source, recipe, run)
    run = settle_arithmetic(run, device)
    task = create_task(recipe, run)
    model = prepare_model(task, run, device)
    apply_weights(model, weights)
    task.name_classes(model, labels.known_names(weights.meta.get('classes')))
    return task, model.eval(), weights


def evaluate_one(weights: Weights | None, recipe: Recipe, meta: dict[str, Any], run: Run,
                 processes: utils.Processes) -> dict[str, Any]:
    """Evaluates what `find_recipe` found. Returns what eval.json holds."""
    recipe = adapt_to_device(dataclasses.replace(recipe, sync_bn=False), run, processes.device)
    run = settle_arithmetic(run, processes.device)
    check_data_path(recipe, run)  # of the checkpoint's own data set
    task = create_task(recipe, run)
    task.trained, task.trained_map = labels.known_names(meta.get('classes')), meta.get('class_map')
    loaders = datasets.build_loaders(task, run, rank=processes.rank, device=processes.device, splits=('val',))
    recipe = task.recipe
    check_classes(task.classes, task.trained, run, num_classes=recipe.num_classes)
    model = prepare_model(task, run, processes.device, pretrained=weights is None)
    which = 'pretrained'
    if weights is not None:
        which = weights.which
        log.info('%s: %s', weights, apply_weights(model, weights))
    cuda = f', in {show_precision(recipe, run, processes.device)}' if processes.device.type == 'cuda' else ''
    log.info('Evaluating the %s weights of %s, on %d images%s', which, task.show_settings(), loaders.val.count, cuda)
    if run.compile:
        compile_model(model, processes.device)
    metric = task.metric(processes.device, names=lambda: loaders.val.names, detailed=True)
    begin = time.perf_counter()
    # No signals, which end an evaluation at once, but a limit to its waits
    with utils.StopRequest(processes, ()), compile_errors():
        result = engine.evaluate({'': model}, loaders.val, metric, count=loaders.val.count, exact=loaders.val.exact,
                                 device=processes.device, precision=recipe.precision, compiling=run.compile)['']
    seconds = time.perf_counter() - begin
    log.info('%s  (%s weights, %d images)', task.show_result(result), which, result['count'])
    for name in recipe.expected():
        if (published := meta.get(name)) is not None:
            (label, unit), difference = recipe.metrics[name], result[name] - published
            result |= {f'published_{name}': published, f'difference_{name}': difference}
            log.info('%s: published %.1f%s, difference %+.3f', label, published, unit, difference)
    if run.throughput:
        batch = next(iter(loaders.val))
        result['throughput'] = engine.throughput(model, batch, task.forward, device=processes.device,
                                                 precision=recipe.precision)
        log.info('%.0f images/s, of the model alone in batches of %d', result['throughput'], len(batch))
    loaders.close()
    return result | {
        'weights': which, 'model': recipe.model, **recipe.settings(), 'precision': recipe.precision, 'seconds': seconds,
        'images_per_second': result['count'] / seconds}


def write_results(folder: Path, result: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes eval.json: one evaluation, or a list where a call has several. Raises UserError where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
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


def check_classes(ours: list[str], known: Sequence[str], run: Run, *, num_classes: int) -> None:
    """Warns where the data's classes `ours` are not those of the model: the accuracy would be that of chance."""
    if not ours or run.valid_labels or run.class_map:
        return
    if len(ours) < num_classes:
        log.warning('The data has %d classes, the model %d: say which by --valid_labels FILE or --class_map FILE, else '
                    "they are taken for the model's first.", len(ours), num_classes)
    elif known and labels.find(ours, known) != list(range(len(ours))):
        log.warning('The data has other classes (%s, ...) than the checkpoint was trained on (%s, ...), and they are '
                    'taken one for one: rename the folders, or give --class_map FILE.', ours[0], known[0])


def evaluation_folder(source: str | None, model: str) -> Path:
    """Where eval.json goes without --output_dir: beside a checkpoint file where that can be, else runs/<model>."""
    file = Path(utils.expand(source)) if source else None
    beside = file is not None and file.is_file() and os.access(file.parent, os.W_OK)
    return file.parent if beside else Path('runs') / model


def results_table(results: list[dict[str, Any]], recipe: Recipe) -> str:
    """Several evaluations by recipes of one class as a table of text."""
    names = list(recipe.expected())
    lines = ['  '.join([*(f'{recipe.metrics[name][0]:>7}' for name in names),
                        f'{"published":>9}  {"weights":>10}  {"size":>4}  checkpoint'])]
    for row in results:
        published = row.get(f'published_{recipe.best}')
        lines.append('  '.join([
            *(f'{row[name]:7.3f}' if name in row else f'{"-":>7}' for name in names),
            f'{"-" if published is None else format(published, ".1f"):>9}', f'{row["weights"]:>10}',
            f'{row.get("test_size", "-"):>4}', row['checkpoint'] or row['model']]))
    return '\n'.join(lines)


def append_result(path: Path, result: dict[str, Any], recipe: Recipe) -> None:
    """Appends an evaluation to a CSV file, with a header where it is new. Raises UserError where it cannot."""
    published = [f'{kind}_{name}' for name in recipe.expected() for kind in ('published', 'difference')]
    columns = ('checkpoint', 'model', 'weights', *recipe.settings(), *recipe.metrics, 'count',
               *published, 'images_per_second')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'a', newline='') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore')
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(result)
    except OSError as error:
        raise UserError(f'--results_file {path} cannot be written ({error.strerror}); give a file') from None
