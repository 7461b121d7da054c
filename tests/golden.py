"""Compares the bits that this checkout and an older commit compute on this machine: `make golden BASE=<commit>`.

    python tests/golden.py BASE [CASE ...]

Bits differ from machine to machine, so no figure is kept: both sides run here, from the same made-up files, in real
processes. A case is a command line; of its run are compared the SHA-256 of every tensor in its checkpoints, every
other value in them, log.txt without timings, and the pixels that the model saw first. Interrupted cases are also
stopped by the older commit and continued by this checkout. Exit status 0 means that all cases are equal.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIMIT = 1200  # s of a run, which takes 20 on two idle cores: nothing is compared by its time
TIMINGS = {'images_per_second', 'data_wait', 'seconds', 'checkpoint', 'throughput'}
# Layout, precision and TF32 are given, so that a change of their defaults does not show
BASIS = ('--device', 'cpu', '--channels_last', 'false', '--precision', 'fp32', '--tf32', 'false', '--print_freq', '2')
MODEL = ('--model', 'moganet_xtiny', '--model_kwargs', 'dims=[8,8,16,16]', 'depths=[1,1,1,1]', 'ffn_ratios=[2,2,2,2]',
         '--input_size', '32')
DIGITS = (*MODEL, *BASIS, '--data_set', 'digits', '--warmup_epochs', '1', '--model_ema', '--model_ema_decay', '0.9',
          '--mixup', '0.8', '--cutmix', '1.0', '--drop_path', '0.3')
FOLDER = (*MODEL, *BASIS, '--data_path', 'images', '--total_batch_size', '12', '--batch_size', '6', '--epochs', '2',
          '--warmup_epochs', '1', '--num_workers', '0')
# Runs in each process before main: prints the pixels that the model sees first, and stops itself where it is told to
WATCH = '''
import hashlib, os, signal, torch
from torch.nn.modules.module import register_module_forward_pre_hook
seen = 0
def watch(module, inputs):
    global seen
    # Throwaway passes before the training are of zeros, or on the device meta
    if type(module).__name__ == 'MogaNet' and not inputs[0].is_meta and inputs[0].any():
        seen += 1
        if seen <= 6:
            pixels = inputs[0].detach().contiguous().numpy().tobytes()
            print('pixels', rank, hashlib.sha256(pixels).hexdigest(), flush=True)
        if seen == STOP:
            os.kill(os.getpid(), signal.SIGTERM)
register_module_forward_pre_hook(watch)
'''


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line; `stop_at` is the forward pass of the model in which a first run gets SIGTERM."""

    words: tuple[str, ...]
    world_size: int = 1
    stop_at: int = 0


CASES = {
    'digits': Case((*DIGITS, '--total_batch_size', '479', '--batch_size', '479', '--epochs', '2')),
    'digits, accumulated, stopped': Case(
        (*DIGITS, '--total_batch_size', '480', '--batch_size', '240', '--epochs', '3'), stop_at=6),
    'digits, accumulated, 2 processes, stopped': Case(
        (*DIGITS, '--total_batch_size', '480', '--batch_size', '120', '--epochs', '3'), world_size=2, stop_at=6),
    'digits, 2 workers': Case((*DIGITS, '--total_batch_size', '480', '--batch_size', '240', '--epochs', '3',
                               '--num_workers', '2', '--mixup_mode', 'elem', '--mixup_off_epochs', '1')),
    'folder, 2 workers, stopped': Case((*FOLDER, '--num_workers', '2', '--recount', '2'), stop_at=7),
    'folder, colour jitter': Case((*FOLDER, '--aa', 'none', '--color_jitter', '0.4', '--vflip', '0.5')),
    'folder, 3-Augment': Case((*FOLDER, '--aa', '3a', '--color_jitter', '0.3', '--reprob', '0')),
    'folder, repeats': Case((*FOLDER, '--repeated_aug', '3', '--train_interpolation', 'random')),
    'BCE, LAMB': Case((*FOLDER, '--loss', 'bce_sum', '--opt', 'lamb', '--smoothing', '0', '--bce_target_thresh', '0.2',
                       '--dist_bn', 'broadcast'), world_size=2),
    'AGC, SGD': Case((*FOLDER, '--clip_grad', '0.1', '--clip_mode', 'agc', '--opt', 'sgd', '--precise_bn', '24')),
    'layer decay, decay schedule': Case((*FOLDER, '--layer_decay', '0.7', '--weight_decay_end', '0.2',
                                         '--clip_grad', '1', '--warmup_steps', '3', '--gate', 'double')),
    'bf16': Case((*FOLDER, '--precision', 'bf16', '--model_ema', '--model_ema_decay', '0.9')),
    'evaluation': Case((*BASIS, '--eval', '--data_path', 'images', '--real_labels', 'real.json', '--num_workers', '0',
                        '--checkpoint', 'folder, colour jitter/run/checkpoint-last.pth')),
    'evaluation, 2 processes': Case((*BASIS, '--eval', '--data_path', 'images', '--num_workers', '0', '--checkpoint',
                                     'bf16/run/checkpoint-best-ema.pth'), world_size=2),
}


def make_files(folder: Path) -> None:
    """An image folder of JPEGs of many sizes, named as ImageNet's test images are, and ReaL's labels for them."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    number = 0
    for split, count in (('train', 15), ('val', 6)):
        for name in ('ant', 'bee', 'cat'):
            (folder / 'images' / split / name).mkdir(parents=True)
            for _ in range(count):
                number += split == 'val'
                small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
                size = tuple(int(side) for side in rng.integers(40, 100, 2))
                path = folder / 'images' / split / name / (
                    f'ILSVRC2012_val_{number:08d}.JPEG' if split == 'val' else f'{_}.jpg')
                small.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    real = [sorted(set(rng.integers(0, 3, rng.integers(0, 3)).tolist())) for _ in range(number)]
    (folder / 'real.json').write_text(json.dumps(real))


# ---- One side -------------------------------------------------------------------------------------------------------

def values_of(value: Any, name: str) -> dict[str, str]:
    """A nested state as {path: value or SHA-256}."""
    import torch
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous()
        raw = content.view(torch.uint8) if content.dtype == torch.bfloat16 else content
        return {name: f'{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()}'}
    if isinstance(value, dict):
        return {path: found for key, item in value.items() for path, found in values_of(item, f'{name}/{key}').items()}
    if isinstance(value, (list, tuple)):
        return {path: found for i, item in enumerate(value) for path, found in values_of(item, f'{name}/{i}').items()}
    return {name: repr(value)}


def facts_of(folder: Path, printed: str) -> dict[str, str]:
    """What is compared of a run: its checkpoints, its log or result without timings, the first pixels of each rank."""
    import torch
    facts = {}
    for path in sorted(folder.glob('checkpoint-*.pth')):
        facts |= values_of(torch.load(path, weights_only=True), path.name)
    if (folder / 'log.txt').exists():
        for number, line in enumerate((folder / 'log.txt').read_text().splitlines()):
            facts |= values_of({k: v for k, v in json.loads(line).items() if k not in TIMINGS}, f'log.txt/{number}')
    if (folder / 'eval.json').exists():
        result = json.loads((folder / 'eval.json').read_text())
        facts |= values_of({k: v for k, v in result.items() if not k.startswith(tuple(TIMINGS))}, 'eval.json')
    for rank in (0, 1, 2):
        pixels = [line for line in printed.splitlines() if line.startswith(f'pixels {rank} ')]
        facts |= values_of(pixels, f'pixels of rank {rank}')
    return facts


def run_case(case: Case, folder: Path, *, stop_at: int) -> dict[str, str]:
    """Runs a case in the present folder with the `main` on the path, stopped first where that is asked."""
    import runs
    folder.mkdir(exist_ok=True)
    output, watch = folder / 'out.txt', WATCH.replace('STOP', str(stop_at))
    words = (*case.words, '--output_dir', str(folder / 'run'))
    job = runs.start(words, output, world_size=case.world_size, before=watch)
    expected = 128 + signal.SIGTERM if stop_at else 0
    statuses = job.wait(LIMIT)
    if set(statuses) != {expected}:
        sys.exit(f'{folder.name}: exit status {statuses}, not {expected}\n{job.text()}')
    return facts_of(folder / 'run', job.text())


def record(checkout: Path, names: list[str], half: str | None) -> dict[str, dict[str, str]]:
    """Runs the cases in the present folder with a checkout's code, in a process of its own. Returns their facts.

    Args:
        half: 'stop' runs the interrupted cases up to their interruption alone; 'rest' continues such runs.
    """
    out = Path('facts.json').resolve()
    environment = os.environ | {'PYTHONPATH': f'{checkout}{os.pathsep}{HERE}', 'OMP_NUM_THREADS': '1',
                                'XDG_CACHE_HOME': str(Path('cache').resolve()), 'CUDA_VISIBLE_DEVICES': ''}
    subprocess.run([sys.executable, str(HERE / 'golden.py'), '--record', str(out), *(['--half', half] if half else []),
                    *names], env=environment, check=True)
    return json.loads(out.read_text())


def record_here(out: Path, names: list[str], half: str | None) -> None:
    """The child's side of `record`."""
    facts = {}
    for name in names:
        case, folder = CASES[name], Path(name)
        if half is None and case.stop_at:
            run_case(case, folder, stop_at=case.stop_at)
        facts[name] = run_case(case, folder, stop_at=case.stop_at if half == 'stop' else 0)
    out.write_text(json.dumps(facts))


# ---- Both -----------------------------------------------------------------------------------------------------------

def compare(old: dict[str, str], new: dict[str, str]) -> tuple[list[str], list[str]]:
    """What differs or is gone, and what has been added."""
    changed = [name for name in old if old[name] != new.get(name)]
    return changed, [name for name in new if name not in old]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--record', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--half', help=argparse.SUPPRESS)
    parser.add_argument('words', nargs='*', metavar='BASE CASE ...', help='the older commit, then cases (all)')
    args = parser.parse_args()
    if args.record:
        record_here(args.record, args.words, args.half)
        return 0
    if not args.words:
        parser.error('name the commit to compare with: make golden BASE=<commit>')
    base, names = args.words[0], args.words[1:] or list(CASES)
    failed = False
    with tempfile.TemporaryDirectory(prefix='golden-') as scratch:
        checkout = Path(scratch) / 'base'
        subprocess.run(['git', 'worktree', 'add', '--detach', '--quiet', checkout, base], cwd=HERE.parent, check=True)
        try:
            facts = {}
            for side, code in (('old', checkout), ('new', HERE.parent)):
                folder = Path(scratch) / side
                folder.mkdir()
                make_files(folder)
                os.chdir(folder)
                facts[side] = record(code, names, None)
            interrupted = [name for name in names if CASES[name].stop_at]
            crossing = Path(scratch) / 'crossing'
            crossing.mkdir()
            make_files(crossing)
            os.chdir(crossing)
            if interrupted:
                record(checkout, interrupted, 'stop')
                facts['crossing'] = record(HERE.parent, interrupted, 'rest')
        finally:
            os.chdir(HERE)
            subprocess.run(['git', 'worktree', 'remove', '--force', checkout], cwd=HERE.parent, check=True)
    for side, title in (('new', ''), ('crossing', ', stopped by the older commit and continued by this one')):
        for name in facts.get(side, {}):
            changed, added = compare(facts['old'][name], facts[side][name])
            more = f'; added: {", ".join(added[:5])}' if added else ''
            print(f'{"equal" if not changed else "DIFFERS"}  {name}{title} ({len(facts["old"][name])} values'
                  f'{more})', *(f'    {path}: {facts["old"][name][path]} -> {facts[side][name].get(path)}'
                                for path in changed[:10]), sep='\n')
            failed |= bool(changed)
    print('DIFFERS' if failed else 'equal')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
