"""Figures recorded from the authors' implementation (tests/data), and the weights and inputs they belong to.

Every array is drawn from NumPy's PCG64 keyed by (seed, crc32 of a name), so it depends neither on the order of a state
dict nor on torch's generators. `logits.npz` holds, for seed 0 in evaluation mode, `<variant>/<size>` [2, 1000],
`<variant>/224/double_gate` and `<variant>/96x128/stage<i>_mean`; `train_steps_moganet_xtiny.json.gz` three steps.
"""
import functools
import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parent / 'data'
LOGITS = np.load(DATA / 'logits.npz')


def load_json(name: str) -> dict[str, Any]:
    """The content of a gzipped JSON file of tests/data."""
    return json.loads(gzip.decompress((DATA / name).read_bytes()))


@functools.cache
def shapes() -> dict[str, dict[str, list[int]]]:
    """{variant: {state-dict name: shape}} for the six variants, in state-dict order."""
    return load_json('state_dict_shapes.json.gz')


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _entry(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """One state-dict entry, with scales and variances wide enough for every branch to show in the logits."""
    rng, kind = _rng(name, seed), name.rpartition('.')[2]
    if kind == 'num_batches_tracked':
        return torch.tensor(100)
    if kind == 'running_var':
        array = rng.uniform(1.0, 3.0, shape)
    elif kind == 'running_mean':
        array = rng.normal(0.0, 0.1, shape)
    elif kind.startswith('layer_scale'):
        array = rng.uniform(0.05, 0.15, shape)
    elif kind == 'scale':
        array = rng.uniform(-0.3, 0.3, shape)
    elif len(shape) > 1:
        array = rng.normal(0.0, math.prod(shape[1:]) ** -0.5, shape)
    elif kind == 'weight':
        array = rng.uniform(0.7, 1.3, shape)
    else:
        array = rng.normal(0.0, 0.05, shape)
    return torch.from_numpy(array).float()


def seeded_state_dict(variant: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The whole state dict of a variant with 1000 classes, float32."""
    return seeded_entries(shapes()[variant], seed)


def seeded_entries(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of any MogaNet, from its names and shapes."""
    return {name: _entry(name, shape, seed) for name, shape in shapes.items()}


def seeded_images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normalised images [B, 3, H, W], float32, standard normal."""
    return torch.from_numpy(_rng(f'images{shape}', seed).normal(0.0, 1.0, shape)).float()


def seeded_labels(count: int, num_classes: int = 1000, seed: int = 0) -> torch.Tensor:
    """Class indices [count], int64."""
    return torch.from_numpy(_rng(f'labels{count}', seed).integers(0, num_classes, count))


def relative_error(actual: torch.Tensor, expected: torch.Tensor | np.ndarray) -> float:
    """||actual - expected|| / ||expected||."""
    expected = torch.as_tensor(expected)
    return ((actual - expected).norm() / expected.norm()).item()
