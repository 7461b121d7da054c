"""Evaluating checkpoints (`main.py --eval`): each as it was made to be tested, beside its published accuracy."""
import csv
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

import datasets
import engine
import recipes
import utils
from datasets import ValLoader
from models.weights import Weights, apply_weights, classes_of, load_weights
from parts import adapt_to_device, build_model, compile_errors
from recipes import Recipe, Run
from utils import UserError, log


def evaluate(recipe: Recipe, run: Run, processes: utils.Processes) -> int:
    """Evaluates checkpoints, each with its own test size, crop, interpolation and gate unless a flag says otherwise.

    Prints a line each, a table for several, and writes `eval.json` and `--results_file`. Returns the exit status, 0.
    """
    results: list[tuple[Path, dict[str, Any]]] = []  # each beside the folder of its eval.json
    for source in run.checkpoint or (None,):
        result = {'checkpoint': source, **evaluate_one(*find_recipe(source, recipe, run), run, processes)}
        folder = Path(run.output_dir) if run.output_dir else evaluation_folder(source, result['model'])
        results.append((folder, result))
        if processes.first:  # at once: the next checkpoint may be a wrong one
            beside = [other for place, other in results if place == folder]
            write_results(folder, beside if len(run.checkpoint) > 1 else result)
            if run.results_file:
                append_result(Path(run.results_file), result)
    if len(results) > 1:
        log.info('\n%s', results_table([result for _, result in results]))
    return 0


def find_recipe(source: str | None, recipe: Recipe, run: Run) -> tuple[Weights | None, Recipe, dict[str, Any]]:
    """A checkpoint (None: timm's pretrained weights), the recipe by which to test it, and what is known about it."""
    weights, meta = None, {}
    if source is not None:
        with utils.rank_zero_first(f'download {source}'):
            weights = load_weights(source, run.weights)
        meta = weights.meta
    name = recipe.model or str(meta.get('model', ''))
    if name not in recipes.MOGANETS:  # those have rows of their own
        meta = settings_of_timm(name) | meta
    recipe = recipes.of_weights(meta, weights and weights.gate, recipe, run.given)
    if recipe.num_classes is None:
        known = classes_of(weights, recipe.model) if weights else getattr(
            timm.get_pretrained_cfg(recipe.model), 'num_classes', None)
        recipe = dataclasses.replace(recipe, num_classes=known)
    return weights, recipe, meta


def evaluate_one(weights: Weights | None, recipe: Recipe, meta: dict[str, Any], run: Run,
                 processes: utils.Processes) -> dict[str, Any]:
    """Evaluates what `find_recipe` found. Returns what eval.json holds."""
    recipe = adapt_to_device(recipe, run, processes.device)
    loaders = datasets.build_loaders(recipe, run, rank=processes.rank, device=processes.device)
    num_classes = recipe.num_classes or loaders.num_classes
    check_classes(loaders.classes, meta.get('classes') if weights and weights.format == 'training' else None, run,
                  num_classes=num_classes)
    model = build_model(recipe, run, num_classes=num_classes, device=processes.device, pretrained=weights is None)
    which = 'pretrained'
    if weights is not None:
        which = weights.which
        log.info('%s: %s', weights, apply_weights(model, weights))
    gate = recipe.gate if recipe.model in recipes.MOGANETS else None
    log.info('Evaluating the %s weights of %s%s, at %d, crop %g (%s), %s, on %d images', which, recipe.model,
             f', {gate} gate' if gate else '', recipe.test_size, recipe.crop_pct, recipe.crop_mode,
             recipe.interpolation, loaders.val.count)
    if run.compile:
        model.compile()
    valid_labels = read_valid_labels(run.valid_labels, recipe, loaders.classes) if run.valid_labels else None
    real_labels = read_real_labels(run.real_labels, loaders.val, num_classes=num_classes) if run.real_labels else None
    if real_labels is not None and valid_labels is not None:
        real_labels = real_labels[:, valid_labels]
    classes = len(valid_labels) if valid_labels is not None else num_classes
    begin = time.perf_counter()
    with compile_errors():
        result = engine.evaluate(model, loaders.val, count=loaders.val.count, exact=loaders.val.exact,
                                 precision=recipe.precision, valid_labels=valid_labels, real_labels=real_labels,
                                 confusion=classes if classes <= engine.MAX_CONFUSION else 0)
    seconds = time.perf_counter() - begin
    log.info('top-1 %.3f %%  top-5 %.3f %%  loss %.4f  (%s weights, %d images)', result['acc1'], result['acc5'],
             result['loss'], which, result['count'])
    for metric, label in (('acc1', 'top-1'), ('acc5', 'top-5')):
        if (published := meta.get(metric)) is not None:
            difference = result[metric] - published
            result |= {f'published_{metric}': published, f'difference_{metric}': difference}
            log.info('%s: published %.1f %%, difference %+.3f', label, published, difference)
    if real_labels is not None:
        log.info('top-1 by the reassessed labels %.3f %%', result['real_acc1'])
    if run.throughput:
        images, _ = next(iter(loaders.val))
        result['throughput'] = engine.throughput(model, images, precision=recipe.precision)
        log.info('%.0f images/s, of the model alone in batches of %d', result['throughput'], len(images))
    loaders.close()
    return result | {
        'weights': which, 'model': recipe.model, 'gate': gate, 'test_size': recipe.test_size,
        'crop_pct': recipe.crop_pct, 'crop_mode': recipe.crop_mode, 'interpolation': recipe.interpolation,
        'precision': recipe.precision, 'seconds': seconds, 'images_per_second': result['count'] / seconds}


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


def check_classes(ours: list[str], known: list[str] | None, run: Run, *, num_classes: int) -> None:
    """Warns where the data's classes `ours` are not those of the model: the accuracy would be that of chance."""
    if not ours or run.valid_labels or run.class_map:
        return
    if len(ours) < num_classes:
        log.warning('The data has %d classes, the model %d: say which by --valid_labels FILE or --class_map FILE, else '
                    "they are taken for the model's first.", len(ours), num_classes)
    elif known and list(known) != ours:
        log.warning('The data has other classes (%s, ...) than the checkpoint was trained on (%s, ...), and labels are '
                    'positions in the sorted names: rename the folders, or give --class_map FILE.', ours[0], known[0])


def read_valid_labels(path: str, recipe: Recipe, classes: list[str]) -> list[int]:
    """The model's classes in a file, one index a line, each of one of the data's `classes`. Raises UserError."""
    try:
        labels = [int(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f'--valid_labels {path} cannot be read ({error}); give a class index a line') from None
    if not labels or min(labels) < 0 or max(labels) >= (recipe.num_classes or 0):
        raise UserError(f'--valid_labels {path}: give indices below the {recipe.num_classes} classes of the model')
    if classes and len(labels) != len(classes):
        raise UserError(f'--valid_labels {path} names {len(labels)} classes, but the data has {len(classes)}; give one '
                        'for each, in the order of the data')
    return labels


def read_real_labels(path: str, val: ValLoader, *, num_classes: int) -> torch.Tensor:
    """Bool [images of this rank, classes] from ReaL's JSON: a list of labels for each image, by its number.

    Raises:
        UserError: where the file or the images' names are not ImageNet's.
    """
    try:
        labels = json.loads(Path(path).read_text())
        real = torch.zeros(len(val.names), num_classes, dtype=torch.bool)
        for row, name in enumerate(val.names):
            real[row, labels[int(Path(name).stem.rsplit('_', 1)[-1]) - 1]] = True
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f'--real_labels {path} does not fit the images ({error}); give ReaL\'s real.json and the '
                        'ImageNet test images under their own names (ILSVRC2012_val_00000001.JPEG)') from None
    return real


def evaluation_folder(source: str | None, model: str) -> Path:
    """Where eval.json goes without --output_dir: beside a checkpoint file where that can be, else runs/<model>."""
    file = Path(source).expanduser() if source else None
    beside = file is not None and file.is_file() and os.access(file.parent, os.W_OK)
    return file.parent if beside else Path('runs') / model


def results_table(results: list[dict[str, Any]]) -> str:
    """Several evaluations as a table of text."""
    lines = [f'{"top-1":>7}  {"top-5":>7}  {"published":>9}  {"weights":>10}  {"size":>4}  checkpoint']
    for row in results:
        published = f'{row["published_acc1"]:.1f}' if row.get('published_acc1') else '-'
        lines.append(f'{row["acc1"]:7.3f}  {row["acc5"]:7.3f}  {published:>9}  {row["weights"]:>10}  '
                     f'{row["test_size"]:4d}  {row["checkpoint"] or row["model"]}')
    return '\n'.join(lines)


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Appends an evaluation to a CSV file, with a header where it is new. Raises UserError where it cannot."""
    columns = ('checkpoint', 'model', 'weights', 'gate', 'test_size', 'crop_pct', 'crop_mode', 'interpolation', 'acc1',
               'acc5', 'loss', 'count', 'published_acc1', 'difference_acc1', 'published_acc5', 'difference_acc5',
               'images_per_second')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'a', newline='') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore')
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(result)
    except OSError as error:
        raise UserError(f'--results_file {path} cannot be written ({error.strerror}); give a file') from None
