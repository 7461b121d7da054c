"""How a run goes from its first to its last update, and what happens between the stretches: evaluating and saving.

The position is an update. A stretch ends where the run evaluates: at the end of an epoch, or after `--val_steps`.
"""
import copy
import dataclasses
import functools
import itertools
import math
import signal as signals
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

import datasets
import engine
import optim_factory
import recipes
import utils
from datasets import Loaders
from pipeline import labels
from pipeline.loaders import WorkersLost
from recipes import Recipe, Run
from tasks import Batch, Task, create_task
from training import start as starting
from training import teachers
from training.checkpoint import CheckpointFolder, TrainState
from training.lock import own_folder
from training.log import Notes
from utils import UserError, log

MAX_ROLLBACKS = 3
MIN_BN_IMAGES = 32  # fewer a micro-batch, and the statistics of batch norm are noise
MIN_FINETUNE_UPDATES = 300  # fewer, and a new head has hardly left its initial weights
PRECISE_BN_ORDER = -1  # the data order of Precise BN, beside those of the attempts (0, 1, ...)

Observer = Callable[[TrainState], None]


def train(recipe: Recipe, run: Run, processes: utils.Processes, *, observer: Observer | None = None) -> int:
    """Trains a recipe to its end, from wherever its folder says. Returns the exit status.

    Args:
        observer: is called after every update.
    """
    with own_folder(Path(run.output_dir), processes):
        return _train(recipe, run, processes, observer)


def _train(recipe: Recipe, run: Run, processes: utils.Processes, observer: Observer | None) -> int:
    """`train`, once the folder is this start's own."""
    if recipe.name == 'default':
        log.info('%s has no recipe of its own: training by the default one, which is %s.', recipe.model, recipe.source)
    recipe = starting.adapt_to_device(recipe, run, processes.device)
    folder = CheckpointFolder(Path(run.output_dir), keep=run.save_ckpt_num)
    start, own = starting.find_start(recipe, run, folder, processes)
    if start is not None and start['step'] >= recipe.total_updates(start['updates_per_epoch']):
        if not own:
            raise UserError(f'--resume {run.resume} is complete: {recipe.length()}; to train on from its weights say '
                            '--finetune')
        log.info('%s is complete: %s. Nothing to do; train anew in another --output_dir.', run.output_dir,
                 recipe.length())
        return 0
    run = starting.settle_arithmetic(run, processes.device, start)
    recipe, initial = starting.find_initial(recipe, run, start)
    if initial is not None and 'gate' in recipe.arguments():
        log.info('Training with the %s gate.', recipe.gate)
    task = create_task(recipe, run)
    task.teacher = teachers.find_teacher(recipe, run, processes.device)
    if start is not None:
        task.trained, task.resumed = start['classes'], True
    elif initial is not None:
        task.trained = labels.known_names(initial.meta.get('classes'))
    if run.batch_size == 'auto':
        same = start is not None and len(start['local']['sums']) == run.world_size
        # Another micro-batch would not be bit for bit the same
        size = start['micro_batch_size'] if same else starting.find_micro_batch(task, run, processes)
        task.run = run = recipes.fit_batch(recipe, dataclasses.replace(run, batch_size=size))
    splits = ('train',) if run.disable_eval else ('train', 'val')
    loaders = datasets.build_loaders(task, run, rank=processes.rank, device=processes.device, splits=splits)
    total = loaders.train.total_updates
    check_schedule(recipe, loaders.train.updates_per_epoch)
    with utils.StopRequest(processes, run.stop_signals) as stop, starting.compile_errors():
        try:
            model = starting.prepare_model(task, run, processes.device, initial=initial,
                                           pretrained=run.pretrained and start is None)
            step = starting.build_step(task, run, processes, model)
            state = starting.build_state(task, run, step, updates_per_epoch=loaders.train.updates_per_epoch,
                                         start=start, own=own)
            del start, initial  # gigabytes of the host's memory
            announce(task, run, state, processes, total=total)
            notes = Notes(task.recipe, run, processes, step=state.step, total=total)
            return Training(task, run, processes, loaders, folder, step, state, notes, observer=observer).fit(stop)
        finally:
            folder.wait()
            loaders.close()


def check_schedule(recipe: Recipe, updates_per_epoch: int) -> None:
    """Refuses a schedule of which a part would never be reached. Raises UserError."""
    schedule = optim_factory.schedule_of(recipe, updates_per_epoch=updates_per_epoch)
    total, warmup = schedule.total_updates, schedule.warmup_updates
    if warmup > total:
        flag = f'--warmup_epochs {recipe.warmup_epochs:g}, or {warmup} updates,' if recipe.warmup_steps is None else (
            f'--warmup_steps {warmup}')
        raise UserError(f'{flag} is longer than the run of {total} updates; give less')
    if schedule.milestones and schedule.milestones[-1] >= total:
        raise UserError(f'the last of --milestones is at update {schedule.milestones[-1]}, and the run has {total}; '
                        'give milestones within it')


def announce(task: Task, run: Run, state: TrainState, processes: utils.Processes, *, total: int) -> None:
    """Says in the log what is about to be trained, and warns of what will hardly work in so few updates."""
    recipe, updates = task.recipe, state.updates_per_epoch
    size, whole = n_parameters(state.model) / 1e6, sum(param.numel() for param in state.model.parameters()) / 1e6
    parameters = f'{size:.2f} M parameters' if size == whole else f'{size:.2f} of {whole:.2f} M parameters'
    length = f'{recipe.length()} of {updates} updates' if recipe.updates is None else (
        f'{recipe.length()}, {updates} an epoch,')
    arithmetic = (f'{starting.show_precision(recipe, run, processes.device)}, '
                  f'{"channels-last" if run.channels_last else "contiguous"}')
    log.info('%s: %s, %s, %d classes; %s of %d images (%d process%s x %d x %d micro-step%s), %s, on %s', recipe.name,
             recipe.model, parameters, recipe.num_classes, length, recipe.total_batch_size, run.world_size,
             'es' if run.world_size > 1 else '', run.batch_size, run.update_freq, 's' if run.update_freq > 1 else '',
             arithmetic, processes.device)
    for remark in task.remarks():
        log.info('%s', remark)
    if (run.finetune or run.pretrained) and total < MIN_FINETUNE_UPDATES:
        log.warning('Only %d updates: fine-tuning wants %d or more. Raise --%s or lower --total_batch_size.', total,
                    MIN_FINETUNE_UPDATES, 'epochs' if recipe.updates is None else 'updates')
    warn_of_small_batches(recipe, run, state.model)
    horizon = 1 / (1 - recipe.model_ema_decay)
    if recipe.model_ema and horizon > total:
        log.warning('The moving average looks back %.0f updates, but the run has %d: it will still hold initial '
                    'weights. Give --model_ema_decay %.4g.', horizon, total, 1 - 10 / max(total, 20))


def warn_of_small_batches(recipe: Recipe, run: Run, model: nn.Module) -> None:
    """Warns where batch norm sees few images at a time, unless the row itself is for so few."""
    frozen = engine.frozen_norms(model)
    norms = [module for name, module in model.named_modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in frozen]
    seen = run.batch_size * (run.world_size if recipe.sync_bn else 1)
    if not norms or seen >= min(MIN_BN_IMAGES, recipe.micro_batch_size):
        return
    cures = [cure for cure, helps in (
        (f'--batch_size {run.batch_size * run.update_freq}, with fewer micro-steps', run.update_freq > 1),
        ('--sync_bn, which takes them over all GPUs', run.world_size > 1 and not recipe.sync_bn),
        ('fewer processes', run.world_size > 1), ('a larger --total_batch_size', True)) if helps]
    log.warning('Batch norm takes its statistics over %d image%s at a time: fewer than %d make a worse model. Give %s.',
                seen, 's' if seen > 1 else '', MIN_BN_IMAGES, ', or '.join(cures))


def n_parameters(model: nn.Module) -> int:
    """The parameters that are trained."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


class Training:
    """A run between its first and its last update."""

    def __init__(self, task: Task, run: Run, processes: utils.Processes, loaders: Loaders, folder: CheckpointFolder,
                 step: engine.TrainStep, state: TrainState, notes: Notes, *, observer: Observer | None = None):
        self.task, self.recipe, self.run, self.processes = task, task.recipe, run, processes
        self.loaders, self.folder, self.step, self.state, self.notes = loaders, folder, step, state, notes
        self.observer = observer
        self.signal = 0  # on which the run stops
        self._counted_bad = 0  # unreadable images that the step's sums hold, of all that the loader has replaced
        self._set_attempt(state.attempt)

    def _set_attempt(self, attempt: int) -> None:
        """After a NaN, other random numbers; the data order takes the attempt by itself."""
        self.state.attempt = attempt
        if attempt:
            self.step.seed = utils.derive_seed(self.recipe.seed, 'attempt', attempt)

    @property
    def complete(self) -> bool:
        """Whether all updates are done."""
        return self.state.step == self.loaders.train.total_updates

    def fit(self, stop: utils.StopRequest) -> int:
        """Trains the updates that are left. Returns the exit status."""
        try:
            while not self.complete:
                try:
                    self._train_stretch(stop)
                except engine.NonFiniteError as error:
                    if not self._roll_back(error):
                        return 1
                    continue
                if self.signal and not self.complete:
                    saved = self._written() and self.run.save_ckpt
                    log.info('Stopped by %s in epoch %d, after %d updates in all. %s',
                             signals.Signals(self.signal).name, self.state.epoch + 1, self.state.step,
                             'The same command continues.' if saved else 'It was not saved.')
                    return 128 + self.signal if saved else 1
            written = self._written()  # before the charts' uploads, which the other ranks need not wait for
            if written:
                self.notes.complete()
        finally:
            self.notes.close()
        if not written:
            log.error('The last checkpoint could not be saved: free space in %s and start the same command again.',
                      self.run.output_dir)
            return 1
        unit = self.recipe.metrics[self.recipe.best][1]
        best = ', '.join(f'{name.removeprefix("test_")} {value:.2f}{unit}' for name, value in self.state.best.items())
        log.info('Training is complete: %s%s.', self.recipe.length(), f'; best {best}' if best else '')
        return 0

    def _stretch(self) -> tuple[int, int, str]:
        """First update, end and title of the stretch in which the run is."""
        length = self.run.val_steps or self.state.updates_per_epoch
        begin = self.state.step // length * length
        end = min(begin + length, self.loaders.train.total_updates)
        return begin, end, f'updates {begin + 1} to {end}' if self.run.val_steps else f'epoch {begin // length + 1}'

    def _train_stretch(self, stop: utils.StopRequest) -> None:
        """Trains what is left of the stretch, evaluates and saves; sets `signal` where the run has to stop."""
        state, run = self.state, self.run
        (begin, end, title), start = self._stretch(), state.step
        if start == begin:
            self.step.reset()
        self._counted_bad = self.loaders.train.bad_images
        batches = self.loaders.train.updates(start, end, state.attempt)
        batches = self._saving_when_lost(batches if start else self._show_first(batches), start)
        metrics = engine.train_updates(
            self.step, batches, begin=begin, end=end, start=start,
            set_schedule=lambda update: optim_factory.set_schedule(
                self.step.optimizer, self.recipe, update=update, updates_per_epoch=state.updates_per_epoch),
            images_per_update=self.recipe.total_batch_size, print_freq=run.print_freq, max_skips=run.max_skips,
            report=lambda progress: self.notes.progress(progress, title=title, step=begin + progress.update),
            after_update=functools.partial(self._after_update, stop, end))
        if metrics.pop('done') < end:
            return
        entry = {'epoch': (state.step - 1) // state.updates_per_epoch, 'step': state.step, **metrics,
                 'n_parameters': n_parameters(state.model)}
        due = run.val_steps is not None or state.epoch % run.val_interval == 0
        evaluating = self.loaders.val is not None and (due or self.complete)
        with state.buffers.equal(self.recipe.dist_bn, first=self._precise_bn if evaluating else None):
            improved, pictures = self._evaluate(entry) if evaluating else (set(), {})
            of = f' of {self.recipe.epochs}' if run.val_steps is None and self.recipe.epochs else ''
            self.notes.entry(entry, pictures, title=f'{title}{of}')  # before the checkpoint that counts the entry
            if self._save_is_due(state.step) or self.complete or improved or self.signal:
                self._save(improved)

    def _after_update(self, stop: utils.StopRequest, end: int, done: int) -> bool:
        """Counts an update, and saves inside a stretch where that is due. Returns whether to stop here."""
        self.state.step = done
        new = self.loaders.train.bad_images - self._counted_bad
        if new:
            self.step.sums.add(bad_images=new)
            self._counted_bad += new
        if self.observer is not None:
            self.observer(self.state)
        self.signal = self.signal or stop.agreed()
        if done == end:  # the stretch's end evaluates and saves
            return False
        if self.signal or self._save_is_due(done):
            self.step.check()
            with self.state.buffers.equal(self.recipe.dist_bn):
                self._save()
        return bool(self.signal)

    def _save_is_due(self, done: int) -> bool:
        run, epoch, rest = self.run, *divmod(done, self.state.updates_per_epoch)
        due = run.save_ckpt_steps is not None and done % run.save_ckpt_steps == 0
        return due or (rest == 0 and epoch % run.save_ckpt_freq == 0)

    def _show_first(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same micro-batches, the first of which is drawn: before the epoch, whose time it does not count to."""
        first = next(batches)
        self.notes.images(lambda: self.task.show_batch(first))
        return itertools.chain([first], batches)

    def _saving_when_lost(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        """The same micro-batches; where the data workers are lost between two updates, the state is saved first.

        Several processes save together, and the others do not know of it: they lose what came after the last save.

        Args:
            start: updates done at the first of them.
        """
        state, taken = self.state, 0
        try:
            for batch in batches:
                yield batch
                taken += 1
        except WorkersLost:
            # In the middle of an update the BN statistics are no longer those of the update before
            if self.processes.world_size == 1 and state.step > start and taken % self.run.update_freq == 0:
                self.step.check()
                with state.buffers.equal(self.recipe.dist_bn):
                    self._save()
                if self.folder.wait() and self.run.save_ckpt:
                    log.info('Saved after %d updates in all. The same command continues.', state.step)
            raise

    def _models(self) -> dict[str, nn.Module]:
        """The models to evaluate, by the suffix of their columns in the log."""
        models = {'': self.state.model}
        if self.state.ema is not None and self.run.model_ema_eval:
            models['_ema'] = self.state.ema.module
        return models

    def _precise_bn(self) -> None:
        """Re-estimates the BN statistics on `precise_bn` training images (at least, in whole updates)."""
        if not self.recipe.precise_bn:
            return
        micro_batches = -(-self.recipe.precise_bn // self.recipe.total_batch_size) * self.run.update_freq
        frozen = engine.frozen_norms(self.state.model)
        for model in self._models().values():
            batches = self.loaders.train.epoch((self.state.step - 1) // self.state.updates_per_epoch, 0,
                                               PRECISE_BN_ORDER)
            engine.precise_bn(model, itertools.islice(batches, micro_batches), self.task.loss,
                              precision=self.recipe.precision, frozen=frozen)

    def _evaluate(self, entry: dict[str, Any]) -> tuple[set[str], dict[str, Image.Image]]:
        """Evaluates the weights and their average into the entry.

        Returns:
            which of the two are the best yet, and at the end of the run the pictures of both results.
        """
        improved, pictures, device = set(), {}, self.processes.device
        models = {suffix: model if next(model.parameters()).device == device else copy.deepcopy(model).to(device)
                  for suffix, model in self._models().items()}  # an average may be kept on the CPU
        results = engine.evaluate(models, self.loaders.val, self.task.metric(device, detailed=self.complete),
                                  count=self.loaders.val.count, exact=self.loaders.val.exact, device=device,
                                  precision=self.recipe.precision)
        for suffix, result in results.items():
            entry |= {f'test_{name}{suffix}': result[name] for name in self.recipe.metrics}
            best = f'test_{self.recipe.best}{suffix}'
            if entry[best] > self.state.best.get(best, -math.inf):
                self.state.best[best] = entry[best]
                improved.add(suffix)
            if self.complete and self.processes.first:
                with utils.going_on_without('The pictures of the result'):
                    pictures |= {f'test/{name}{suffix}': picture
                                 for name, picture in self.task.draw_result(result).items()}
        return improved, pictures

    def _save(self, improved: set[str] = frozenset()) -> None:
        """Hands the state to the writer. All ranks call it; rank 0 writes."""
        state = self.state.state_dict()
        if self.processes.first and self.run.save_ckpt:
            self.folder.save(state, best='' in improved, best_ema='_ema' in improved)

    def _written(self) -> bool:
        """Waits for the last checkpoint, on all ranks, once a run. Returns whether it was written.

        A launcher may end the job when the first process leaves it, and rank 0 alone writes.
        """
        return utils.from_rank_zero('written', lambda: 'yes' if self.folder.wait() else '') == 'yes'

    def _roll_back(self, error: Exception) -> bool:
        """After a NaN: back to the newest checkpoint with another data order, where the user wants it and may still."""
        attempt = self.state.attempt + 1
        self.folder.wait()
        found = starting.newest_for_all(self.folder, self.processes, f'rollback {attempt}')
        where = f'the last good checkpoint is {found[0]}' if found else 'there is no checkpoint yet'
        log.error('Update %d: %s; %s.', self.state.step, error, where)
        if self.run.on_nan == 'stop' or found is None or attempt > MAX_ROLLBACKS:
            log.error('Stopped. Lower --lr, or clip by --clip_grad 1%s%s.',
                      ', or use --precision bf16' if self.recipe.precision == 'fp16' else '',
                      '; --on_nan rollback tries again by itself' if self.run.on_nan == 'stop' else '')
            return False
        self.state.load_state_dict(found[1])
        self._set_attempt(attempt)
        self.notes.rewind(self.state.step)
        log.warning('Going back to update %d with another data order (attempt %d of %d).', self.state.step, attempt,
                    MAX_ROLLBACKS)
        return True
