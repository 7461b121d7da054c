"""Bytes moved and kernels launched by what is run within, on any device, also one without values."""
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts, by operator, kernels launched and bytes of their tensors, each read or written once.

    A view launches nothing; an expanded tensor counts as the memory behind it; an allocation alone moves nothing, and
    a tensor without values (`FakeTensorMode`) that is asked for its device neither. What a kernel reads twice, or keeps
    in scratch memory, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in ('detach', '_unsafe_view') or func.namespace == 'prim' or 'empty' in name):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
            self.bytes[name] += sum(map(_bytes, tensors.values()))
            self.kernels[name] += 1
        return out


def _bytes(tensor: torch.Tensor) -> int:
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
