"""Figures recorded from the authors' detectors under mmdet 2.26 and segmentors under mmseg 0.29 (tests/data/dense), and
their weights and images.

The files are those of the recording, whole: `retinanet.*`, `mask_rcnn.*`, `upernet.*` and so on are a model each with
seed 0 (maps, predictions, losses, norms of gradients), `units.*` the parts of all detectors (anchors, coder, assigners,
NMS, losses), `init.json.gz` fresh weights and `state_dict_shapes.json.gz` the names and shapes of the released files.
They were recorded on the CPU in float32, with torch 1.13.
"""
import gzip
import json
import math

import numpy as np
import torch

import reference

DATA = reference.DATA / 'dense'
# Gain of the output layers' weights, shift of their biases; of `fc_cls`, of the last one alone, the background's
OUTPUTS = {'retina_cls': (0.6, -4.5), 'retina_reg': (0.2, 0.0), 'rpn_cls': (0.5, 0.0), 'rpn_reg': (0.2, 0.0),
           'fc_cls': (0.8, 2.0), 'fc_reg': (0.7, 0.0), 'conv_logits': (1.5, 0.0), 'conv_seg': (0.6, 0.0)}


def load(name: str) -> dict[str, object]:
    """The arrays of NAME.npz, where there is one, and the values of NAME.json.gz."""
    values = json.loads(gzip.decompress((DATA / f'{name}.json.gz').read_bytes()))
    arrays = DATA / f'{name}.npz'
    if arrays.exists():
        values |= {key: torch.from_numpy(value) for key, value in np.load(arrays).items()}
    return values


def seeded_state_dict(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights of the recording: a backbone's are the classifier's; elsewhere weights are larger by sqrt(2)."""
    state = {}
    for name, shape in shapes.items():
        value = reference.seeded_entries({name.removeprefix('backbone.'): shape}).popitem()[1]
        if not name.startswith('backbone.'):
            gain, shift = OUTPUTS.get(name.split('.')[-2], (1.0, 0.0))
            if name.endswith('weight'):
                value = value * float(np.float32(math.sqrt(2) * gain))
            elif name.endswith('bias'):
                value[-1 if name.endswith('fc_cls.bias') else slice(None)] += shift
        state[name] = value
    return state


def images(*shape: int, seed: int = 0, valid: list[list[int]] | None = None) -> torch.Tensor:
    """Images [B, 3, H, W] of noise in blocks of five sizes, zero outside the first (h, w) of each of `valid`."""
    total = np.zeros(shape)
    for block in (1, 4, 16, 48, 128):
        rows, columns = -(-shape[2] // block), -(-shape[3] // block)
        noise = reference._rng(f'dense{shape}/{block}', seed).normal(0.0, 1.0, (*shape[:2], rows, columns))
        total += noise.repeat(block, 2).repeat(block, 3)[:, :, :shape[2], :shape[3]]
    total /= np.sqrt(5.0)
    for image, (height, width) in zip(total, valid or [], strict=False):
        image[:, height:] = 0.0
        image[:, :, width:] = 0.0
    return torch.from_numpy(total).float()


def sample(values: torch.Tensor, count: int) -> torch.Tensor:
    """`count` evenly spaced entries of the flattened tensor."""
    count = min(count, values.numel())
    return values.flatten()[torch.arange(count) * values.numel() // count]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, or the first norm where the second is 0."""
    difference, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (difference / norm if norm else difference).item()


def compare_gradients(recorded: dict[str, float], model: torch.nn.Module, tolerance: float) -> None:
    """Norms above 1e-4 of the largest within the relative tolerance, the others within 1e-6 of the largest.

    The small ones are round-off: a bias in front of a BN in training mode has a gradient of 0.
    """
    largest, parameters = max(recorded.values()), dict(model.named_parameters())
    assert parameters.keys() == recorded.keys()
    for name, parameter in parameters.items():
        norm = 0.0 if parameter.grad is None else parameter.grad.double().norm().item()
        allowed = tolerance * recorded[name] if recorded[name] > 1e-4 * largest else 1e-6 * largest
        assert abs(norm - recorded[name]) <= allowed, (name, norm, recorded[name])
