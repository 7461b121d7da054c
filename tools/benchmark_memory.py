"""The memory that a recipe's training step takes on a CUDA device, by precision and checkpointing."""
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from recipes import RECIPES, Recipe, Run, fit_batch
from tasks import create_task
from tools.alternation import Row
from training.plan import AllFound
from training.start import build_step, prepare_model
from utils import Processes, UserError, choose_device, read_json, write_json

FIGURES = Path(__file__).resolve().parent.parent / 'benchmarks' / 'memory.json'
FORMS = {'as the row': (None, False), 'bf16': ('bf16', False), 'checkpointed': (None, True),
         'bf16, checkpointed': ('bf16', True)}


def peak(recipe: Recipe, run: Run, processes: Processes) -> dict[str, float] | None:
    """The allocator's peak over two updates of one micro-batch, GiB; None where the device has too little.

    The second update has the optimizer's state. A detector's samplers draw their maximum, as in a crowded image; the
    example has two boxes. Outside of the allocator are cuDNN's workspaces, the context, and with
    several GPUs NCCL's and DDP's buffers.
    """
    device = processes.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        task = create_task(recipe, run)
        step = build_step(task, run, processes, prepare_model(task, run, device))
        step.model.train()
        batches = itertools.repeat(task.example_batch(run.batch_size, device))
        with AllFound():
            for update in range(2):
                step(batches, update)
    except torch.cuda.OutOfMemoryError:
        return None
    return {'allocated': round(torch.cuda.max_memory_allocated(device) / 2**30, 1),
            'reserved': round(torch.cuda.max_memory_reserved(device) / 2**30, 1)}


def measure(names: Sequence[str], *, device: str = 'cuda') -> list[Row]:
    """Measures recipes at their own micro-batches, and keeps the figures in benchmarks/memory.json.

    Args:
        names: of recipes; all but those of a CPU by default.

    Returns:
        A row a recipe: 'recipe', 'micro_batch', and by form the allocated and the reserved GiB.
    """
    if missing := [name for name in names if name not in RECIPES]:
        raise UserError(f'{missing[0]} is no recipe; main.py --list_recipes names them')
    processes = Processes(choose_device(device))
    if processes.device.type != 'cuda':
        raise UserError(f'--device {device}: only the memory of a CUDA device is counted; give one')
    kept = read_json(FIGURES, lambda value: isinstance(value, dict)) or {}
    rows = []
    for name in names or [name for name, row in RECIPES.items() if 'GPU' in row.hardware]:
        row = RECIPES[name]
        row = dataclasses.replace(row, num_classes=row.num_classes or row.published_data.classes)
        figures = {}
        for form, (precision, checkpointing) in FORMS.items():
            recipe = dataclasses.replace(row, precision=precision or row.precision,
                                         total_batch_size=row.micro_batch_size)
            run = fit_batch(recipe, Run(device=device, grad_checkpointing=checkpointing))
            figures[form] = peak(recipe, run, processes)
        kept[name] = {'micro_batch': row.micro_batch_size, 'precision': row.precision, **figures}
        write_json(FIGURES, kept)  # at once: a borrowed device may go at any time
        rows.append({'recipe': name, 'micro_batch': row.micro_batch_size, **{
            form: f'{found["allocated"]} ({found["reserved"]})' if found else 'too much'
            for form, found in figures.items()}})
    return rows
