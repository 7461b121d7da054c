"""How a run goes from its first to its last epoch: where it starts, and what happens between the epochs.

What a model starts from, the first that applies:
  1. the newest valid checkpoint in the run's folder (`--auto_resume`, on by default): the same command continues a run;
  2. `--resume FILE`: weights, optimizer, average and position of another run of the same recipe;
  3. `--finetune SOURCE` or `--pretrained`: weights alone;
  4. the model's own initialisation, from the recipe's seed.
"""
import copy
import dataclasses
import itertools
import signal as signals
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import checkpoint
import datasets
import engine
import optim_factory
import recipes
import utils
from checkpoint import CheckpointFolder, TrainState
from datasets import Loaders
from models.weights import Weights, load_weights
from notes import Notes
from parts import Criterion, adapt_to_device, build_model, compile_errors
from recipes import Recipe, Run
from utils import UserError, log

MAX_ROLLBACKS = 3
MIN_FINETUNE_UPDATES = 300  # fewer, and a new head has hardly left its initial weights
PRECISE_BN_ORDER = -1  # the data order of Precise BN, beside those of the attempts (0, 1, ...)


def train(recipe: Recipe, run: Run, processes: utils.Processes) -> int:
    """Trains a recipe to its end, from wherever its folder says. Returns the exit status."""
    if recipe.name == 'default':
        log.info('%s has no recipe of its own: training by the default one, which is %s.', recipe.model, recipe.source)
    recipe = adapt_to_device(recipe, run, processes.device)
    folder = CheckpointFolder(Path(run.output_dir), keep=run.save_ckpt_num)
    start, own = find_start(recipe, run, folder, processes)
    if start is not None and start['epoch'] >= recipe.epochs:
        if not own:
            raise UserError(f'--resume {run.resume} is complete: {recipe.epochs} epochs; to train on from its weights '
                            'say --finetune')
        log.info('%s is complete: %d epochs. Nothing to do; train anew in another --output_dir.', run.output_dir,
                 recipe.epochs)
        return 0
    recipe, initial = find_initial(recipe, run, start)
    if initial is not None and recipe.model in recipes.MOGANETS:
        log.info('Training with the %s gate.', recipe.gate)
    if run.batch_size == 'auto' and start is not None and len(start['local']['sums']) == run.world_size:
        # Another one would not be bit for bit the same
        run = recipes.fit_batch(recipe, dataclasses.replace(run, batch_size=start['micro_batch_size']))
    elif run.batch_size == 'auto':
        run = recipes.fit_batch(recipe, dataclasses.replace(run, batch_size=find_micro_batch(recipe, run, processes)))
    loaders = datasets.build_loaders(recipe, run, rank=processes.rank, device=processes.device)
    recipe = dataclasses.replace(recipe, num_classes=loaders.num_classes)
    updates = recipe.epochs * loaders.train.updates_per_epoch
    if (recipe.warmup_steps or 0) > updates:
        raise UserError(f'--warmup_steps {recipe.warmup_steps} is longer than the run of {updates} updates')
    try:
        with utils.StopRequest(processes, run.stop_signals) as stop, compile_errors():
            training = Training(recipe, run, processes, loaders, folder, start, initial, own=own)
            del start, initial  # gigabytes of the host's memory
            return training.fit(stop)
    finally:
        folder.wait()
        loaders.close()


def find_initial(recipe: Recipe, run: Run, start: dict[str, Any] | None) -> tuple[Recipe, Weights | None]:
    """The weights of --finetune, unless the run goes on from a checkpoint, and the recipe with the gate they need.

    Raises:
        UserError: where the source cannot be read.
    """
    source = run.finetune
    if run.pretrained and recipe.model in recipes.MOGANETS and 'pretrained_cfg_overlay' not in recipe.model_kwargs:
        source = f'released:{recipe.model}'
    if source is None:
        return recipe, None
    if start is not None:
        return follow_gate(recipe, run, start['recipe']['gate']), None
    with utils.rank_zero_first('finetune'):  # it may be a download
        initial = load_weights(source, run.weights)
    return follow_gate(recipe, run, initial.gate), initial


def follow_gate(recipe: Recipe, run: Run, gate: str | None) -> Recipe:
    """The recipe with the gate that the weights to fine-tune were trained with, unless the command line gave one."""
    if recipe.model not in recipes.MOGANETS or 'gate' in run.given or gate in (None, recipe.gate):
        return recipe
    return dataclasses.replace(recipe, gate=gate)


def newest_for_all(folder: CheckpointFolder, processes: utils.Processes,
                   name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a folder, as rank 0 finds it, on all ranks; None where there is none.

    On a network file system another rank may not see the newest yet, or rank 0 may still be writing.

    Args:
        name: of this question, for the exchange between the ranks.

    Raises:
        UserError: where none can be read, or a rank does not see rank 0's.
    """
    found = None

    def newest() -> str:
        nonlocal found
        found = folder.newest()
        return str(found[0]) if found else ''

    path = utils.from_rank_zero(name, newest)
    if path and found is None:
        try:
            found = Path(path), checkpoint.load(Path(path))
        except checkpoint.CheckpointError as error:
            raise UserError(f'rank {processes.rank}: {error}; --output_dir must be shared by all nodes') from None
    return found


def find_start(recipe: Recipe, run: Run, folder: CheckpointFolder,
               processes: utils.Processes) -> tuple[dict[str, Any] | None, bool]:
    """The state to start from, and whether it is the run's own: the newest of its folder, else that of --resume.

    Raises:
        UserError: where the folder holds a run that would be overwritten or mixed with another.
    """
    found = newest_for_all(folder, processes, 'start')
    own = found is not None
    if own and not run.auto_resume:
        raise UserError(f'{run.output_dir} holds a run already; continue it with --auto_resume true, or give another '
                        '--output_dir')
    if run.resume:
        named = Path(run.resume)
        try:
            state = checkpoint.load(named)
        except checkpoint.CheckpointError as error:
            raise UserError(f'--resume {error}; give a checkpoint-*.pth of a training run') from None
        if state['optimizer'] is None:
            raise UserError(f'--resume {named} holds weights alone; give checkpoint-last.pth, or say --finetune')
        if not own:
            found = named, state
        elif named.resolve().parent == folder.folder.resolve() and state['step'] < found[1]['step']:
            raise UserError(f'--resume {named} is older than {found[0].name} beside it, which would be lost; to branch '
                            'off there give another --output_dir')
    if found is None:
        return None, False
    path, state = found
    same = dataclasses.replace(recipe, num_classes=recipe.num_classes or state['recipe']['num_classes'])
    if run.finetune or run.pretrained:
        same = follow_gate(same, run, state['recipe']['gate'])
    checkpoint.check_recipe(state, same, path=path, anyway=run.resume_anyway)
    if state['epoch'] < recipe.epochs:
        log.info('Continuing from %s: in epoch %d, after %d updates in all.', path, state['epoch'] + 1, state['step'])
    return state, own


def find_micro_batch(recipe: Recipe, run: Run, processes: utils.Processes) -> int:
    """The largest micro-batch that divides the recipe's batch and fits the GPU's memory (`--batch_size auto`)."""
    if processes.device.type != 'cuda':
        raise UserError('--batch_size auto measures the memory of a CUDA device; give a number here')
    model = build_model(recipe, run, num_classes=recipe.num_classes or 1000, device=processes.device)
    share, rest = divmod(recipe.total_batch_size, run.world_size * (run.update_freq or 1))
    if rest:
        raise UserError(f'a batch of {recipe.total_batch_size} cannot be divided among {run.world_size} processes; '
                        'give --total_batch_size')
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    size = engine.largest_micro_batch(model, Criterion(recipe), sizes, input_size=recipe.input_size,
                                      device=processes.device, precision=recipe.precision)
    log.info('--batch_size auto: %d', size)
    return size


class Training:
    """A run between its first and its last epoch: the parts, and what happens between the epochs."""

    def __init__(self, recipe: Recipe, run: Run, processes: utils.Processes, loaders: Loaders,
                 folder: CheckpointFolder, start: dict[str, Any] | None, initial: Weights | None,
                 *, own: bool):
        """
        Args:
            start: the state to go on from.
            initial: weights to begin with, where there is none.
            own: whether `start` is of this run, and not of the one that --resume names.
        """
        self.recipe, self.run, self.processes, self.loaders, self.folder = recipe, run, processes, loaders, folder
        device = processes.device
        model = build_model(recipe, run, num_classes=loaders.num_classes, device=device, initial=initial,
                            pretrained=run.pretrained and start is None)
        self.n_parameters = sum(param.numel() for param in model.parameters() if param.requires_grad)
        ema = optim_factory.ModelEma(
            model, decay=recipe.model_ema_decay, warmup=recipe.model_ema_warmup,
            device=torch.device('cpu') if run.model_ema_force_cpu else None) if recipe.model_ema else None
        optimizer = optim_factory.create_optimizer(model, recipe)
        if run.print_param_groups:
            log.info(optim_factory.describe_param_groups(optimizer.param_groups))
        if run.compile:
            model.compile()  # in place: the state dict keeps its names
        self.step = engine.TrainStep(
            engine.wrap_distributed(model, device), Criterion(recipe), optimizer, device=device,
            precision=recipe.precision, scaler=engine.create_scaler(device, recipe.precision), ema=ema,
            clip_grad=recipe.clip_grad, clip_mode=recipe.clip_mode, update_freq=run.update_freq, seed=recipe.seed,
            rank=processes.rank)
        self.state = TrainState(
            model=model, optimizer=optimizer, scaler=self.step.scaler, ema=ema, sums=self.step.sums,
            skips=self.step.skips, recipe=recipe, classes=loaders.classes,
            updates_per_epoch=loaders.train.updates_per_epoch, micro_batch_size=run.batch_size)
        if start is not None:
            self.state.load_state_dict(start, optimizer=own or not run.no_resume_opt)
        images = torch.zeros(run.batch_size, 3, recipe.input_size, recipe.input_size, device=device)
        # In the layout of the loader's, for which a compiled model would else be compiled again
        self.step.warm_up(images.to(memory_format=torch.channels_last),
                          torch.zeros(run.batch_size, dtype=torch.int64, device=device))
        self._set_attempt(self.state.attempt)

    def _set_attempt(self, attempt: int) -> None:
        """After a NaN, other random numbers; the data order takes the attempt by itself."""
        self.state.attempt = attempt
        if attempt:
            self.step.seed = utils.derive_seed(self.recipe.seed, 'attempt', attempt)

    def fit(self, stop: utils.StopRequest) -> int:
        """Trains the epochs that are left. Returns the exit status."""
        self._begin()
        try:
            while self.state.epoch < self.recipe.epochs:
                try:
                    signal = self._epoch(stop)
                except engine.NonFiniteError as error:
                    if not self._roll_back(error):
                        return 1
                    continue
                if signal and self.state.epoch < self.recipe.epochs:
                    saved = self._written() and self.run.save_ckpt
                    log.info('Stopped by %s in epoch %d, after %d updates in all. %s', signals.Signals(signal).name,
                             self.state.epoch + 1, self.state.step,
                             'The same command continues.' if saved else 'It was not saved.')
                    return 128 + signal if saved else 1
            written = self._written()  # before the charts' uploads, which the other ranks need not wait for
            if written:
                self.notes.complete()
        finally:
            self.notes.close()
        if not written:
            log.error('The last checkpoint could not be saved: free space in %s and start the same command again.',
                      self.run.output_dir)
            return 1
        best = ', '.join(f'{name.removeprefix("test_")} {value:.2f} %' for name, value in self.state.best.items())
        log.info('Training is complete: %d epochs%s.', self.recipe.epochs, f'; best {best}' if best else '')
        return 0

    def _begin(self) -> None:
        """Writes what the run is into its folder, before the first step, and opens its log."""
        recipe, run, state = self.recipe, self.run, self.state
        updates = state.updates_per_epoch
        size, whole = self.n_parameters / 1e6, sum(param.numel() for param in state.model.parameters()) / 1e6
        parameters = f'{size:.2f} M parameters' if size == whole else f'{size:.2f} of {whole:.2f} M parameters'
        log.info('%s: %s, %s, %d classes; %d epochs of %d updates of %d images (%d process%s x %d x %d '
                 'micro-step%s), %s, on %s', recipe.name, recipe.model, parameters, recipe.num_classes,
                 recipe.epochs, updates, recipe.total_batch_size, run.world_size, 'es' if run.world_size > 1 else '',
                 run.batch_size, run.update_freq, 's' if run.update_freq > 1 else '', recipe.precision,
                 self.processes.device)
        if (run.finetune or run.pretrained) and recipe.epochs * updates < MIN_FINETUNE_UPDATES:
            log.warning('Only %d updates: fine-tuning wants %d or more. Raise --epochs or lower --total_batch_size.',
                        recipe.epochs * updates, MIN_FINETUNE_UPDATES)
        horizon = 1 / (1 - recipe.model_ema_decay)
        if recipe.model_ema and horizon > recipe.epochs * updates:
            log.warning('The moving average looks back %.0f updates, but the run has %d: it will still hold initial '
                        'weights. Give --model_ema_decay %.4g.', horizon, recipe.epochs * updates,
                        1 - 10 / max(recipe.epochs * updates, 20))
        self.notes = Notes(recipe, run, self.processes, epochs_done=state.epoch, step=state.step)

    def _epoch(self, stop: utils.StopRequest) -> int:
        """Trains what is left of the epoch, evaluates and saves. Returns the signal to stop on, or 0."""
        state, run, updates = self.state, self.run, self.state.updates_per_epoch
        epoch, begin = state.epoch, state.step % state.updates_per_epoch
        if begin == 0:
            self.step.reset()
        signal, bad_images = 0, self.loaders.train.bad_images

        def after_update(done: int) -> bool:
            nonlocal signal, bad_images
            if self.loaders.train.bad_images > bad_images:
                self.step.sums[2] += self.loaders.train.bad_images - bad_images
                bad_images = self.loaders.train.bad_images
            state.step = epoch * updates + done
            signal = signal or stop.agreed()
            if done == updates:  # the epoch's end evaluates and saves
                return False
            if signal or (run.save_ckpt_steps and state.step % run.save_ckpt_steps == 0):
                self.step.check()
                with state.buffers.agreed(self.recipe.dist_bn):
                    self._save()
            return bool(signal)

        batches = self.loaders.train.epoch(epoch, begin, state.attempt)
        metrics = engine.train_one_epoch(
            self.step, batches if state.step else self._show_first(batches), epoch=epoch, updates=updates, start=begin,
            set_schedule=lambda update: optim_factory.set_schedule(
                self.step.optimizer, self.recipe, update=update, updates_per_epoch=updates),
            images_per_update=self.recipe.total_batch_size, print_freq=run.print_freq, max_skips=run.max_skips,
            report=lambda progress: self.notes.progress(progress, epoch=epoch),
            after_update=after_update)
        if metrics.pop('updates') < updates:
            return signal
        entry = {'epoch': epoch, 'step': state.step, **metrics, 'n_parameters': self.n_parameters}
        last = state.epoch == self.recipe.epochs
        evaluating = self.loaders.val is not None and (state.epoch % run.val_interval == 0 or last)
        with state.buffers.agreed(self.recipe.dist_bn, first=self._precise_bn if evaluating else None):
            improved, confusion = self._evaluate(entry, last=last) if evaluating else (set(), {})
            self.notes.epoch(entry, confusion, self.loaders.classes)  # before the checkpoint that counts the epoch
            due = run.save_ckpt_steps and state.step % run.save_ckpt_steps == 0
            if state.epoch % run.save_ckpt_freq == 0 or due or last or improved or signal:
                self._save(improved)
        return signal

    def _show_first(self, batches: Iterator[datasets.Pair]) -> Iterator[datasets.Pair]:
        """The same micro-batches, the first of which is drawn: before the epoch, whose time it does not count to."""
        first = next(batches)
        self.notes.images(first[0])
        return itertools.chain([first], batches)

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
            batches = self.loaders.train.epoch(self.state.epoch - 1, 0, PRECISE_BN_ORDER)
            engine.precise_bn(model, itertools.islice(batches, micro_batches), precision=self.recipe.precision,
                              frozen=frozen)

    def _evaluate(self, entry: dict[str, Any], *, last: bool) -> tuple[set[str], dict[str, list[list[int]]]]:
        """Evaluates the weights and their average into the epoch's entry.

        Returns:
            which of the two are the best yet, and in the last epoch the confusion matrices of both, where the classes
            are not too many.
        """
        improved, confusion = set(), {}
        classes = self.loaders.num_classes if last and self.loaders.num_classes <= engine.MAX_CONFUSION else 0
        for suffix, model in self._models().items():
            if next(model.parameters()).device != self.processes.device:  # an average kept on the CPU
                model = copy.deepcopy(model).to(self.processes.device)
            result = engine.evaluate(model, self.loaders.val, count=self.loaders.val.count,
                                     exact=self.loaders.val.exact, precision=self.recipe.precision, confusion=classes)
            if classes:
                confusion[f'test/confusion{suffix}'] = result['confusion']
            entry |= {f'test_{name}{suffix}': result[name] for name in ('acc1', 'acc5', 'loss')}
            if result['acc1'] > self.state.best.get(f'test_acc1{suffix}', -1.0):
                self.state.best[f'test_acc1{suffix}'] = result['acc1']
                improved.add(suffix)
        return improved, confusion

    def _save(self, improved: set[str] = frozenset()) -> None:
        """Hands the state to the writer. All ranks call it; rank 0 writes."""
        state = self.state.state_dict()
        if self.processes.first and self.run.save_ckpt:
            self.folder.save(state, best='' in improved, best_ema='_ema' in improved)

    def _written(self) -> bool:
        """Waits for the last checkpoint, on all ranks. Returns whether it was written.

        A launcher may end the job when the first process leaves it, and rank 0 alone writes.
        """
        written = self.folder.wait()
        if self.processes.host_group is None:
            return written
        flag = torch.tensor(int(written))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.processes.host_group)
        return bool(flag)

    def _roll_back(self, error: Exception) -> bool:
        """After a NaN: back to the newest checkpoint with another data order, where the user wants it and may still."""
        attempt = self.state.attempt + 1
        self._written()
        found = newest_for_all(self.folder, self.processes, f'rollback {attempt}')
        where = f'the last good checkpoint is {found[0]}' if found else 'there is no checkpoint yet'
        log.error('Update %d: %s; %s.', self.state.step, error, where)
        if self.run.on_nan == 'stop' or found is None or attempt > MAX_ROLLBACKS:
            log.error('Stopped. Lower --lr, or clip by --clip_grad 1%s%s.',
                      ', or use --precision bf16' if self.recipe.precision == 'fp16' else '',
                      '; --on_nan rollback tries again by itself' if self.run.on_nan == 'stop' else '')
            return False
        self.state.load_state_dict(found[1])
        self._set_attempt(attempt)
        self.notes.rewind(self.state.epoch, self.state.step)
        log.warning('Going back to update %d with another data order (attempt %d of %d).', self.state.step, attempt,
                    MAX_ROLLBACKS)
        return True
