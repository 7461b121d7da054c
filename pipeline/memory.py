"""Uninitialised tensors for batches: shared from the start in a worker, reused on the CPU."""
import math

import torch
from torch.utils.data import get_worker_info

_storages: list[torch.UntypedStorage] = []  # of earlier batches of this process


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU, in memory that no tensor uses any more where there is some.

    Fresh pages cost 0.5 ms per float image, ten times the arithmetic. In a worker, the memory is shared with the main
    process from the start, which saves a copy.
    """
    size = math.prod(shape) * dtype.itemsize
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(size)
    else:
        # One use is that of the list; tensors, views and what autograd saved each count one more
        free = [old for old in _storages if torch._C._storage_Use_Count(old._cdata) == 1]
        storage = next((old for old in free if old.nbytes() == size), None)
        if storage is None:
            _storages[:] = [old for old in _storages if old not in free[2:]]
            storage = torch.UntypedStorage(size)
            _storages.append(storage)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]  # its stub has no form without strides
