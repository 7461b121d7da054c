"""What the engine costs over a bare training loop, and a save over none, alternated (`tools/benchmark.py engine`)."""
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

import models  # noqa: F401, registers the MogaNets
from engine import TrainStep, create_scaler, train_updates
from optim_factory import ModelEma, create_optimizer
from recipes import RECIPES, Recipe, Run
from tasks import create_task
from tasks.classification import Labelled
from tools.alternation import spread
from training.checkpoint import CheckpointFolder, TrainState
from training.start import arithmetic_of, settle_arithmetic
from utils import write_atomically


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _model(recipe: Recipe, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(recipe.model, drop_path_rate=recipe.drop_path).train()
    return model.to(device, memory_format=torch.channels_last)


def measure(*, recipe: Recipe = RECIPES['moganet_xtiny'], input_size: int = 64, batch_size: int = 16, rounds: int = 9,
            steps: int = 5, device: str = 'cpu') -> dict[str, Any]:
    """Measures the engine beside a bare loop of forward, backward and optimizer, in fp32, in this process.

    Args:
        recipe: whose model, loss and optimizer are used.
        rounds: alternations; ratios are formed within a round.
        steps: updates of each contender in a round.

    Returns:
        milliseconds of a bare step; and the ratios to it of the engine, of the engine with the moving average, and of
        both with a report every update.
    """
    place = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, input_size, input_size, generator=generator).to(
        place, memory_format=torch.channels_last)  # as the loaders give them
    targets = torch.randint(1000, (batch_size,), generator=generator).to(place)

    task = create_task(dataclasses.replace(recipe, smoothing=0.0), Run())
    bare_model = _model(recipe, place)
    bare_optimizer = create_optimizer(bare_model, recipe)

    def bare() -> None:
        for _ in range(steps):
            F.cross_entropy(bare_model(images), targets).backward()
            bare_optimizer.step()
            bare_optimizer.zero_grad()

    def engine(*, average: bool, print_freq: int) -> Callable[[], None]:
        model = _model(recipe, place)
        step = TrainStep(model, task, create_optimizer(model, recipe), device=place,
                         ema=ModelEma(model, decay=0.9999) if average else None)

        def run() -> None:
            train_updates(step, itertools.repeat(Labelled(images, targets)), begin=0, end=steps,
                          set_schedule=lambda update: recipe.lr, images_per_update=batch_size, print_freq=print_freq)
        return run

    contenders = {
        'engine': engine(average=False, print_freq=10 ** 9), 'engine_ema': engine(average=True, print_freq=10 ** 9),
        'engine_ema_report_every_update': engine(average=True, print_freq=1)}
    times: dict[str, list[float]] = {name: [] for name in ('bare', *contenders)}
    for work in (bare, *contenders.values()):
        work()
    for _ in range(rounds):
        for name, work in (('bare', bare), *contenders.items()):
            times[name].append(_seconds(work, place))
    result: dict[str, Any] = {
        'model': recipe.model, 'input_size': input_size, 'batch_size': batch_size, 'device': device,
        'bare_step_ms': round(1e3 * statistics.median(times['bare']) / steps, 2)}
    for name in contenders:
        result[f'ratio_{name}'] = spread([a / b for a, b in zip(times[name], times['bare'], strict=True)])
    return result


def measure_save(*, recipe: Recipe = RECIPES['moganet_xtiny'], rounds: int = 9, device: str = 'cpu',
                 folder: str | None = None) -> dict[str, Any]:
    """Measures for how long training waits in a save, beside a plain `torch.save` of the same state, alternated.

    Args:
        recipe: whose model, moving average and optimizer are saved.
        folder: where the saves go; a temporary folder by default.

    Returns:
        megabytes of a checkpoint; milliseconds of `torch.save`, written and flushed to disk as ours is; and the ratio
        to it of the time until training goes on.
    """
    place = torch.device(device)
    model = _model(recipe, place)
    ema, optimizer = ModelEma(model, decay=0.9999), create_optimizer(model, recipe)
    task = create_task(recipe, Run())
    step = TrainStep(model, task, optimizer, device=place, ema=ema)
    step(iter([task.example_batch(2, place)]), 0)
    state = TrainState(
        model=model, optimizer=optimizer, scaler=create_scaler(place, 'fp32'), ema=ema, sums=step.sums.values,
        skips=step.skips.values, recipe=recipe, classes=[], class_map=None, updates_per_epoch=1, micro_batch_size=2,
        arithmetic=arithmetic_of(settle_arithmetic(Run(), place)), sources={})
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        files, plain = CheckpointFolder(Path(temporary), keep=1), Path(temporary) / 'plain.pth'

        def synchronous() -> None:
            write_atomically(plain, lambda file: torch.save(state.state_dict(), file))

        waits: dict[str, list[float]] = {'torch.save': [], 'stall': []}
        for number in range(-1, rounds):  # the first does not count
            for name, work in (('torch.save', synchronous), ('stall', lambda: files.save(state.state_dict()))):
                seconds = _seconds(work, place)
                if number >= 0:
                    waits[name].append(seconds)
            files.wait()
        size = plain.stat().st_size
    return {
        'model': recipe.model, 'device': device, 'megabytes': round(size / 1e6, 1),
        'torch_save_ms': round(1e3 * statistics.median(waits['torch.save']), 1),
        'ratio_save_stall': spread([a / b for a, b in zip(waits['stall'], waits['torch.save'], strict=True)])}
