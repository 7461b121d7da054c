"""The training step, an epoch of them, and evaluation. Values in, metrics out: no files, no flags.

Nothing in a step waits for the device: losses, overflow flags and norms stay on it until they are printed.
"""
import contextlib
import dataclasses
import inspect
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from checkpoint import Buffers
from optim_factory import ModelEma
from utils import UserError, derive_seed, log

MAX_CONFUSION = 100  # classes of which a confusion matrix is still one that a person reads
AUTOCAST = {'fp32': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}


class NonFiniteError(RuntimeError):
    """Loss, weights, BN statistics or moving average are NaN or infinite, or fp16 overflowed too often in a row."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; for fp32 one that does nothing."""
    return torch.autocast(device.type, dtype=AUTOCAST[precision], enabled=AUTOCAST[precision] is not None)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Sums over an epoch are kept in float64, where the device has it (MPS does not)."""
    return torch.float32 if device.type == 'mps' else torch.float64


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

    BN statistics are not broadcast every step: `checkpoint.Buffers` makes them equal before they are used.
    """
    if not dist.is_initialized():
        return model
    # A depthwise weight [C, 1, k, k] has two equal layouts in memory, of which DDP expects the other one
    warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
    parameters = inspect.signature(DistributedDataParallel).parameters
    no_broadcast = 'forward_sync_buffers' if 'forward_sync_buffers' in parameters else 'broadcast_buffers'
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True, **{no_broadcast: False})


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *,
               precision: str = 'fp32', frozen: Collection[str] = ()) -> None:
    """Replaces the running BN statistics by the plain mean over some training batches (Precise BN, arXiv 2105.07576).

    Args:
        model: unwrapped model; its mode is restored.
        batches: this rank's micro-batches (images [B, 3, H, W], targets).
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
    with autocast(device, precision):
        for images, _ in batches:
            model(images.to(device))
    for norm, momentum, count in zip(norms, momenta, counts, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count)
    if was_training:
        train_mode(model)


class TrainStep:
    """One update of the weights: the only forward and backward pass of training, for every precision.

    Autocast, loss, backward, unscale, clip, step, moving average. Scaler, accumulation, clipping and average are
    switches of that one line.

    Attributes:
        sums: [3] on the device, since `reset`: this rank's summed loss, its images, and the unreadable ones among them
            that were replaced, which the caller adds.
        skips: [2] on the device: updates that the scaler skipped, since `reset` and in a row.
    """

    def __init__(self, model: nn.Module, criterion: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, *,
                 device: torch.device, precision: str = 'fp32', scaler: torch.amp.GradScaler | None = None,
                 ema: ModelEma | None = None, clip_grad: float | None = None, clip_mode: str = 'norm',
                 update_freq: int = 1, seed: int = 0, rank: int = 0):
        """
        Args:
            model: the model, in DDP where there are several processes.
            criterion: loss of (logits, targets), the mean over the images.
            scaler: fp16's; None for one that passes everything through.
            update_freq: micro-steps per update.
            seed: from it, the update, the micro-step and the rank, drop path and dropout are drawn.
        """
        self.model, self.criterion, self.optimizer, self.device = model, criterion, optimizer, device
        self.precision, self.ema = precision, ema
        self.scaler = scaler or create_scaler(device, precision)
        self.clip_grad, self.clip_mode = clip_grad, clip_mode
        self.update_freq, self.seed, self.rank = update_freq, seed, rank
        self.unwrapped: nn.Module = getattr(model, 'module', model)
        self.buffers = Buffers(self.unwrapped)
        self._counts = [buffer for buffer in self.unwrapped.buffers() if not buffer.is_floating_point()]
        self.sums = torch.zeros(3, device=device, dtype=sum_dtype(device))
        self.skips = torch.zeros(2, device=device)

    def reset(self) -> None:
        """Begins new sums, at the start of an epoch."""
        self.sums.zero_()
        self.skips[0] = 0

    def __call__(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], update: int) -> None:
        """Trains on the next `update_freq` micro-batches.

        Args:
            batches: images [B, 3, H, W] and targets [B] or [B, classes], on the device.
            update: number of the update in the run, from 0.
        """
        before = self._snapshot()
        loss_sum = torch.zeros_like(self.sums[0])
        seen = 0
        for micro_step in range(self.update_freq):
            images, targets = next(batches)
            torch.manual_seed(derive_seed(self.seed, 'step', update, micro_step, self.rank))
            exchange = micro_step == self.update_freq - 1 or not hasattr(self.model, 'no_sync')
            with contextlib.nullcontext() if exchange else self.model.no_sync():
                with autocast(self.device, self.precision):
                    loss = self.criterion(self.model(images), targets)
                self.scaler.scale(loss / self.update_freq).backward()
            loss_sum += loss.detach() * len(images)
            seen += len(images)
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
            self.sums[0] += loss_sum
            self.sums[1] += seen
        else:
            self.sums[0] += torch.where(skipped > 0, 0.0, loss_sum)
            self.sums[1] += seen * (1 - skipped)
            self.skips[0] += skipped
            self.skips[1].add_(1).mul_(skipped)

    def _snapshot(self) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """The BN buffers before an update that may overflow."""
        if not self.scaler.is_enabled():
            return None
        return self.buffers.get(), [count.clone() for count in self._counts]

    def _undo_if_skipped(self, before: tuple[torch.Tensor, list[torch.Tensor]] | None) -> torch.Tensor | None:
        """Puts the BN buffers back where the scaler skipped the update. Returns its flag, on the device.

        The overflowing forward pass has left inf or NaN in the running statistics. They never leave again, and do not
        show in training, but make every evaluation NaN.
        """
        if before is None:
            return None
        # The scaler keeps the flag that its own step and update go by; the public get_scale() would wait for the device
        skipped = sum(self.scaler._found_inf_per_device(self.optimizer).values()).to(self.device).clamp(max=1).squeeze()
        statistics, counts = before
        self.buffers.set(torch.where(skipped > 0, statistics, self.buffers.get()))
        for count, old in zip(self._counts, counts, strict=True):
            count.copy_(torch.where(skipped > 0, old, count))
        return skipped

    def warm_up(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """A throwaway pass of a model in DDP or compiled, before the training starts.

        It lets DDP settle its buckets, so that a resumed run sums in the order of the first, and shows whether torch
        can compile the model. DDP reorders its buckets after its first backward pass, and from three processes on the
        order changes the sums. The BN buffers are put back; the random state is derived anew each step.
        """
        if not isinstance(self.model, DistributedDataParallel) and self.unwrapped._compiled_call_impl is None:
            return
        kept, counts = self.buffers.get(), [count.clone() for count in self._counts]
        train_mode(self.model)
        with autocast(self.device, self.precision):
            loss = self.criterion(self.model(images), targets)
        loss.backward()
        self.optimizer.zero_grad()
        self.buffers.set(kept)
        for count, old in zip(self._counts, counts, strict=True):
            count.copy_(old)

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Reads the sums and the health of all ranks: where training waits for the device: on reports and before saves.

        Returns:
            'loss', the mean over the images since `reset`; 'bad_images'; 'skipped', the updates skipped by the scaler;
            'skips_in_row'.

        Raises:
            NonFiniteError: on every rank alike, where loss, parameters, buffers or average of any are not finite.
        """
        watched = [tensor for model in (self.unwrapped, self.ema and self.ema.module) if model is not None
                   for tensor in model.state_dict().values() if tensor.is_floating_point()]
        # The largest absolute value of each tensor: NaN and inf come through, and it cannot overflow as a sum would
        norms = torch.stack([norm.to(self.device) for norm in torch._foreach_norm(watched, float('inf'))])
        broken = ~(norms.isfinite().all() & self.sums.isfinite().all())
        values = torch.cat([self.sums, broken.to(self.sums)[None], self.skips.to(self.sums)])
        if dist.is_initialized():
            dist.all_reduce(values[:4])
        loss, seen, bad_images, broken_ranks, skipped, skips_in_row = values.tolist()
        if broken_ranks:
            raise NonFiniteError('the loss, the weights, the BN statistics or their average are NaN or infinite')
        return {'loss': loss / max(seen, 1), 'bad_images': bad_images, 'skipped': skipped, 'skips_in_row': skips_in_row}


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
    """What an epoch reports every `print_freq` updates."""

    update: int  # updates of this epoch done
    updates: int  # updates of an epoch
    loss: float
    lr: float
    images_per_second: float
    seconds_per_update: float
    data_wait: float  # share of the time spent waiting for data
    skipped: float


def train_one_epoch(step: TrainStep, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, epoch: int,
                    updates: int, start: int = 0, set_schedule: Callable[[int], float], images_per_update: int,
                    print_freq: int = 50, max_skips: int = 50, report: Callable[[Progress], None] | None = None,
                    after_update: Callable[[int], bool] | None = None) -> dict[str, float]:
    """Trains the updates `start` .. `updates - 1` of an epoch.

    Args:
        step: the training step; its sums hold what an interrupted epoch had before `start`.
        batches: this rank's micro-batches from update `start` on.
        set_schedule: sets the optimizer for an update of the run and returns the learning rate.
        images_per_update: over all ranks.
        print_freq: updates between reports, at which the device is waited for.
        max_skips: updates that the scaler may skip in a row.
        report: receives the figures every `print_freq` updates and at the end.
        after_update: receives the updates of this epoch that are done; returns True to stop here.

    Returns:
        'train_loss', 'lr' of the last update, 'images_per_second', 'data_wait' (share of the time), 'skipped',
        'bad_images', and 'updates' done in the epoch, fewer than `updates` where `after_update` stopped it.

    Raises:
        NonFiniteError: on all ranks alike.
    """
    train_mode(step.model)
    timed = _Timed(batches)
    begin = time.perf_counter()
    figures: dict[str, float] = {}
    done, lr = start, 0.0
    for done in range(start + 1, updates + 1):
        update = epoch * updates + done - 1
        lr = set_schedule(update)
        step(timed, update)
        stop = after_update(done) if after_update is not None else False
        if done % print_freq == 0 or done == updates or stop:
            figures = step.check()
            if figures['skips_in_row'] >= max_skips:
                raise NonFiniteError(f'fp16 overflowed in {max_skips} updates in a row')
            seconds = time.perf_counter() - begin
            rate, wait = (done - start) * images_per_update / seconds, timed.seconds / seconds
            if report is not None:
                report(Progress(done, updates, figures['loss'], lr, rate, seconds / (done - start), wait,
                                figures['skipped']))
        if stop:
            break
    return {'train_loss': figures['loss'], 'lr': lr, 'images_per_second': rate, 'data_wait': wait,
            'skipped': figures['skipped'], 'bad_images': figures['bad_images'], 'updates': done}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, count: int,
             exact: bool = True, precision: str = 'fp32', valid_labels: Sequence[int] | None = None,
             real_labels: torch.Tensor | None = None, confusion: int = 0) -> dict[str, Any]:
    """Accuracy and cross-entropy over a data set that the ranks share out, each image once.

    Args:
        model: unwrapped; a rank may have fewer batches than another, so that nothing in it may communicate.
        batches: this rank's images [B, 3, H, W] and class indices [B].
        count: images of the whole data set.
        exact: whether `count` is sure; a stream only says how many images it has, and another number is a warning.
        valid_labels: the model's classes that the data set has, in the order of its labels; all of them by default.
        real_labels: bool [images of this rank, classes], all the labels that are right for an image; an image without
            any is left out (ReaL, arXiv 2006.07159).
        confusion: the number of classes, where their confusion matrix is wanted.

    Returns:
        'acc1' and 'acc5' in % (top-5 is top-k where there are k < 5 classes), 'loss' per image, 'count', with
        `real_labels` 'real_acc1' in %, and with `confusion` 'confusion', the images [true][predicted].

    Raises:
        RuntimeError: where the images seen by all ranks are not `count`, which is exact.
        UserError: where a stream gives no image.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums = torch.zeros(6 + confusion**2, device=device, dtype=sum_dtype(device))
    matrix = sums[6:].view(confusion, confusion)
    seen = 0
    for images, targets in batches:
        images, targets = images.to(device), targets.to(device)
        with autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        if valid_labels is not None:
            logits = logits[:, valid_labels]
        top = logits.topk(min(5, logits.shape[1])).indices
        right = top == targets[:, None]
        sums[:3] += torch.stack([right[:, 0].sum(), right.sum(), F.cross_entropy(logits, targets, reduction='sum')])
        if real_labels is not None:
            real = real_labels[seen:seen + len(images)].to(device)
            sums[3:5] += torch.stack([real.gather(1, top[:, :1]).sum(), real.any(1).sum()])
        if confusion:
            matrix.index_put_((targets, top[:, 0]), torch.ones_like(sums[0]), accumulate=True)
        seen += len(images)
    sums[5] = seen
    if was_training:
        train_mode(model)
    if dist.is_initialized():
        sums = sums.cuda() if dist.get_backend() == 'nccl' else sums  # a moving average may be kept on the CPU
        dist.all_reduce(sums)
    correct1, correct5, loss, real_correct, real_count, total = sums[:6].tolist()
    if total != count and exact:
        raise RuntimeError(f'{total:.0f} images were evaluated, but the data set has {count}')
    if not total:
        raise UserError(f'the stream gives none of the {count} test images that it says it has; check its shards')
    if total != count:
        log.warning('%d images were evaluated, though the stream says it has %d: shards or images are missing, or its '
                    'count is wrong', total, count)
    result = {'acc1': 100 * correct1 / total, 'acc5': 100 * correct5 / total, 'loss': loss / total, 'count': int(total)}
    if real_labels is not None:
        result['real_acc1'] = 100 * real_correct / max(real_count, 1)
    if confusion:
        result['confusion'] = sums[6:].view(confusion, confusion).long().tolist()
    return result


@torch.no_grad()
def throughput(model: nn.Module, images: torch.Tensor, *, precision: str = 'fp32', seconds: float = 3.0) -> float:
    """Images a second of the model alone, in evaluation mode, on one batch [B, 3, H, W] on its device."""
    model.eval()

    def forward() -> None:
        with autocast(images.device, precision):
            model(images)[0, 0].item()  # waits for the device

    for _ in range(2):
        forward()
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        forward()
        done += len(images)
    return done / (time.perf_counter() - begin)


def largest_micro_batch(model: nn.Module, criterion: Callable[..., torch.Tensor], sizes: Sequence[int], *,
                        input_size: int, device: torch.device, precision: str) -> int:
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
            images = torch.zeros(size, 3, input_size, input_size, device=device)
            with autocast(device, precision):
                loss = criterion(model(images), torch.zeros(size, dtype=torch.int64, device=device))
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
