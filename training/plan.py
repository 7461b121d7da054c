"""What a run will cost: memory, hours, cores and disk, counted on tensors without values (`--plan`).

Nothing is trained, loaded or downloaded, so that a machine without a GPU does it in seconds. Memory is what torch's
allocator would hand out. Hours are predicted, from the bytes and operations of a step and the cards' data sheets.
"""
import contextlib
import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import engine
from recipes import Recipe, Run
from recipes.fields import MADE_UP
from tasks import Task, create_task
from training.start import build_step, prepare_model, set_grad_checkpointing
from training.teachers import find_teacher
from training.traffic import Traffic
from utils import Processes, UserError, align, reason_of

GIB = 2**30
CPU = torch.device('cpu')
BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks' / 'cpu.json'

# What torch's allocator takes from the card, over what it hands out: 1.05 to 1.12 on the rows of ImageNet
FRAGMENTS = 1.12
# CUDA's context, the workspaces of cuDNN and cuBLAS, NCCL's buffers: 1 to 3 GiB
CONTEXT = 2 * GIB
# Shares of a data sheet that training reaches. By this count, timm's published rates of ConvNeXts on an RTX 3090 and an
# A100 are 0.41 to 0.56 of the bandwidth
BANDWIDTH = (0.40, 0.55)
ARITHMETIC = 0.75
# The host's seconds for a kernel: an update of XT, in fp16, of 3,851 kernels by this count, costs it 39 ms on a server
# core, and real launches some 8 ms more
LAUNCH = 12e-6


class Card(NamedTuple):
    """What a GPU's data sheet promises."""

    title: str
    memory: float  # GiB that a process can have
    bandwidth: float  # bytes a second
    rates: dict[str, float]  # operations a second by arithmetic; 16 bits dense, and summed in fp32


CARDS = {
    'h100': Card('H100 SXM, 80 GB', 79, 3.35e12, {'fp32': 67e12, 'tf32': 494e12, 'fp16': 989e12, 'bf16': 989e12}),
    'a100': Card('A100 SXM, 80 GB', 79, 2.04e12, {'fp32': 19.5e12, 'tf32': 156e12, 'fp16': 312e12, 'bf16': 312e12}),
    'v100': Card('V100 SXM, 32 GB', 31.5, 0.9e12, {'fp32': 15.7e12, 'tf32': 15.7e12, 'fp16': 125e12}),
    '4090': Card('RTX 4090, 24 GB', 23.5, 1.008e12, {'fp32': 82.6e12, 'tf32': 82.6e12, 'fp16': 165e12, 'bf16': 165e12}),
}


# ---- Counting -------------------------------------------------------------------------------------------------------

class _Memory(MemTracker):
    """torch's count of what is allocated, on the device alone and not in each module.

    The count by module asks every module after every operator: 6 s of a step of XT, which takes 1 s without.
    """

    def _pre_fw_hook(self, *_: Any) -> None: ...
    def _post_fw_hook(self, *_: Any) -> None: ...
    def _pre_bw_hook(self, *_: Any) -> None: ...
    def _post_bw_hook(self, *_: Any) -> None: ...

    def peak(self) -> int:
        """Bytes."""
        return self.get_tracker_snapshot('peak')[CPU]['Total']


class AllFound(TorchDispatchMode):
    """Within it, what finds some elements of a tensor finds all, and so needs no values: the most that it can give.

    Every candidate is positive and negative, and no box is suppressed by another, so that a sampler draws its maximum.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        match func.name():
            case 'aten::nonzero':  # the indices of the first element, which are valid whatever is done with them
                return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
            case 'torchvision::nms':
                return args[0].new_zeros(len(args[0]), dtype=torch.int64)
            case 'aten::_unique2':  # NMS goes through the labels one by one: all boxes have one
                return args[0].flatten()[:1], *args[0].new_empty((2, 0), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


class Line(NamedTuple):
    """What grows with the micro-batch, from two sizes: activations, which are nearly all of it, grow linearly."""

    sizes: tuple[int, int]
    values: tuple[float, float]

    def __call__(self, size: int) -> float:
        (small, large), (low, high) = self
        return low + (high - low) / (large - small) * (size - small)


class Costs(NamedTuple):
    """What the steps of a run take."""

    memory: Line  # bytes allocated at the peak, by micro-batch
    checkpointed: Line | None  # the same with --grad_checkpointing; None where it is on, or the model has none
    moved: Line  # bytes of a micro-step with its update, by micro-batch
    kernels: int  # of such a step
    operations: float  # floating-point operations of an image
    checkpoint: int  # bytes of a file with weights, average and optimizer
    average: int  # bytes of a file with the average alone; 0 without


def _drop_values(model: nn.Module) -> None:
    """Replaces a model's parameters and buffers by ones without values, within a FakeTensorMode."""
    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CPU)

    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(empty(param), requires_grad=param.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty(buffer)


def _size(tensors: Any) -> int:
    """Bytes of the tensors in a nested state."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    values = tensors.values() if isinstance(tensors, dict) else tensors if isinstance(tensors, (list, tuple)) else ()
    return sum(map(_size, values))


def _build(task: Task, run: Run, model: nn.Module) -> engine.TrainStep:
    """The step that trains a model, with the state that its optimizer makes in its first step, all without values."""
    for dropped in (model, *([task.teacher.model] if task.teacher else [])):
        _drop_values(dropped)
    step = build_step(task, run, Processes(CPU), model)
    engine.train_mode(step.model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    step.optimizer.step()
    step.optimizer.zero_grad()
    return step


def _peak(step: engine.TrainStep, size: int, memory: _Memory) -> int:
    """Bytes allocated at the peak of a micro-step of `size` images with its update."""
    with memory:
        step(itertools.repeat(step.task.example_batch(size, CPU)), 0)
    return memory.peak()


def count_operations(task: Task, model: nn.Module, size: int, *, passes: int = 3) -> float:
    """Floating-point operations of a training step for an image: `passes` times the model's forward pass's.

    A teacher's pass counts once.
    """
    def count(forward: Callable[[Any], Any]) -> int:
        with FlopCounterMode(display=False) as counter:  # its count of a depthwise backward pass forgets the groups
            forward(task.example_batch(size, CPU))
        return counter.get_total_flops()

    both = count(functools.partial(task.loss, model))
    taught = count(lambda batch: task.teacher.answer(batch.images)) if task.teacher is not None else 0
    return (passes * (both - taught) + taught) / size


@contextlib.contextmanager
def _without_values(recipe: Recipe) -> Iterator[None]:
    """Within it tensors have shapes and no values. Raises UserError for a model that asks for values."""
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), AllFound():
            warnings.filterwarnings('ignore', 'Accessing the data pointer of FakeTensor')  # torch's own look at it
            yield
    except Exception as error:
        if not type(error).__module__.startswith(('torch._subclasses', 'torch.fx', 'torch._dynamo')):
            raise
        raise UserError(f'--plan: the loss of {recipe.name} cannot be counted without values '
                        f'({reason_of(error)[:200]}); measure it on a GPU by --batch_size auto') from error


def count_all(recipe: Recipe, run: Run) -> Costs:
    """Counts the steps of a run at two micro-batches, with and without gradient checkpointing.

    Raises:
        UserError: where the model cannot be built, or its loss asks for values.
    """
    # The gradients are there at the peak where DDP keeps its buckets, or a micro-step before has left its own
    kept = run.world_size > 1 or run.update_freq > 1
    small = max(run.batch_size // 8, 2)
    sizes = small, max(run.batch_size, 2 * small)
    # No values, so no overflow to look for, and no other process to exchange statistics with: the bytes are the same
    recipe = replace(recipe, precision='bf16' if recipe.precision == 'fp16' else recipe.precision, sync_bn=False,
                     model_ema=recipe.model_ema and not run.model_ema_force_cpu)
    # Two images, since the model is tried with as many, which for some of them is done with values
    run = replace(run, batch_size=2, update_freq=1, channels_last=run.channels_last is not False, compile=False,
                  print_param_groups=False)
    task, memory = create_task(recipe, run), _Memory()
    model = prepare_model(task, run, CPU)
    task.teacher = find_teacher(recipe, run, CPU, loading=False)
    with _without_values(recipe):
        step = _build(task, run, model)
        memory.track_external(step.unwrapped, step.optimizer, *([step.ema.module] if step.ema else []),
                              *([task.teacher.model] if task.teacher else []))
        peaks, traffic, checkpointed = [], [], None
        for size in sizes:
            with Traffic(as_cuda=True) as counted:
                peaks.append(_peak(step, size, memory))
            traffic.append(counted)
        operations = count_operations(task, model, small, passes=4 if run.grad_checkpointing else 3)
        if not run.grad_checkpointing:
            with contextlib.suppress(UserError):  # some models have none
                set_grad_checkpointing(model, recipe)
                checkpointed = [_peak(step, size, memory) for size in sizes]
    gradients = kept * sum(_size(param) for param in model.parameters() if param.requires_grad)

    def line(values: list[int] | None) -> Line | None:
        return Line(sizes, (values[0] + gradients, values[1] + gradients)) if values else None

    average = _size(step.ema.module.state_dict()) if step.ema else 0
    return Costs(line(peaks), line(checkpointed), Line(sizes, tuple(each.total() for each in traffic)),
                 traffic[1].kernels.total() + traffic[1].launches.total(), operations,
                 _size([model.state_dict(), step.optimizer.state_dict()]) + average, average)


# ---- What follows from it -------------------------------------------------------------------------------------------

def largest_micro_batch(memory: Line, card: Card, recipe: Recipe, run: Run) -> int:
    """The largest micro-batch that divides a GPU's share of the batch and fits a card; 0 where none does."""
    share = recipe.total_batch_size // run.world_size
    return max((size for size in range(1, share + 1)
                if share % size == 0 and FRAGMENTS * memory(size) + CONTEXT <= card.memory * GIB), default=0)


def predict_seconds(costs: Costs, card: Card, recipe: Recipe, run: Run) -> tuple[float, float] | None:
    """The least and the most seconds that an update should take; None where the card lacks the precision.

    The least where bandwidth and arithmetic are used side by side, the most where one waits for the other; never less
    than the host needs to launch the kernels. The exchange between the GPUs is left out.
    """
    rate = card.rates.get('tf32' if run.tf32 is not False and recipe.precision == 'fp32' else recipe.precision)
    if rate is None:
        return None
    moved, host = costs.moved(run.batch_size) / card.bandwidth, LAUNCH * costs.kernels
    arithmetic = costs.operations * run.batch_size / (ARITHMETIC * rate)
    fast = max(moved / BANDWIDTH[1], arithmetic, host)
    slow = max(moved / BANDWIDTH[0] + arithmetic, host)
    return run.update_freq * fast, run.update_freq * slow


class Data(NamedTuple):
    """What the run is trained on."""

    name: str
    classes: int
    images: int
    gigabytes: float = 0  # of what has yet to be brought to the machine


def find_data(recipe: Recipe, run: Run) -> Data:
    """The images under --data_path where it is there, else those that the rows of the task were trained on.

    Raises:
        UserError: where the data cannot be read, or there is none and none is known.
    """
    ours = run.data_path != Run.data_path or recipe.data_set == 'image_folder'  # the default is ImageNet's folder
    if recipe.data_set in MADE_UP or (ours and Path(run.data_path).exists()):
        task = create_task(recipe, run)
        source = task.open('train')
        task.learn_classes([source])
        return Data(recipe.data_set if recipe.data_set in MADE_UP else run.data_path,
                    task.recipe.num_classes, len(source))
    known = recipe.published_data
    if known is None or recipe.data_set != type(recipe).data_set:
        raise UserError(f'--plan does not know the images of --data_set {recipe.data_set}; give --data_path')
    return Data(known.name, recipe.num_classes or known.classes, known.images, known.gigabytes)


# ---- In words -------------------------------------------------------------------------------------------------------

def _span(low: float, high: float) -> str:
    """A range, to two digits."""
    return '-'.join(f'{float(f"{value:.2g}"):,.{0 if value >= 9.5 else 1}f}' for value in (low, high))


def _memory_table(costs: Costs, run: Run) -> str:
    sizes = sorted({run.batch_size * 2 // part for part in (1, 2, 4, 8, 16)} - {0})
    rows = [('micro-batch', costs.memory), ('with --grad_checkpointing', costs.checkpointed)]
    return align([['GiB of a micro-batch of', *map(str, sizes)],
                  *([name if i else 'as it is', *(f'{line(size) / GIB:.1f}' for size in sizes)]
                    for i, (name, line) in enumerate(rows) if line is not None)])


def _images_per_core(recipe: Recipe) -> float | None:
    """Images a second that one core prepares, as BENCHMARKS.md has it; None where it was not measured."""
    subject = recipe.published_data.benchmark if recipe.published_data else ''
    figures = json.loads(BENCHMARKS.read_text()).get(subject)
    return figures['images_per_second_and_core']['this_uint8'] if figures else None


def _card_row(name: str, costs: Costs, updates: int, recipe: Recipe, run: Run) -> list[str]:
    card, micro, gpus = CARDS[name], run.batch_size, run.world_size
    fitting = [largest_micro_batch(line, card, recipe, run) if line else None
               for line in (costs.memory, costs.checkpointed)]
    cells = [card.title, *('-' if size is None else f'{size}' if size >= micro else f'{size or "none"} (not {micro})'
                           for size in fitting)]
    seconds = predict_seconds(costs, card, recipe, run)
    if seconds is None:
        return [*cells, f'no {recipe.precision}', '-', '-', *(['-'] if run.price is not None else [])]
    rates = [recipe.total_batch_size / gpus / value for value in reversed(seconds)]
    hours = [updates * value / 3600 for value in seconds]
    per_core = _images_per_core(recipe)
    cores = f'{math.ceil(gpus * rates[1] / per_core)}' if per_core else 'not measured'
    price = [] if run.price is None else [_span(*(gpus * run.price * value for value in hours))]
    return [*cells, _span(*rates), _span(*hours), *price, cores]


def plan(recipe: Recipe, run: Run) -> str:
    """What a training will cost, as text.

    Raises:
        UserError: where it cannot be known, with the cure.
    """
    data = find_data(recipe, run)
    recipe = replace(recipe, num_classes=data.classes)
    per_epoch = data.images // recipe.total_batch_size
    if not per_epoch:
        raise UserError(f'{data.images:,} training images are fewer than one batch of {recipe.total_batch_size:,}; '
                        'give --total_batch_size')
    updates, costs, gpus = recipe.total_updates(per_epoch), count_all(recipe, run), run.world_size
    tf32 = ' (with TF32 where the card has it)' if recipe.precision == 'fp32' and run.tf32 is not False else ''
    columns = ['card', 'largest micro-batch', 'with --grad_checkpointing', 'images/s of a GPU', f'hours on {gpus}',
               *(['price'] if run.price is not None else []), 'cores that feed them']
    per_core = _images_per_core(recipe)
    files = run.save_ckpt_num + 2  # the newest, the best, and one that is being written
    disk = (files * costs.checkpoint + costs.average) / 1e9
    lines = [
        f'{recipe.name}: {recipe.model}, {recipe.length()}, {updates:,} updates of {recipe.total_batch_size:,} images '
        f'({gpus} x {run.batch_size} x {run.update_freq}), {recipe.precision}{tf32}; {data.images:,} images of '
        f'{data.name}',
        'Nothing of this is measured. Memory is counted as the allocator hands it out; a micro-batch fits where that, '
        f'{FRAGMENTS - 1:.0%} more and {CONTEXT / GIB:.0f} GiB do, and the largest of a card divides the '
        f'{recipe.total_batch_size // run.world_size:,} images of a GPU. Hours are predicted: from '
        f'{costs.moved(run.batch_size) / run.batch_size / 1e6:,.0f} MB and {costs.operations / 1e9:,.0f} GFLOP an '
        f'image, {BANDWIDTH[0]:.0%} to {BANDWIDTH[1]:.0%} of the bandwidth and {ARITHMETIC:.0%} of the arithmetic of '
        "the card's data sheet, without evaluations, exchange between GPUs"
        f'{" and what --compile saves" if run.compile else ""}.',
        '', _memory_table(costs, run), '',
        align([columns, *(_card_row(name, costs, updates, recipe, run) for name in ([run.card] if run.card else CARDS)
                          )]), '',
        f'{per_core:.0f} images/s are taken for a core, as BENCHMARKS.md has it' if per_core else
        'How many such images a core prepares was not measured',
        (f'A checkpoint: {costs.checkpoint / 1e6:,.0f} MB; the folder of the run: at most {disk:,.1f} GB'
         if run.save_ckpt else 'No checkpoints') + (f'; {data.name}: {data.gigabytes} GB' if data.gigabytes else ''),
    ]
    return '\n'.join(lines)
