"""Averages the weights of several classifiers from one start into one file, a model soup (arXiv 2203.05482).

    python tools/average.py runs/a/checkpoint-last.pth runs/b/checkpoint-last.pth --output soup.pth --data_path FOLDER
    python tools/average.py runs/*/checkpoint-last.pth --greedy --output soup.pth --data_path FOLDER

The mean of all files or, greedy, of those without which the mean is worse: the files are taken in by falling accuracy
on the test images, and each stays where the mean is at least as good with it. These images have then chosen, so that
the accuracy on others is the honest one. Batch norms have no use for a mean of statistics, which are taken anew on
training images. `main.py --eval --checkpoint soup.pth` evaluates the file.
"""
import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.modules.batchnorm import _BatchNorm

import datasets
import engine
from models.weights import Weights, apply_weights, load_weights, save_weights
from pipeline import labels
from recipes import Classification, Recipe, Run, check_start, resolve
from recipes.fields import MADE_UP
from tasks import create_task
from training.evaluation import evaluate_one, find_recipe
from training.start import adapt_to_device, prepare_model
from utils import Processes, UserError, as_path, choose_device, run_cli

# Flags of main.py that mean here what they mean there
FLAGS = ('weights', 'model', 'data_set', 'data_path', 'eval_data_path', 'class_map', 'total_batch_size',
         'val_batch_size', 'num_workers', 'device')


def check_alike(parts: Sequence[Weights]) -> None:
    """Refuses files that are not classifiers of one architecture and of the same classes.

    Raises:
        UserError: that names the file.
    """
    first = parts[0]
    if dense := [part.source for part in parts if part.dense]:
        raise UserError(f'{dense[0]} is of a detector or a segmentor, and means are made of classifiers alone')

    def shapes(weights: Weights) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in weights.state_dict.items()}

    for part in parts[1:]:
        apart = [name for name, shape in shapes(part).items() ^ shapes(first).items()]
        told = (part.gate, first.gate), *((part.meta.get(key), first.meta.get(key)) for key in ('model', 'class_map'))
        unlike = [f'{ours}, not {theirs}' for ours, theirs in told if ours and theirs and ours != theirs]
        classes, known = (labels.known_names(weights.meta.get('classes')) for weights in (part, first))
        if apart or unlike:
            reason = unlike[0] if unlike else f'{len(set(apart))} tensors, {min(apart)} for one, differ'
            raise UserError(f'{part.source} is of another architecture than {first.source} ({reason}); give runs of '
                            'one model')
        if classes and known and classes != known:
            differ = labels.difference(classes, known, we='it', they=first.source) or 'their order differs'
            raise UserError(f'{part.source} has other classes than {first.source} ({differ}); give runs on the same '
                            'classes')


def mean_of(parts: Sequence[Weights]) -> Weights:
    """The mean of weights, summed in float64; of whole numbers, as the counts of batches, the first's."""
    first = parts[0]
    state = {name: (sum(part.state_dict[name].double() for part in parts) / len(parts)).to(value.dtype)
             if value.is_floating_point() else value for name, value in first.state_dict.items()}
    which = first.which if len({part.which for part in parts}) == 1 else 'raw'
    meta = {key: value for key, value in first.meta.items() if key != 'epoch'}
    return dataclasses.replace(first, state_dict=state, which=which, meta=meta, source=f'mean of {len(parts)} files')


class Statistics:
    """Takes the statistics of a model's batch norms anew, on training images augmented as in training."""

    def __init__(self, recipe: Recipe, meta: dict[str, Any], run: Run, *, images: int, device: torch.device):
        """
        Args:
            meta: what is known of the weights.
            images: how many to take, in whole batches, of one epoch at most.

        Raises:
            UserError: where the model has batch norms and there are no training images.
        """
        self.recipe = adapt_to_device(dataclasses.replace(recipe, sync_bn=False), run, device)
        task = create_task(self.recipe, run)
        task.trained, task.trained_map = labels.known_names(meta.get('classes')), meta.get('class_map')
        self.model = prepare_model(task, run, device).eval()
        self.loader = None
        if not any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            return
        if recipe.data_set not in MADE_UP and not Path(run.data_path).exists():
            raise UserError(f'{recipe.model} has batch norms, whose statistics are taken anew on training images, and '
                            f'{run.data_path} does not exist; give --data_path')
        # The batch whose statistics the norms have known
        size = recipe.total_batch_size
        size = size if 'total_batch_size' in run.given else min(size, recipe.micro_batch_size)
        task.recipe = dataclasses.replace(task.recipe, total_batch_size=size)
        self.loader = datasets.build_loaders(task, dataclasses.replace(run, batch_size=size, update_freq=1),
                                             device=device, splits=('train',)).train
        self.batches = min(math.ceil(images / size), self.loader.updates_per_epoch)
        self.task = task

    def renew(self, weights: Weights) -> Weights:
        """The weights with new statistics; as they are where the model has no batch norms."""
        if self.loader is None:
            return weights
        apply_weights(self.model, weights)
        engine.precise_bn(self.model, self.loader.epoch(0, end=self.batches), self.task.loss,
                          precision=self.recipe.precision, frozen=engine.frozen_norms(self.model))
        return dataclasses.replace(weights, state_dict={name: value.cpu().clone(memory_format=torch.contiguous_format)
                                                        for name, value in self.model.state_dict().items()})

    def close(self) -> None:
        """Ends the worker processes."""
        if self.loader is not None:
            self.loader.close()


def greedy(parts: Sequence[Weights], renew: Callable[[Weights], Weights], score: Callable[[Weights], float]) -> Weights:
    """The mean of those files that make it no worse, taken in by falling score; of a single one, the file as it is."""
    scores = [score(part) for part in parts]
    for part, value in zip(parts, scores, strict=True):
        print(f'{value:8.3f}  {part.source}')
    ranked = sorted(range(len(parts)), key=lambda i: -scores[i])
    chosen, soup, best = [parts[ranked[0]]], parts[ranked[0]], scores[ranked[0]]
    for i in ranked[1:]:
        trial = renew(mean_of([*chosen, parts[i]]))
        value = score(trial)
        print(f'{value:8.3f}  with {parts[i].source}: {"taken" if value >= best else "left out"}')
        if value >= best:
            chosen, soup, best = [*chosen, parts[i]], trial, value
    return soup


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Exits with status 2 on a wrong one, as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', metavar='FILE', help='checkpoints of any known format, two or more')
    parser.add_argument('--output', required=True, type=as_path, help='the file to write, which is not there yet')
    parser.add_argument('--greedy', action='store_true', help='only the files that make the mean no worse')
    parser.add_argument('--images', type=int, default=10_000, help='training images for the statistics of batch norms')
    fields = Classification.__dataclass_fields__ | Run.__dataclass_fields__
    for name in FLAGS:
        parser.add_argument(f'--{name}', help=fields[name].metadata['help'].replace('%', '%%'))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Averages as the flags say. Raises UserError; nothing is then written."""
    args = parse(argv)
    if len(args.files) < 2 or args.images < 1:
        raise UserError('a mean is of two files or more, and its batch norms need --images of 1 or more')
    if args.output.exists():
        raise UserError(f'{args.output} is there already; give another --output')
    given = {name: value for name in FLAGS if (value := getattr(args, name)) is not None}
    recipe, run = resolve(['--eval', '--checkpoint', *args.files, *(word for name, value in given.items()
                                                                   for word in (f'--{name}', value))])
    check_start(recipe, run)
    processes = Processes(device=choose_device(run.device))
    parts = [load_weights(file, run.weights) for file in run.checkpoint]
    check_alike(parts)
    _, recipe, meta = find_recipe(run.checkpoint[0], recipe, run)
    statistics = Statistics(recipe, meta, run, images=args.images, device=processes.device)

    def score(weights: Weights) -> float:
        return evaluate_one(weights, recipe, meta, run, False, processes=processes, kept={})[recipe.best]

    try:
        soup = greedy(parts, statistics.renew, score) if args.greedy else statistics.renew(mean_of(parts))
    finally:
        statistics.close()
    save_weights(soup, args.output)
    print(f'{args.output}: {soup.source}, {args.output.stat().st_size:,} bytes')


if __name__ == '__main__':
    run_cli(main)
