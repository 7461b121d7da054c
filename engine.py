"""The training step, a stretch of them, and evaluation, for any task. Values in, metrics out: no files, no flags.

Nothing in a step waits for the device: losses, overflow flags and norms stay on it until they are printed.
"""
import contextlib
import dataclasses
import functools
import inspect
import operator
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from optim_factory import ModelEma
from utils import UserError, derive_seed, log, sum_dtype

AUTOCAST = {'fp32': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}


class NonFiniteError(RuntimeError):
    """Loss, weights, BN statistics or moving average are NaN or infinite, or fp16 overflowed too often in a row."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; for fp32 one that does nothing."""
    return torch.autocast(device.type, dtype=AUTOCAST[precision], enabled=AUTOCAST[precision] is not None)


def create_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """fp16's loss scaler; for the other precisions one that passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision == 'fp16')


def train_mode(model: nn.Module) -> None:
    """Training mode, but for the modules all of whose parameters are frozen."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(param.requires_grad for param in parameters):
            module.eval()


def frozen_norms(model: nn.Module) -> set[str]:
    """The names of the batch norms whose parameters are all frozen."""
    return {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)
            and list(module.parameters()) and not any(param.requires_grad for param in module.parameters())}


def wrap_distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP where there is a process group, else the model itself.

    BN statistics are not broadcast every step: `Buffers` makes them equal before they are used.
    """
    if not dist.is_initialized():
        return model
    # A depthwise weight [C, 1, k, k] has two equal layouts in memory, of which DDP expects the other one
    warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
    parameters = inspect.signature(DistributedDataParallel).parameters
    no_broadcast = 'forward_sync_buffers' if 'forward_sync_buffers' in parameters else 'broadcast_buffers'
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True, **{no_broadcast: False})


class Buffers:
    """The BN statistics of a model, and of its moving average, as one flat tensor: a few launches, not some a norm.

    They differ between the ranks and take no part in training, which normalises by the batch; so what is made of them
    for evaluating and saving is put back afterwards, and the course of training does not depend on how often that is.
    """

    def __init__(self, *models: nn.Module | None, counts: bool = False):
        """
        Args:
            models: the first is on the process's device; others may be missing, or elsewhere.
            counts: take the counts of batches in place of the statistics.
        """
        self._buffers = [buffer for model in models if model is not None for buffer in model.buffers()
                         if buffer.is_floating_point() != counts]
        self._device = next(models[0].parameters()).device
        self._own: torch.Tensor | None = None  # this rank's statistics, while others stand in their place

    def own(self) -> torch.Tensor:
        """This rank's own statistics [n], also within `equal`."""
        return self.get() if self._own is None else self._own

    def get(self) -> torch.Tensor:
        """A copy of all of them, [n], on the device of the first model."""
        if not self._buffers:
            return torch.zeros(0, device=self._device)
        return torch.cat([buffer.reshape(-1).to(self._device) for buffer in self._buffers])

    def set(self, flat: torch.Tensor) -> None:
        """Writes back what `get` returned."""
        parts = flat.split([buffer.numel() for buffer in self._buffers]) if self._buffers else []
        for device in {buffer.device for buffer in self._buffers}:
            pairs = [(buffer, part.view_as(buffer).to(device, buffer.dtype))
                     for buffer, part in zip(self._buffers, parts, strict=True) if buffer.device == device]
            torch._foreach_copy_(*[list(side) for side in zip(*pairs, strict=True)])

    @contextlib.contextmanager
    def equal(self, mode: str, *, first: Callable[[], None] | None = None) -> Iterator[None]:
        """Within the context the buffers are equal on all ranks, by one flat exchange.

        Args:
            mode: 'reduce', the mean over the ranks; 'broadcast', rank 0's; 'none', each rank its own.
            first: is called before the exchange; it may change the buffers (Precise BN).
        """
        self._own = own = self.get()
        if first is not None:
            first()
        if dist.is_initialized() and mode != 'none' and own.numel():
            common = self.get()
            if mode == 'reduce':
                dist.all_reduce(common)
                common /= dist.get_world_size()
            else:
                dist.broadcast(common, src=0)
            self.set(common)
        try:
            yield
        finally:
            self._own = None
            self.set(own)


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any], *,
               precision: str = 'fp32', frozen: Collection[str] = ()) -> None:
    """Replaces the running BN statistics by the plain mean over some training batches (Precise BN, arXiv 2105.07576).

    Args:
        model: unwrapped model; its mode is restored.
        batches: this rank's micro-batches, on the device.
        forward: the pass of a model over a batch.
        frozen: names of norms that keep their statistics.
    """
    device = next(model.parameters()).device
    norms = [module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and name not in frozen]
    was_training, momenta = model.training, [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    model.eval()
    for norm in norms:  # only the norms, not dropout and drop path
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative mean
        norm.train()
    # Compiled, each norm would break the graph, since a momentum of None reads the count of batches
    eager = torch.compiler.set_stance('force_eager') if model._compiled_call_impl else contextlib.nullcontext()
    with eager, autocast(device, precision):
        for batch in batches:
            forward(model, batch)
    for norm, momentum, count in zip(norms, momenta, counts, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count)
    if was_training:
        train_mode(model)


class Sums:
    """Named sums in one tensor on the device, so that one exchange and one read take them all.

    Attributes:
        values: [names], which a checkpoint keeps.
    """

    def __init__(self, names: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float32):
        self.names = tuple(names)
        self.values = torch.zeros(len(self.names), device=device, dtype=dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A view of one sum, which may be changed in place."""
        return self.values[self.names.index(name)]

    def add(self, **values: torch.Tensor | float) -> None:
        """Adds to sums by their names."""
        for name, value in values.items():
            self[name].add_(value)


class TrainStep:
    """One update of the weights: the only forward and backward pass of training, for every task and precision.

    Autocast, loss, backward, unscale, clip, step, moving average. Scaler, accumulation, clipping and average are
    switches of that one line.

    Attributes:
        sums: since `reset`, of this rank: the summed 'loss', the 'images', the 'bad_images' among them that were
            replaced, which the caller adds, and the single losses that the task names.
        skips: updates that the scaler skipped: 'all' since `reset`, and 'in_a_row'.
    """

    def __init__(self, model: nn.Module, task: Any, optimizer: torch.optim.Optimizer, *, device: torch.device,
                 precision: str = 'fp32', scaler: torch.amp.GradScaler | None = None, ema: ModelEma | None = None,
                 clip_grad: float | None = None, clip_mode: str = 'norm', update_freq: int = 1, seed: int = 0,
                 rank: int = 0):
        """
        Args:
            model: the model, in DDP where there are several processes.
            task: gives `loss(model, batch)`, named means over the images, and `losses`, the names to be summed.
            scaler: fp16's; None for one that passes everything through.
            update_freq: micro-steps per update.
            seed: from it, the update, the micro-step and the rank, drop path and dropout are drawn.
        """
        self.model, self.task, self.optimizer, self.device = model, task, optimizer, device
        self.precision, self.ema = precision, ema
        self.scaler = scaler or create_scaler(device, precision)
        self.clip_grad, self.clip_mode = clip_grad, clip_mode
        self.update_freq, self.seed, self.rank = update_freq, seed, rank
        self.unwrapped: nn.Module = getattr(model, 'module', model)
        self.buffers = Buffers(self.unwrapped)
        self._kept = (self.buffers, Buffers(self.unwrapped, counts=True))
        self.sums = Sums(('loss', 'images', 'bad_images', *task.losses), device, sum_dtype(device))
        self.skips = Sums(('all', 'in_a_row'), device)

    def reset(self) -> None:
        """Begins new sums, at the start of an epoch."""
        self.sums.values.zero_()
        self.skips['all'].zero_()

    def __call__(self, batches: Iterator[Any], update: int) -> None:
        """Trains on the next `update_freq` micro-batches.

        Args:
            batches: on the device.
            update: number of the update in the run, from 0.
        """
        before = self._snapshot()
        sums = {name: torch.zeros_like(self.sums['loss']) for name in ('loss', *self.task.losses)}
        seen = 0
        for micro_step in range(self.update_freq):
            batch = next(batches)
            torch.manual_seed(derive_seed(self.seed, 'step', update, micro_step, self.rank))
            exchange = micro_step == self.update_freq - 1 or not hasattr(self.model, 'no_sync')
            with contextlib.nullcontext() if exchange else self.model.no_sync():
                with autocast(self.device, self.precision):
                    losses = self.task.loss(self.model, batch)
                    loss = total(losses)
                self.scaler.scale(loss / self.update_freq).backward()
            sums['loss'] += loss.detach() * len(batch)
            for name in self.task.losses:
                sums[name] += losses[name].detach() * len(batch)
            seen += len(batch)
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad is not None:
            # Adaptive clipping leaves the classifier out (arXiv 2102.06171)
            clipped = model_parameters(self.unwrapped, exclude_head=self.clip_mode == 'agc')
            dispatch_clip_grad(clipped, self.clip_grad, mode=self.clip_mode)
        self.scaler.step(self.optimizer)
        skipped = self._undo_if_skipped(before)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(update, skipped=skipped)
        if skipped is None:
            self.sums.add(**sums, images=seen)
        else:
            self.sums.add(**{name: torch.where(skipped > 0, 0.0, value) for name, value in sums.items()},
                          images=seen * (1 - skipped))
            self.skips.add(all=skipped)
            self.skips['in_a_row'].add_(1).mul_(skipped)

    def _snapshot(self) -> list[torch.Tensor] | None:
        """The BN buffers before an update that may overflow."""
        return [buffers.get() for buffers in self._kept] if self.scaler.is_enabled() else None

    def _undo_if_skipped(self, before: list[torch.Tensor] | None) -> torch.Tensor | None:
        """Puts the BN buffers back where the scaler skipped the update. Returns its flag, on the device.

        The overflowing forward pass has left inf or NaN in the running statistics. They never leave again, and do not
        show in training, but make every evaluation NaN.
        """
        if before is None:
            return None
        # The scaler keeps the flag that its own step and update go by; the public get_scale() would wait for the device
        skipped = sum(self.scaler._found_inf_per_device(self.optimizer).values()).to(self.device).clamp(max=1).squeeze()
        for buffers, old in zip(self._kept, before, strict=True):
            buffers.set(torch.where(skipped > 0, old, buffers.get()))
        return skipped

    def warm_up(self, batch: Any) -> None:
        """A throwaway pass of a model in DDP or compiled, before the training starts.

        It lets DDP settle its buckets, so that a resumed run sums in the order of the first, and shows whether torch
        can compile the model. DDP reorders its buckets after its first backward pass, and from three processes on the
        order changes the sums. The BN buffers are put back; the random state is derived anew each step.
        """
        if not isinstance(self.model, DistributedDataParallel) and self.unwrapped._compiled_call_impl is None:
            return
        before = [buffers.get() for buffers in self._kept]
        train_mode(self.model)
        with autocast(self.device, self.precision):
            loss = total(self.task.loss(self.model, batch))
        loss.backward()
        self.optimizer.zero_grad()
        for buffers, old in zip(self._kept, before, strict=True):
            buffers.set(old)

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Reads the sums and the health of all ranks. Training waits for the device here: on reports and before saves.

        Returns:
            'loss' and the task's single losses, means over the images since `reset`; 'bad_images'; 'skipped', the
            updates skipped by the scaler; 'skips_in_row'.

        Raises:
            NonFiniteError: on every rank alike, where loss, parameters, buffers or average of any are not finite.
        """
        watched = [tensor for model in (self.unwrapped, self.ema and self.ema.module) if model is not None
                   for tensor in model.state_dict().values() if tensor.is_floating_point()]
        # The largest absolute value of each tensor: NaN and inf come through, and it cannot overflow as a sum would
        norms = torch.stack([norm.to(self.device) for norm in torch._foreach_norm(watched, float('inf'))])
        sums = self.sums.values
        broken = ~(norms.isfinite().all() & sums.isfinite().all())
        values = torch.cat([sums, broken.to(sums)[None], self.skips.values.to(sums)])
        if dist.is_initialized():
            dist.all_reduce(values[:len(sums) + 1])
        found = dict(zip((*self.sums.names, 'broken ranks', 'skipped', 'skips_in_row'), values.tolist(), strict=True))
        if found.pop('broken ranks'):
            raise NonFiniteError('the loss, the weights, the BN statistics or their average are NaN or infinite')
        images = max(found.pop('images'), 1)
        return found | {name: found[name] / images for name in ('loss', *self.task.losses)}


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of a task's losses."""
    return functools.reduce(operator.add, losses.values())


class _Timed:
    """An iterator that adds up the seconds spent waiting for its next item."""

    def __init__(self, items: Iterable[Any]):
        self._items = iter(items)
        self.seconds = 0.0

    def __iter__(self) -> '_Timed':
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        item = next(self._items)
        self.seconds += time.perf_counter() - start
        return item


@dataclasses.dataclass
class Progress:
    """What a stretch of updates reports every `print_freq` of them."""

    update: int  # updates of the stretch done
    updates: int  # updates of the stretch
    loss: float
    lr: float
    images_per_second: float
    seconds_per_update: float
    data_wait: float  # share of the time spent waiting for data
    skipped: float


def train_updates(step: TrainStep, batches: Iterable[Any], *, begin: int, end: int, start: int | None = None,
                  set_schedule: Callable[[int], float], images_per_update: int, print_freq: int = 50,
                  max_skips: int = 50, report: Callable[[Progress], None] | None = None,
                  after_update: Callable[[int], bool] | None = None) -> dict[str, float]:
    """Trains what is left of a stretch of the run: the updates `start` .. `end - 1`.

    Args:
        step: the training step; its sums hold what an interrupted stretch had before `start`.
        batches: this rank's micro-batches from update `start` on.
        begin: the update with which the stretch began; `start` by default.
        set_schedule: sets the optimizer for an update of the run and returns the learning rate.
        images_per_update: over all ranks.
        print_freq: updates between reports, at which the device is waited for.
        max_skips: updates that the scaler may skip in a row.
        report: receives the figures every `print_freq` updates and at the end.
        after_update: receives the updates of the run that are done; returns True to stop here.

    Returns:
        'train_loss' and the task's single losses, 'lr' of the last update, 'images_per_second', 'data_wait' (share of
        the time), 'skipped', 'bad_images', and 'done', the updates of the run, fewer than `end` where `after_update`
        stopped it.

    Raises:
        NonFiniteError: on all ranks alike.
    """
    train_mode(step.model)
    start = begin if start is None else start
    timed = _Timed(batches)
    clock = time.perf_counter()
    figures: dict[str, float] = {}
    done, lr = start, 0.0
    for done in range(start + 1, end + 1):
        lr = set_schedule(done - 1)
        step(timed, done - 1)
        stop = after_update(done) if after_update is not None else False
        if (done - begin) % print_freq == 0 or done == end or stop:
            figures = step.check()
            if figures['skips_in_row'] >= max_skips:
                raise NonFiniteError(f'fp16 overflowed in {max_skips} updates in a row')
            seconds = time.perf_counter() - clock
            rate, wait = (done - start) * images_per_update / seconds, timed.seconds / seconds
            if report is not None:
                report(Progress(done - begin, end - begin, figures['loss'], lr, rate, seconds / (done - start), wait,
                                figures['skipped']))
        if stop:
            break
    return {'train_loss': figures['loss'], **{f'train_{name}': figures[name] for name in step.task.losses}, 'lr': lr,
            'images_per_second': rate, 'data_wait': wait, 'skipped': figures['skipped'],
            'bad_images': figures['bad_images'], 'done': done}


@torch.no_grad()
def evaluate(models: dict[str, nn.Module], batches: Iterable[Any], metric: Any, *, count: int, device: torch.device,
             exact: bool = True, precision: str = 'fp32', compiling: bool = False) -> dict[str, dict[str, Any]]:
    """Evaluates several models in one pass over a data set that the ranks share out, each image once.

    Args:
        models: unwrapped, on the device; a rank may have fewer batches than another, so that nothing in them may
            communicate.
        batches: this rank's.
        metric: a new `tasks.Metric`.
        count: images of the whole data set.
        compiling: whether the first batch may compile the models, which are made for it alone; else what was compiled
            for training stays the one graph, since another would cost minutes an evaluation takes seconds.
        exact: whether `count` is sure; a stream only says how many images it has, and another number is a warning.

    Returns:
        the metric's result by model.

    Raises:
        RuntimeError: where the images seen by all ranks are not `count`, which is exact.
        UserError: where a stream gives no image.
    """
    training = [model for model in models.values() if model.training]
    for model in models.values():
        model.eval()
    for number, batch in enumerate(batches):
        # The last batch has a size of its own, for which torch would compile a second, dynamic graph
        stance = 'default' if compiling and number == 0 else 'eager_on_recompile'
        with torch.compiler.set_stance(stance), autocast(device, precision):
            metric.update(models, batch)
    for model in training:
        train_mode(model)
    results = metric.result(list(models))
    seen = next(iter(results.values()))['count']
    if seen != count and exact:
        raise RuntimeError(f'{seen} images were evaluated, but the data set has {count}')
    if not seen:
        raise UserError(f'the stream gives none of the {count} test images that it says it has; check its shards')
    if seen != count:
        log.warning('%d images were evaluated, though the stream says it has %d: shards or images are missing, or its '
                    'count is wrong', seen, count)
    return results


@torch.no_grad()
def throughput(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any], *, device: torch.device,
               precision: str = 'fp32', seconds: float = 3.0) -> float:
    """Images a second of the model alone, in evaluation mode, on one batch on its device."""
    model.eval()

    def run() -> None:
        with autocast(device, precision):
            forward(model, batch)
        if device.type != 'cpu':
            torch.accelerator.synchronize(device)

    for _ in range(2):
        run()
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        run()
        done += len(batch)
    return done / (time.perf_counter() - begin)


def largest_micro_batch(model: nn.Module, task: Any, sizes: Sequence[int], *, device: torch.device,
                        precision: str) -> int:
    """The first of `sizes`, falling, of which a training step fits the memory of a CUDA device; the same on all ranks.

    A tenth of the memory is left free, for the optimizer's state, DDP's buckets and fragmentation.

    Raises:
        UserError: where not even the last fits.
    """
    budget = 0.9 * torch.cuda.mem_get_info(device)[0]
    # Gradients, two moments and the average, which this trial does not have
    budget -= 4 * sum(param.numel() * param.element_size() for param in model.parameters())
    chosen = len(sizes)
    for i, size in enumerate(sizes):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            batch = task.example_batch(size, device)
            with autocast(device, precision):
                loss = total(task.loss(model, batch))
            loss.backward()
            fits = torch.cuda.max_memory_allocated(device) < budget
        except torch.cuda.OutOfMemoryError:
            fits = False
        model.zero_grad()
        if fits:
            chosen = i
            break
    torch.cuda.empty_cache()
    if dist.is_initialized():
        common = torch.tensor(chosen, device=device)
        dist.all_reduce(common, op=dist.ReduceOp.MAX)
        chosen = int(common)
    if chosen == len(sizes):
        raise UserError(f'not even a micro-batch of {sizes[-1]} fits the memory of {device}; give --grad_checkpointing')
    return sizes[chosen]
