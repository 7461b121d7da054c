"""Speed and memory traffic of the models (`tools/benchmark.py model` and `traffic`)."""
import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, ClassVar

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from engine import AUTOCAST, autocast
from models import moganet
from tools.alternation import Row, alternate
from tools.complexity import complexity
from training.traffic import Traffic
from utils import UserError, choose_device, nearest

FORMS = ('authors', 'fused', 'compiled', 'channels_last')


# ---- The authors' formulation, as a measure of ours ------------------------------------------------------------------

def _authors_aggregation(self: moganet.MultiOrderGatedAggregation, x: torch.Tensor) -> torch.Tensor:
    y = self.proj_1(x.clone())
    y = F.silu(y + self.sigma.scale * (y - F.adaptive_avg_pool2d(y, 1)))
    gate, value = self.gate(y), self.value(y)
    return self.proj_2(F.silu(gate) * F.silu(value))


def _authors_value(self: moganet.MultiOrderDWConv, x: torch.Tensor) -> torch.Tensor:
    low, mid, _ = self.dims
    x = self.DW_conv0(x)
    parts = x[:, :low], self.DW_conv1(x[:, low:low + mid]), self.DW_conv2(x[:, low + mid:])
    return self.PW_conv(torch.cat(parts, dim=1))


def _authors_mlp(self: moganet.ChannelAggregation, x: torch.Tensor) -> torch.Tensor:
    x = self.drop(F.gelu(self.dwconv(self.fc1(x))))
    x = x + self.sigma.scale * (x - F.gelu(self.decompose(x)))
    return self.drop(self.fc2(x))


def _authors_block(self: moganet.MogaBlock, x: torch.Tensor) -> torch.Tensor:
    u = self.norm1(x)
    x = x + self.drop_path(self.layer_scale_1 * (self.attn(u) + u))
    return x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))


AUTHORS = {
    moganet.MultiOrderGatedAggregation: _authors_aggregation,
    moganet.MultiOrderDWConv: _authors_value,
    moganet.ChannelAggregation: _authors_mlp,
    moganet.MogaBlock: _authors_block,
}


def as_authors(model: nn.Module) -> nn.Module:
    """A copy of a MogaNet that does the same arithmetic step by step, as the authors' code does."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in AUTHORS:
            module.forward = MethodType(AUTHORS[type(module)], module)
    return model


# ---- Traffic ---------------------------------------------------------------------------------------------------------

class CudaAutocast(TorchFunctionMode):
    """CUDA's autocast to bf16 for tensors on meta, where torch has none: the casts that a MogaNet's training meets."""

    half: ClassVar = {torch.conv2d, F.conv2d, F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__}
    widest: ClassVar = {torch.addcmul, F.cross_entropy}  # in float32, where a tensor is; the loss always

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.half | self.widest:
            dtype = torch.bfloat16 if func in self.half else torch.float32
            args = tuple(arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
                         for arg in args)
        return func(*args, **(kwargs or {}))


def compiled_bytes(work: Callable[[], Any]) -> int:
    """Bytes that inductor counts for the kernels that it compiles in a first call of `work`, library calls included."""
    from torch._inductor import config, metrics
    from torch._inductor.compile_fx import inductor_metrics_log
    metrics.reset()
    level, inductor_metrics_log.propagate = inductor_metrics_log.level, False
    inductor_metrics_log.setLevel(logging.INFO)  # it counts only what it would log, and only what is not cached
    try:
        with config.patch(force_disable_caches=True):
            work()
    finally:
        inductor_metrics_log.setLevel(level)
    return metrics.num_bytes_accessed


def measure_traffic(
    names: Sequence[str], *, batch_size: int = 64, input_size: int = 224, compiled: bool = False
) -> list[Row]:
    """Traffic of a training step as CUDA's eager kernels do it, without the optimizer, for each of the named MogaNets.

    Under autocast to bf16, at drop path 0.1; the authors' formulation contiguous, as theirs is, ours channels-last.

    Returns:
        By model, MB an image and kernels in the authors' formulation and in ours; of ours the MB of the convolutions,
        and those that hide within operators (see `Traffic`); the ratio ours / authors'; and ours in fp32. With
        `compiled` also MB an image as the compiler counts them at batch 2, in pure bf16, for both.
    """
    rows = []
    for name in names or timm.list_models(module='moganet'):
        model = create(name, drop_path_rate=0.1, device='meta').train()
        shape = (batch_size, 3, input_size, input_size)
        theirs, ours, full = (
            count_step(build_form(model, form), shape, layout_of_form(form), precision)
            for form, precision in (('authors', 'bf16'), ('channels_last', 'bf16'), ('channels_last', 'fp32')))
        convolutions = ours.bytes['convolution'] + ours.bytes['convolution_backward'] + ours.hidden.total() - (
            ours.hidden['norms'])
        row = {
            'model': name,
            'authors_mb': round(theirs.total() / batch_size / 1e6, 1),
            'mb': round(ours.total() / batch_size / 1e6, 1),
            'convolutions_mb': round(convolutions / batch_size / 1e6, 1),
            'hidden_mb': round(ours.hidden.total() / batch_size / 1e6, 1),
            'ratio': round(ours.total() / theirs.total(), 3),
            'authors_kernels': theirs.kernels.total() + theirs.launches.total(),
            'kernels': ours.kernels.total() + ours.launches.total(),
            'fp32_mb': round(full.total() / batch_size / 1e6, 1),
        }
        if compiled:
            model = create(name, drop_path_rate=0.1, dtype=torch.bfloat16).train()
            for key, form in (('authors_compiled_mb', 'authors+compiled'), ('compiled_mb', 'compiled')):
                torch._dynamo.reset()
                images = torch.randn(2, 3, input_size, input_size, dtype=torch.bfloat16)
                work = training_step(build_form(model, form), images, precision='fp32')
                row[key] = round(compiled_bytes(work) / 2 / 1e6, 1)
        rows.append(row)
    return sorted(rows, key=lambda row: row['mb'])


def count_step(model: nn.Module, shape: tuple[int, ...], layout: torch.memory_format, precision: str) -> Traffic:
    """The bytes that a training step on meta moves, in 'bf16' by autocast or in 'fp32', for images of a layout."""
    images = torch.empty(shape, device='meta').to(memory_format=layout)
    work = training_step(model, images, precision='fp32')
    with Traffic() as counted, CudaAutocast() if precision == 'bf16' else contextlib.nullcontext():
        work()
    return counted


# ---- Speed -----------------------------------------------------------------------------------------------------------

def create(name: str, **kwargs: Any) -> nn.Module:
    """timm's model; UserError with the nearest names for an unknown one."""
    if not timm.is_model(name):
        raise UserError(f'unknown model {name}{nearest(name, timm.list_models())}')
    return timm.create_model(name, **kwargs)


def build_form(model: nn.Module, form: str) -> nn.Module:
    """A copy of the model in a form: 'eager', or a sum of 'authors', 'fused', 'compiled' and 'channels_last'."""
    parts = set() if form == 'eager' else set(form.split('+'))
    if unknown := parts - set(FORMS):
        raise UserError(f'unknown form {", ".join(sorted(unknown))}: a form is eager or a sum of {", ".join(FORMS)}')
    if 'fused' in parts and model.training:
        raise UserError(f'{form}: a fused model has no norms to train; name it in --inference only')
    if parts & {'authors', 'fused'} and not isinstance(model, moganet.MogaNet):
        raise UserError(f'{form}: only a MogaNet has this form')
    model = as_authors(model) if 'authors' in parts else copy.deepcopy(model)
    if 'fused' in parts:
        model = moganet.fuse(model)
    model = model.to(memory_format=layout_of_form(form))
    return torch.compile(model) if 'compiled' in parts else model


def layout_of_form(form: str) -> torch.memory_format:
    """The memory layout of a form's weights and images."""
    return torch.channels_last if 'channels_last' in form else torch.contiguous_format


def _precision(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if precision == 'fp32' else autocast(device, precision)  # meta has no autocast


def training_step(model: nn.Module, images: torch.Tensor, *, precision: str) -> Callable[[], None]:
    """Forward pass, cross-entropy and backward pass on images [B, 3, H, W]; it waits for the device."""
    labels = torch.arange(len(images), device=images.device) % 1000

    def step() -> None:
        with _precision(images.device, precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()
        synchronize(images.device)
    return step


def inference_step(model: nn.Module, images: torch.Tensor, *, precision: str) -> Callable[[], None]:
    """Forward pass on images [B, 3, H, W]; it waits for the device."""
    def step() -> None:
        with torch.no_grad(), _precision(images.device, precision):
            model(images)
        synchronize(images.device)
    return step


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue; the CPU has none."""
    if device.type in ('cuda', 'mps'):
        getattr(torch, device.type).synchronize()


def measure_peak(device: torch.device, dtype: torch.dtype, *, rounds: int) -> tuple[float, float]:
    """(multiply-accumulates a second of a large matrix product, bytes a second of a large copy), medians."""
    side, length = (1024, 2**26) if device.type == 'cpu' else (8192, 2**30)
    matrix = torch.randn(side, side, device=device).to(dtype)
    source, target = (torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(2))

    def product() -> None:
        matrix @ matrix
        synchronize(device)

    def copied() -> None:
        target.copy_(source)
        synchronize(device)

    taken = alternate({'product': product, 'copy': copied}, rounds=rounds)
    return side**3 / taken['product']['seconds'], 2 * length / taken['copy']['seconds']


def measure(
    names: Sequence[str], *, batch_size: int = 16, input_size: int = 224, device: str = 'auto',
    precisions: Sequence[str] = ('fp32',), inference: Sequence[str] = ('eager', 'fused'),
    training: Sequence[str] = ('authors', 'eager'), rounds: int = 7,
) -> list[Row]:
    """Times forms of models (see `build_form`) on random images, alternated, at drop path 0.1.

    Returns:
        A row for each model, precision, mode and form: images a second; the speed-up over the first form of its mode,
        with its spread; GMACs an image, of which a training step has three times the forward pass's; MB an image, by
        our count or for a compiled form by the compiler's; and MACs and bytes a second as shares of what the device
        reaches in a matrix product and in a copy.
    """
    place = choose_device(device)
    rows = []
    for name in names:
        torch.manual_seed(0)
        model = create(name, drop_path_rate=0.1).to(place)
        macs = complexity(name, input_size)['macs']
        for precision in precisions:
            peak_macs, peak_bytes = measure_peak(place, AUTOCAST[precision] or torch.float32, rounds=rounds)
            for mode, forms in (('inference', inference), ('training', training)):
                model.train(mode == 'training')
                steps, moved = {}, {}
                for form in forms:
                    torch._dynamo.reset()
                    images = torch.randn(batch_size, 3, input_size, input_size, device=place)
                    images = images.to(memory_format=layout_of_form(form))
                    make = training_step if mode == 'training' else inference_step
                    steps[form] = make(build_form(model, form), images, precision=precision)
                    try:
                        if 'compiled' in form:
                            moved[form] = compiled_bytes(steps[form])
                        else:
                            with Traffic() as counted:
                                steps[form]()
                            moved[form] = counted.total()
                    except torch.OutOfMemoryError:
                        print(f'{name}, {precision}, {mode}, {form}: left out, as it does not fit at batch size '
                              f'{batch_size}', file=sys.stderr)
                        del steps[form]
                        torch.cuda.empty_cache()
                for form, taken in alternate(steps, rounds=rounds).items() if steps else ():
                    passes = 3 if mode == 'training' else 1
                    rows.append({
                        'model': name,
                        'precision': precision,
                        'mode': mode,
                        'form': form,
                        'images_per_second': round(batch_size / taken['seconds'], 1),
                        'speedup': taken['speedup'],
                        'gmacs': round(passes * macs / 1e9, 3),
                        'mb': round(moved[form] / batch_size / 1e6, 1),
                        'share_of_product': round(passes * macs * batch_size / taken['seconds'] / peak_macs, 3),
                        'share_of_copy': round(moved[form] / taken['seconds'] / peak_bytes, 3),
                    })
    return rows
