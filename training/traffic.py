"""Bytes moved and kernels launched by what is run within, on any device, also one without values."""
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts, by operator, kernels launched and bytes of their tensors, each read or written once.

    A view launches nothing; an expanded tensor counts as the memory behind it; an allocation alone moves nothing,
    nor a question for a tensor's device, which tensors without values ask.

    Beside that, what CUDA's eager kernels do within an operator, for tensors there, on meta, or `as_cuda` anywhere: a
    convolution's bias is a pass of its own over the output, and its gradient one over the gradient; the gradient is
    read for that of the input and for that of the weight; a norm reads its input twice; and what is not dense in the
    layout of the convolution is copied first. The launches were listed by operator, under a driver that runs no kernel.

    Attributes:
        bytes, kernels: by operator.
        hidden: bytes within operators, by their reason.
        launches: kernels within operators beyond the first, by their reason.
    """

    def __init__(self, *, as_cuda: bool = False) -> None:
        """
        Args:
            as_cuda: count what CUDA's kernels would do for tensors of any device.
        """
        super().__init__()
        self._devices = None if as_cuda else ('cuda', 'meta')
        self.bytes: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.hidden: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in ('detach', '_unsafe_view') or func.namespace == 'prim' or 'empty' in name):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
            self.bytes[name] += sum(map(_bytes, tensors.values()))
            self.kernels[name] += 1
            if name in HIDDEN and (self._devices is None or next(iter(tensors.values())).device.type in self._devices):
                out = HIDDEN[name](self, args, out)
        return out

    def total(self) -> int:
        """All bytes, those within operators too."""
        return self.bytes.total() + self.hidden.total()

    def _add(self, reason: str, *tensors: torch.Tensor, times: int = 1, launches: int = 1) -> None:
        self.hidden[reason] += times * sum(map(_bytes, tensors))
        self.launches[reason] += launches

    def _dense(self, tensor: torch.Tensor, layout: torch.memory_format, *, copies: int = 1) -> None:
        """Counts the copies of a tensor into a layout, where it is in another or a part of a wider one."""
        if not tensor.is_contiguous(memory_format=layout):
            self._add('copies', tensor, times=2 * copies, launches=copies)

    def _convolution(self, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        images, weight, bias = args[:3]
        layout = layout_of(images, weight)
        if bias is not None:
            self._add('biases', out, times=2)
        # Into one channel cuDNN has no kernel for channels-last: it is taken to rewrite the images, unseen by torch
        self._dense(images, torch.contiguous_format if weight.shape[0] == 1 else layout)
        return _laid_out(out, layout)

    def _convolution_backward(self, args: tuple[Any, ...], out: Sequence[Any]) -> tuple[Any, ...]:
        gradient, images, weight, (of_images, _, of_bias) = *args[:3], args[10]
        layout = layout_of(images, weight)
        if of_bias:
            self._add('biases', gradient)
        if of_images:
            self._add('gradients read twice', gradient)
            self._dense(images, layout)
            # A part of a wider one, as of a depthwise convolution's, is copied for each of the two gradients
            self._dense(gradient, layout, copies=2 if layout_of(gradient) is layout else 1)
        return (_laid_out(out[0], layout), *out[1:])

    def _norm(self, args: tuple[Any, ...], out: Any) -> Any:
        self._add('norms', args[0])
        return out

    def _norm_backward(self, args: tuple[Any, ...], out: Any) -> Any:
        self._add('norms', *args[:2])
        return out


HIDDEN: dict[str, Callable[..., Any]] = {
    'convolution': Traffic._convolution, 'convolution_backward': Traffic._convolution_backward,
    **dict.fromkeys(('native_batch_norm', 'cudnn_batch_norm'), Traffic._norm),
    **dict.fromkeys(('native_batch_norm_backward', 'cudnn_batch_norm_backward'), Traffic._norm_backward)}


def layout_of(*tensors: torch.Tensor) -> torch.memory_format:
    """The layout in which CUDA computes a convolution of tensors: channels-last where the strides of one say so."""
    def channels_last(tensor: torch.Tensor) -> bool:
        low = 0
        for dim in (1, 3, 2, 0):  # as c10's is_channels_last_strides_2d
            if tensor.stride(dim) < low or (dim == 0 and low == tensor.stride(1)):
                return False
            low = tensor.stride(dim) * max(tensor.shape[dim], 1)
        return tensor.stride(1) != 0
    return torch.channels_last if any(map(channels_last, tensors)) else torch.contiguous_format


def _laid_out(tensor: torch.Tensor | None, layout: torch.memory_format) -> torch.Tensor | None:
    """What an operator returns on CUDA: on meta it may be in another layout."""
    return tensor.contiguous(memory_format=layout) if tensor is not None and tensor.is_meta else tensor


def _bytes(tensor: torch.Tensor) -> int:
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
