"""The training state as one object, and the files it is kept in: save, find, verify, load, prune.

A checkpoint is a zip of tensors and primitives that `torch.load(weights_only=True)` opens. It is written beside its
target, flushed and renamed; the zip's own CRC-32 of every record tells a damaged one when it is read.
"""
import contextlib
import json
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import nn

from engine import Buffers
from optim_factory import ModelEma
from recipes import Recipe, differences, from_dict, to_dict
from utils import WRITE_PATIENCE, UserError, alive, flush_folder, log, waiting_for, write_atomically

VERSION = 1
KEYS = {'version', 'model', 'model_ema', 'optimizer', 'scaler', 'epoch', 'step', 'best', 'recipe', 'classes', 'attempt',
        'updates_per_epoch', 'micro_batch_size', 'skips', 'local'}


class TrainState:
    """All that a run continues from. Randomness is not in it: it is derived from the position.

    Attributes:
        step: updates done.
        best: the best values so far of the metric that decides, by their column in the log ('test_acc1',
            'test_acc1_ema').
        attempt: how often the run has gone back because of a NaN; each attempt has another data order.
    """

    def __init__(self, *, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 ema: ModelEma | None, sums: torch.Tensor, skips: torch.Tensor, recipe: Recipe, classes: list[str],
                 class_map: dict[str, int] | None, updates_per_epoch: int, micro_batch_size: int,
                 arithmetic: dict[str, Any], sources: dict[str, str]):
        """
        Args:
            model: unwrapped.
            sums: this rank's running sums of the epoch's log, written to in place.
            skips: the counts of skipped updates, equal on all ranks, written to in place.
            classes: the names of the classes, kept with the weights.
            class_map: the labels by class name, where the user gave a map.
            micro_batch_size: of a process; another one is another function where there is BN.
            arithmetic: how sums are formed: 'channels_last' and 'tf32', and the form of the 'convolutions'.
            sources: the SHA-256 of what the training depends on beside the recipe and the images, by its flag.
        """
        self.arithmetic, self.sources = arithmetic, sources
        self.micro_batch_size = micro_batch_size
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        self.sums, self.skips = sums, skips
        self.recipe, self.updates_per_epoch = recipe, updates_per_epoch
        self.classes, self.class_map = classes, class_map
        self.buffers = Buffers(model, ema.module if ema is not None else None)
        self.step, self.attempt = 0, 0
        self.best: dict[str, float] = {}

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.updates_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and primitives, sharing memory with the run. Every rank must call it.

        Within `buffers.equal` the BN statistics under `model` and `model_ema` are those agreed on; what each rank had
        of its own is under `local`, since a resumed run must go on from that.
        """
        return {
            'version': VERSION,
            'model': self.model.state_dict(),
            'model_ema': self.ema.module.state_dict() if self.ema is not None else None,
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch,
            'step': self.step,
            'best': dict(self.best),
            'recipe': to_dict(self.recipe),
            'classes': list(self.classes),
            'class_map': self.class_map,
            'attempt': self.attempt,
            'updates_per_epoch': self.updates_per_epoch,
            'micro_batch_size': self.micro_batch_size,
            'arithmetic': dict(self.arithmetic),
            'sources': dict(self.sources),
            'skips': self.skips,
            'local': {'buffers': _gather(self.buffers.own()), 'sums': _gather(self.sums)},
        }

    def load_state_dict(self, state: dict[str, Any], *, optimizer: bool = True) -> None:
        """Puts the run where `state_dict` was taken, bit for bit at the same world size.

        At another one the epoch's sums go on from their total and the BN statistics from what was agreed on. The
        optimizer's hyperparameters stay this recipe's own.

        Args:
            optimizer: whether to take the optimizer and the scaler too, or only weights, average and position.

        Raises:
            UserError: where the data set is not as long as it was.
        """
        if 'class_map' in state and state['class_map'] != self.class_map:  # older checkpoints have none
            raise UserError('the checkpoint was trained by another --class_map; give the same, or begin anew from the '
                            'weights by --finetune and another --output_dir')
        if state['updates_per_epoch'] != self.updates_per_epoch:
            raise UserError(
                f'the checkpoint counts {state["updates_per_epoch"]} updates an epoch, but the training set now makes '
                f'{self.updates_per_epoch}: it has changed; restore it, or begin anew from the weights by --finetune '
                'and another --output_dir')
        self.model.load_state_dict(state['model'])
        if self.ema is not None:
            self.ema.module.load_state_dict(state['model_ema'] or state['model'])
        if optimizer:
            groups = self.optimizer.param_groups
            own = [{key: value for key, value in group.items() if key != 'params'} for group in groups]
            self.optimizer.load_state_dict(state['optimizer'])
            for group, hyperparameters in zip(self.optimizer.param_groups, own, strict=True):
                group.update(hyperparameters)
            if state['scaler']:  # empty where the run had no fp16
                self.scaler.load_state_dict(state['scaler'])
        self.step, self.best, self.attempt = state['step'], dict(state['best']), state['attempt']
        self.skips.copy_(state['skips'])
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        buffers, sums = state['local']['buffers'], state['local']['sums']
        if len(sums) == world and buffers.shape[1] == self.buffers.get().numel():
            self.buffers.set(buffers[rank].to(self.sums.device))
            self.sums.copy_(sums[rank])
        else:
            self.sums.copy_(sums.sum(0) if rank == 0 else torch.zeros_like(sums[0]))
        if len(sums) != world:
            log.warning('The checkpoint was written by %d processes and goes on with %d: on the same batches, but not '
                        'bit for bit.', len(sums), world)
        elif state['micro_batch_size'] != self.micro_batch_size:
            log.warning('The checkpoint was written with micro-batches of %d and goes on with %d: on the same batches, '
                        'but not bit for bit.', state['micro_batch_size'], self.micro_batch_size)


def _gather(value: torch.Tensor) -> torch.Tensor:
    """[world size, ...]: a tensor of every rank."""
    if not dist.is_initialized():
        return value[None]
    if not value.numel():  # a model without BN
        return value.new_zeros(dist.get_world_size(), 0)
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return torch.stack(parts)


def to_host(state: Any) -> Any:
    """A copy of a nested state in which every tensor has memory of its own on the CPU.

    From CUDA the copies go into pinned memory, and are only there once the stream has come so far: thousands of tensors
    that would else be waited for one by one.
    """
    if isinstance(state, torch.Tensor):
        if state.is_cuda:
            return torch.empty_like(state, device='cpu', pin_memory=True).copy_(state.detach(), non_blocking=True)
        return state.detach().to('cpu', copy=True)
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [to_host(value) for value in state]
    return state


class CheckpointError(Exception):
    """A file is no checkpoint of ours, or a damaged one; the message says which."""


def load(path: Path) -> dict[str, Any]:
    """Reads and verifies a training checkpoint.

    Raises:
        CheckpointError: where it is missing, truncated, damaged (a CRC-32 does not match), or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # The directory has no checksum: torch goes by fields of it that Python passes over, and hands out memory as
            # it found it where they are wrong. Records are plain, stored as they are
            odd = any(info.compress_type or info.external_attr or info.file_size != info.compress_size
                      for info in archive.infolist())
            if damaged is not None or odd:
                raise zipfile.BadZipFile(f'damaged, by the checksum of {damaged or "its directory"}')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a flipped byte of the directory or the pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f'{path} cannot be read ({reason})') from None
    missing = KEYS - state.keys() if isinstance(state, dict) else KEYS
    if missing:
        raise CheckpointError(f'{path} is no training checkpoint of this project (no {min(missing)} in it)')
    if state['version'] > VERSION:
        raise CheckpointError(f'{path} was written by a newer version of this project; update it')
    return state


def earlier_arithmetic(path: Path, device: torch.device) -> dict[str, Any]:
    """What a checkpoint was trained with that does not say it: the defaults of its time, or the flags of its run.

    Then the layout was channels-last on CUDA and contiguous elsewhere, and fp32 strict. environment.json beside the
    file has the flags and the device of each start; without it, `device` is taken for the earlier one.
    """
    flags, kind = {}, device.type
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or a damaged one
        last = json.loads((path.parent / 'environment.json').read_text())[-1]
        flags, kind = dict(last['run']), last['device'].split(':')[0]
    channels_last = flags.get('channels_last')
    return {'channels_last': kind == 'cuda' if channels_last is None else bool(channels_last),
            'tf32': bool(flags.get('tf32')), 'convolutions': 'conv2d'}


def check_recipe(state: dict[str, Any], recipe: Recipe, *, path: Path, anyway: bool) -> None:
    """Refuses to resume under another recipe. Raises UserError with the fields that differ, unless `anyway`."""
    changed = [change for change in differences(from_dict(state['recipe']), recipe)
               if change.split(':')[0] not in recipe.by_content]
    fixed = [change for change in changed if change.split(':')[0] in ('task', *recipe.fixed)]
    if fixed and anyway:
        raise UserError(f'{path} cannot be resumed with {"; ".join(fixed)}: its state depends on it; give another '
                        '--output_dir, and start from its weights by --finetune')
    if changed and anyway:
        log.warning('Resuming %s under another recipe: %s', path, '; '.join(changed))
    elif changed:
        raise UserError(f'{path} was trained by another recipe ({"; ".join(changed)}); resume with the flags of its '
                        'recipe.json, or give another --output_dir, or say --resume_anyway')


def check_sources(state: dict[str, Any], sources: dict[str, str], *, anyway: bool) -> None:
    """Refuses to resume with another file behind a flag. Raises UserError that names the flag, unless `anyway`.

    A file that has moved is the same: its content counts.
    """
    before = state.get('sources', {})  # older checkpoints depend on none
    changed = sorted(name for name in {**before, **sources} if before.get(name) != sources.get(name))
    if changed and anyway:
        log.warning('Resuming with another content of --%s', ', --'.join(changed))
    elif changed:
        raise UserError(f'the checkpoint was trained with another content of --{changed[0]} ('
                        f'SHA-256 {before.get(changed[0], "none")[:12]}, here {sources.get(changed[0], "none")[:12]}); '
                        'give the same, or another --output_dir, or say --resume_anyway')


class _Living:
    """A file for torch.save, each piece of which is a sign of life: a slow disk is no hang."""

    def __init__(self, file: BinaryIO):
        self._file, self.flush = file, file.flush

    def write(self, piece: bytes) -> int:
        alive()
        return self._file.write(piece)


def _saving(state: dict[str, Any]) -> Callable[[BinaryIO], None]:
    """Writes a state into a file that is given later."""
    return lambda file: torch.save(state, _Living(file))


class CheckpointFolder:
    """The checkpoints of a run: `checkpoint-<step>.pth`, the newest of them; -last and -best, links; -best-ema.

    Written by a background thread from a copy on the host, so that training waits for the copy alone, and for the write
    before where that is still under way. Only rank 0 writes.
    """

    def __init__(self, folder: Path, *, keep: int):
        """
        Args:
            keep: how many of the newest to keep.
        """
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def numbered(self) -> list[Path]:
        """The step checkpoints, the oldest first; by number, since 1000 comes before 900 by name."""
        found = [(int(match[1]), path) for path in self.folder.glob('checkpoint-*.pth')
                 if (match := re.fullmatch(r'checkpoint-(\d+)\.pth', path.name))]
        return [path for _, path in sorted(found)]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, and its state; None where the folder has none.

        Raises:
            UserError: where there are checkpoints but none can be read.
        """
        named = [self.folder / f'checkpoint-{name}.pth' for name in ('last', 'best')]
        candidates = [*reversed(self.numbered()), *(path for path in named if path.exists())]
        for path in candidates:
            try:
                return path, load(path)
            except CheckpointError as error:
                log.warning('%s: passing over it for the one before.', error)
        if candidates:
            raise UserError(f'none of the {len(candidates)} checkpoints in {self.folder} can be read; move them away '
                            'to begin anew')
        return None

    def save(self, state: dict[str, Any], *, best: bool = False, best_ema: bool = False) -> None:
        """Copies a state to the host and writes it in the background.

        Args:
            state: what `TrainState.state_dict` returned.
            best: whether it is the best so far, to be kept as checkpoint-best.pth.
            best_ema: whether its moving average is, to be kept as checkpoint-best-ema.pth, whose model is the average.
        """
        host = to_host(state)
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self.wait()
        # A daemon, so that a disk that never answers cannot keep the process from its end; `wait` is always called
        self._thread = threading.Thread(target=self._write, args=(host, copied, best, best_ema), name='checkpoint',
                                        daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Waits for the write under way. Returns whether the last one succeeded.

        Raises:
            UserError: where it takes longer than `WRITE_PATIENCE`.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            with waiting_for(f'the write of a checkpoint into {self.folder}', saving=True):
                thread.join(WRITE_PATIENCE)
            if thread.is_alive():
                raise UserError(f'the disk of {self.folder} has not taken a checkpoint for {WRITE_PATIENCE:g} s; see '
                                'to it, and start the same command again to continue from the checkpoint before')
        return self._error is None

    def _write(self, state: dict[str, Any], copied: torch.cuda.Event | None, best: bool, best_ema: bool) -> None:
        """Writes a state once it is `copied`; in the thread."""
        path = self.folder / f'checkpoint-{state["step"]}.pth'
        try:
            if copied is not None:
                copied.synchronize()
            # The numbered file comes last: it says that all of this step is saved. A kill before it repeats the step
            if best_ema:
                average = {**state, 'model': state['model_ema'], 'model_ema': None, 'optimizer': None, 'scaler': None,
                           'which': 'ema'}
                write_atomically(self.folder / 'checkpoint-best-ema.pth', _saving(average))
            if best:
                write_atomically(self.folder / 'checkpoint-best.pth', _saving(state))
                self._link('checkpoint-best.pth', path.name)
            else:
                write_atomically(path, _saving(state))
            self._link(path.name, 'checkpoint-last.pth')
            self._error = None
        except Exception as error:  # torch.save reports a full disk as one of several
            self._error = error
            log.error('%s could not be saved (%s). The one before is kept and training goes on; free space in %s '
                      'before the next save.', path, (str(error) or type(error).__name__).splitlines()[0], self.folder)
            return
        # Only now that the newer one is safe on disk: the old ones, and what killed processes left half-written
        for old in [*self.numbered()[:-self.keep], *self.folder.glob('.checkpoint-*.part')]:
            old.unlink(missing_ok=True)

    def _link(self, source: str, name: str) -> None:
        """Makes `name` the same file as `source`, at once and without a moment in which there is none."""
        target = self.folder / name
        beside = target.with_name(f'.{name}.{os.getpid()}.part')
        beside.unlink(missing_ok=True)
        try:
            os.link(self.folder / source, beside)
        except OSError:  # a file system without hard links
            with open(self.folder / source, 'rb') as file:
                write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))
            return
        os.replace(beside, target)
        flush_folder(self.folder)
