"""All measurements in one document: benchmarks/<device>.json for each kind of device, BENCHMARKS.md from them all."""
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tools import benchmark_data, benchmark_depthwise, benchmark_engine, benchmark_model
from tools.alternation import SUBJECTS, Row
from utils import UserError, choose_device, write_atomically, write_json

ROOT = Path(__file__).resolve().parent.parent
DEVICES = {'cpu': 'CPU', 'cuda': 'GPU'}
# The authors' form comes first, over which the speed-ups are; channels-last is the default of main.py
INFERENCE = ['authors', 'eager', 'channels_last', 'fused+channels_last', 'channels_last+compiled',
             'fused+channels_last+compiled']
TRAINING = ['authors', 'eager', 'channels_last', 'channels_last+compiled']
# What a model is measured with: one that such a device can be expected to run, in the time of a coffee
MODELS: dict[str, dict[str, Any]] = {
    'cpu': {'names': ['moganet_xtiny'], 'batch_size': 16, 'precisions': ['fp32'],
            'inference': INFERENCE, 'training': TRAINING},
    'cuda': {'names': ['moganet_xtiny', 'moganet_small', 'moganet_base'], 'batch_size': 128,
             'precisions': ['fp32', 'bf16', 'fp16'],
             'inference': INFERENCE, 'training': TRAINING},
}


def measure(device: str, *, rounds: int = 7, subjects: Sequence[str] | None = None,
            models: Sequence[str] | None = None, precisions: Sequence[str] | None = None) -> Row:
    """Runs benchmarks on a device, and returns their figures.

    They are kept, and BENCHMARKS.md is written anew, after each subject and each model: a borrowed device may go at any
    time. What was kept of the same machine stays until it is measured again.

    Args:
        subjects: of SUBJECTS; all of the device's by default.
        models: timm models to measure; those for the device by default.
        precisions: of the models, likewise.
    """
    place = choose_device(device)
    kind = place.type
    if kind not in DEVICES:
        raise UserError(f'the report is made for {" and ".join(DEVICES)}, not for {kind}; give another --device')
    about, kept = machine(place), load().get(kind, {})
    same = {**kept.get('machine', {}), 'date': about['date']} == about
    figures = {**(kept if same else {}), 'machine': about}

    def keep(subject: str, value: Any) -> None:
        figures[subject] = value
        write_json(ROOT / 'benchmarks' / f'{kind}.json', figures)
        write_atomically(ROOT / 'BENCHMARKS.md', lambda file: file.write(render(load()).encode()))

    def measure_models() -> list[Row]:
        usual = {**MODELS[kind], **({'names': models} if models else {}),
                 **({'precisions': precisions} if precisions else {})}
        for name in usual.pop('names'):
            rows = benchmark_model.measure([name], device=str(place), rounds=rounds, **usual)
            new = {(row['model'], row['precision']) for row in rows}
            others = [row for row in figures.get('model', []) if (row['model'], row['precision']) not in new]
            keep('model', others + rows)
        return figures['model']

    ways: dict[str, Callable[[], Any]] = {
        'depthwise': lambda: benchmark_depthwise.measure(device=str(place)),
        'model': measure_models,
        'data': lambda: benchmark_data.measure(None, rounds=rounds),
        'engine': lambda: benchmark_engine.measure(device=str(place), rounds=rounds),
        'checkpoint': lambda: benchmark_engine.measure_save(device=str(place), rounds=rounds),
        'traffic': lambda: benchmark_model.measure_traffic([]),
    }
    chosen = subjects or [subject for subject in SUBJECTS if subject != 'depthwise' or kind == 'cuda']
    for subject in chosen:
        keep(subject, ways[subject]())
    return {subject: figures[subject] for subject in ('machine', *chosen)}


def load() -> dict[str, Row]:
    """The figures kept so far, by the kind of device."""
    files = {kind: ROOT / 'benchmarks' / f'{kind}.json' for kind in DEVICES}
    return {kind: json.loads(path.read_text()) for kind, path in files.items() if path.exists()}


def machine(device: torch.device) -> dict[str, str]:
    """What it was measured on: processor, device, versions, date."""
    names = [line.split(':')[1].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')]
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('torch', 'torchvision', 'timm', 'numpy')]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    about = {'processor': f'{cores} cores of {names[0] if names else platform.processor() or platform.machine()}'}
    if device.type == 'cuda':
        about['device'] = torch.cuda.get_device_name(device)
    return about | {'versions': f'Python {platform.python_version()}, {", ".join(versions)}',
                    'date': time.strftime('%Y-%m-%d')}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# ---- The document ----------------------------------------------------------------------------------------------------

def cell(value: Any) -> str:
    """A figure as text: a spread as `median (min-max)`, None as 'not measured'."""
    if value is None:
        return 'not measured'
    if isinstance(value, dict):
        return f'{value["median"]:.2f} ({value["min"]:.2f}-{value["max"]:.2f})'
    return f'{value:,.4g}' if isinstance(value, float) else str(value)


def markdown_table(head: tuple[str, ...], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return '\n'.join(lines + ['| ' + ' | '.join(map(cell, row)) + ' |' for row in rows])


def by_device(figures: dict[str, Row], subject: str, rows: dict[str, str]) -> str:
    """A table of one subject's figures: a column for each kind of device, a row for each that one of them has."""
    return markdown_table(('', *DEVICES.values()), [
        [text, *(figures.get(kind, {}).get(subject, {}).get(name) for kind in DEVICES)] for name, text in rows.items()
        if any(name in kept.get(subject, ()) for kept in figures.values())])


def render(figures: dict[str, Row]) -> str:
    """BENCHMARKS.md from the figures of `load`."""
    models = [[DEVICES[kind], *(row[name] for name in ('model', 'precision', 'mode', 'form', 'images_per_second',
                                                       'speedup', 'mb', 'share_of_product', 'share_of_copy'))]
              for kind in figures for row in figures[kind].get('model', ())]
    unmeasured = [[name, None, *[''] * 8] for kind, name in DEVICES.items() if 'model' not in figures.get(kind, {})]
    any_device = next((each for each in figures.values() if 'traffic' in each), {'traffic': ()})
    traffic = [[row[name] for name in ('model', 'authors_mb', 'mb', 'ratio', 'convolutions_mb', 'hidden_mb', 'fp32_mb',
                                       'authors_kernels', 'kernels')] for row in any_device['traffic']]
    data = {kind: {'data': {**figures[kind]['data'], **figures[kind]['data']['images_per_second_and_core'],
                            **figures[kind]['data'].get('test_images_per_second_and_core', {}),
                            **figures[kind]['data']['milliseconds']}} for kind in figures if 'data' in figures[kind]}
    depthwise = figures.get('cuda', {}).get('depthwise', ())
    measured = '\n'.join(f'- {name}: ' + ('; '.join(figures[kind]['machine'].values()) if kind in figures else
                                          'not measured; `tools/gpu_check.sh` fills it in on a machine that has one')
                         for kind, name in DEVICES.items())
    return f'''# Benchmarks

`make benchmark` (`python tools/benchmark.py report`) writes this page; do not edit it. The numbers that other pages
quote come from here. A shared machine changes its speed within seconds, so that each ratio is formed within a round of
alternated runs. It is given as median (smallest-largest) over the rounds.

{measured}

## Data path

`python tools/benchmark.py data` compares this data path with the common one (Pillow decodes, timm's `create_transform`
augments), for the recipe `moganet_small`, on one core each, with JPEGs of 500x375 pixels. The GPU column has the
figures of that machine's processor.

{by_device(data, 'data', {
    'ratio_uint8': "over timm's uint8 path, uint8 tensors",
    'this_uint8': 'images/s and core, uint8', 'timm_uint8': "images/s and core, timm's uint8 path",
    'ratio_test': "test images of an evaluation, over timm's, uint8 tensors",
    'this_test': 'images/s and core, test images', 'timm_test': "images/s and core, timm's test images",
    'kilobytes_per_image': 'kB a file', 'read': 'ms an image: reading the file',
    'decode_crop_and_resize': 'ms an image: decoding down to the crop, and resizing it',
    'crop_and_resize': 'ms an image: of that, resizing', 'flip_and_augment': 'ms an image: flip and RandAugment',
    'seeds': 'ms an image: deriving seeds'})}

## Training engine

`python tools/benchmark.py engine` gives the time of an update over that of a bare loop of forward, backward and
optimizer (XT, batch 16 at 64 pixels).

{by_device(figures, 'engine', {
    'bare_step_ms': 'ms of the bare step', 'ratio_engine': 'the engine', 'ratio_engine_ema': 'with the moving average',
    'ratio_engine_ema_report_every_update': 'and with a report every update'})}

## Checkpoints

`python tools/benchmark.py checkpoint` gives the time for which training waits for a save, over the time in which
`torch.save` writes the same state.

{by_device(figures, 'checkpoint', {
    'megabytes': 'MB of the checkpoint (XT with average and optimizer)', 'torch_save_ms': 'ms of torch.save',
    'ratio_save_stall': 'the wait over that'})}

## Models

`python tools/benchmark.py model` gives speed-ups over the first form of each mode. `authors` is the formulation of the
same arithmetic by the authors, and `channels_last` is what main.py runs. MB an image are counted, for compiled forms by
the compiler. The last columns are the shares of what the device reaches in a large matrix product and in a large copy.

{markdown_table(('', 'model', 'precision', 'mode', 'form', 'images/s', 'speed-up', 'MB an image', 'share of product',
        'share of copy'), models + unmeasured)}

## Memory traffic

`python tools/benchmark.py traffic` counts the MB an image and the kernels of a training step by CUDA's eager kernels,
under autocast to bf16 at batch 64 and drop path 0.1. The authors' formulation is contiguous, ours is channels-last. It
counts on meta tensors, which need no device and have no noise. Within operators are the passes that torch's CUDA code
launches beside the one that gives the operator its name (biases and their gradients, second readings, copies). 3 % of
all rest on an assumption: that cuDNN rewrites what goes into a convolution to one channel.

{markdown_table(('model', "authors' MB", 'MB', 'ratio', 'of it convolutions', 'of it within operators', 'MB in fp32',
        "authors' kernels", 'kernels'), traffic)}
''' + (f'''
## Depthwise convolutions

`python tools/benchmark.py depthwise` gives the GB/s, forward / backward, of the tensors that each kind of depthwise
convolution of `moganet_small` must move, at batch 128 and 224 pixels, by the layout and by whether cuDNN may be used.

{markdown_table(tuple(depthwise[0]), [list(row.values()) for row in depthwise])}
''' if depthwise else '')
