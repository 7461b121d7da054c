"""Measures which kernel wins for a model's depthwise convolutions, by precision and layout; two minutes on a GPU."""
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from engine import AUTOCAST
from tools.alternation import Row, alternate
from tools.benchmark_model import create, measure_peak, synchronize
from utils import choose_device

# Layout, and whether cuDNN may be used; torch chooses between it and its own kernels by shape and layout
FORMS = {'NHWC': (torch.channels_last, True), 'NHWC native': (torch.channels_last, False),
         'NCHW': (torch.contiguous_format, True), 'NCHW native': (torch.contiguous_format, False)}
CALLS = 5  # of a kernel in a round, so that the wait at its end does not count


def shapes(name: str, *, input_size: int) -> list[tuple[int, int, int, int]]:
    """(channels, kernel, dilation, side of the map) of each kind of depthwise convolution in a model."""
    found: dict[tuple[int, int, int, int], None] = {}

    def note(conv: nn.Conv2d, _: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found[conv.in_channels, conv.kernel_size[0], conv.dilation[0], output.shape[-1]] = None

    with torch.device('meta'), torch.no_grad():
        model = create(name).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and module.stride == (1, 1):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, input_size, input_size))
    return list(found)


def passes(shape: tuple[int, int, int, int], form: str, *, batch_size: int, dtype: torch.dtype,
           device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """The forward and the backward pass of a convolution in a form, several calls each; they wait for the device."""
    channels, kernel, dilation, side = shape
    layout, cudnn = FORMS[form]
    x = torch.randn(batch_size, channels, side, side, device=device).to(dtype, memory_format=layout).requires_grad_()
    weight = torch.randn(channels, 1, kernel, kernel, device=device).to(dtype).requires_grad_()
    run = functools.partial(F.conv2d, x, weight, padding=dilation * (kernel // 2), dilation=dilation, groups=channels)
    with torch.backends.cudnn.flags(enabled=cudnn, benchmark=True):
        output = run()
    gradient = torch.ones_like(output)

    def several(work: Callable[[], object]) -> None:
        with torch.backends.cudnn.flags(enabled=cudnn, benchmark=True):
            for _ in range(CALLS):
                work()
            synchronize(device)

    return (functools.partial(several, run), functools.partial(
        several, lambda: torch.autograd.grad(output, (x, weight), gradient, retain_graph=True)))


def measure(name: str = 'moganet_small', *, batch_size: int = 128, input_size: int = 224, device: str = 'auto',
            precisions: Sequence[str] = ('fp32', 'fp16', 'bf16'), rounds: int = 3) -> list[Row]:
    """Times every kind of depthwise convolution of a model in each form, alternated.

    Returns:
        A row for each convolution and precision: GB/s, 'forward / backward', of the tensors that must move (two, and
        four) by form, 'no kernel' where there is none; the 'best' by the sum of both; and what a large 'copy' reaches.
    """
    place, rows = choose_device(device), []
    for precision in precisions:
        dtype = AUTOCAST[precision] or torch.float32
        copy = measure_peak(place, dtype, rounds=rounds)[1]
        for shape in shapes(name, input_size=input_size):
            contenders, cells = {}, {}
            for form in FORMS if place.type == 'cuda' else ('NHWC', 'NCHW'):
                try:
                    both = passes(shape, form, batch_size=batch_size, dtype=dtype, device=place)
                    for work in both:
                        work()
                    contenders |= {(form, i): work for i, work in enumerate(both)}
                except RuntimeError:
                    cells[form] = 'no kernel'
            taken = {key: value['seconds'] / CALLS for key, value in alternate(contenders, rounds=rounds).items()}
            channels, kernel, dilation, side = shape
            moved = batch_size * channels * side * side * dtype.itemsize / 1e9
            sums = {form: taken[form, 0] + taken[form, 1] for form, i in taken if i == 0}
            cells |= {form: f'{2 * moved / taken[form, 0]:.0f} / {4 * moved / taken[form, 1]:.0f}' for form in sums}
            rows.append({'convolution': f'{kernel}x{kernel} d{dilation}, {channels}x{side}x{side}',
                         'precision': precision, **cells, 'best': min(sums, key=sums.get), 'copy': f'{copy / 1e9:.0f}'})
    return rows
