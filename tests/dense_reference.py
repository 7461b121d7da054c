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
import pytest
import torch
from torch import nn

import models
import optim_factory
import reference
from recipes.dense import Dense

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


def fixed_permutation(count: int) -> torch.Tensor:
    """Stands for `torch.randperm(count)`, as in the recording: a permutation that depends on the count alone."""
    keys = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return torch.from_numpy(np.argsort(keys, kind='stable'))


# Of each image that is detected: the size without padding, the original size and the seed
CASES = {'plain': ([256, 320], [256, 320], 0), 'padded': ([240, 300], [173, 217], 100)}


def image(tag: str) -> torch.Tensor:
    """The image [1, 3, 256, 320] of a case."""
    size, _, seed = CASES[tag]
    return images(1, 3, 256, 320, seed=seed, valid=[size])


# ---- Comparisons ----------------------------------------------------------------------------------------------------

Recorded = dict[str, object]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, or the first norm where the second is 0."""
    difference, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (difference / norm if norm else difference).item()


def compare_fresh(model: nn.Module, recorded: dict[str, list[float]], count: int) -> None:
    """Holds `count` fresh parameters outside the backbone to [mean, std, largest, number] of one recorded draw each."""
    state = {name: value.detach().double() for name, value in model.named_parameters()
             if not name.startswith('backbone.')}
    assert state.keys() == recorded.keys() and len(recorded) == count
    for name, (mean, std, largest, number) in recorded.items():
        value = state[name]
        assert value.numel() == number
        # Two draws of n: means differ by std * sqrt(2 / n), standard deviations by less; 5 such are one in a million
        assert value.mean().item() == pytest.approx(mean, abs=1e-3 * abs(mean) + 5 * std * math.sqrt(2 / number)), name
        assert value.std().item() == pytest.approx(std, rel=max(0.03, 5 / math.sqrt(2 * number)), abs=1e-6), name
        # Of a uniform distribution the largest is the bound, 1.73 times the std; of a normal one it varies by a fifth
        uniform = number > 1000 and largest < 1.8 * std
        assert value.abs().max().item() == pytest.approx(largest, rel=0.01 if uniform else 0.3), name


def compare_map(recorded: Recorded, key: str, actual: torch.Tensor, count: int) -> None:
    """Holds a map to its recorded shape, where there is one, its norm and mean, and `count` of its values."""
    if key in recorded['shapes']:
        assert list(actual.shape) == recorded['shapes'][key]
    # Float32 sums in another order, through 40 to 100 layers: 1e-5; measured 1.2e-6
    assert relative(sample(actual, count), recorded[f'{key}/sample']) <= 1e-5, key
    norm, mean = recorded[f'{key}/stat'].tolist()
    assert actual.double().norm().item() == pytest.approx(norm, rel=1e-5), key
    assert actual.mean().item() == pytest.approx(mean, abs=1e-5 * norm / math.sqrt(actual.numel())), key


def compare_losses(recorded: Recorded, tag: str, losses: dict[str, torch.Tensor], *, loose: float = 1e-5) -> None:
    """Holds the named losses, and their sum, to the recorded ones, of which some are lists by level.

    Two runs of the original differ by 2e-6 under round-off of the images: 1e-5; `loose` of those of boxes that were
    sampled by their position in a list of nearly equal scores.
    """
    expected = {name: sum(value) if isinstance(value, list) else value
                for name, value in recorded[f'{tag}/losses'].items() if 'loss' in name}
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        allowed = 1e-5 if 'rpn' in name else loose
        assert value.item() == pytest.approx(expected[name], rel=allowed), name
    assert sum(losses.values()).item() == pytest.approx(recorded[f'{tag}/total'], rel=loose)


def compare_gradients(recorded: dict[str, float], model: nn.Module, tolerance: float, *, floor: float = 1e-6) -> None:
    """Norms above 1e-4 of the largest within the relative tolerance, the others within `floor` of the largest.

    The small ones are round-off: a bias in front of a BN in training mode has a gradient of 0.
    """
    largest, parameters = max(recorded.values()), dict(model.named_parameters())
    assert parameters.keys() == recorded.keys()
    for name, parameter in parameters.items():
        norm = 0.0 if parameter.grad is None else parameter.grad.double().norm().item()
        allowed = tolerance * recorded[name] if recorded[name] > 1e-4 * largest else floor * largest
        assert abs(norm - recorded[name]) <= allowed, (name, norm, recorded[name])


def compare_statistics(recorded: Recorded, tag: str, model: nn.Module, count: int, *, loose: float = 1e-5) -> None:
    """Holds the statistics of `count` batch norms after a step; `loose` of those in heads, see `compare_losses`."""
    state = model.state_dict()
    for kind in ('mean', 'var'):
        expected = recorded[f'{tag}/running_{kind}_norm']
        assert len(expected) == count
        for name, norm in expected.items():
            allowed = 1e-5 if name.startswith('backbone.') else loose
            assert state[name].norm().item() == pytest.approx(norm, rel=allowed), name


def compare_optimizer(row: Dense, *, file: str, schedule: str | None) -> None:
    """Holds a row's parameter groups to those recorded of the authors' config, where they are, and its rates.

    Args:
        file: stem of the released file, which is the config's.
        schedule: name of the recorded schedule; None where there is none.
    """
    optim = reference.load_json('dense_optim.json.gz')
    if schedule:
        recorded, ours = optim['schedule'][schedule], optim_factory.schedule_of(row, updates_per_epoch=7330)
        assert ours.total_updates == recorded['max_iterations']
        for update, rates in recorded['lr'].items():  # of the group with the full rate; the row's own rate may be half
            rate = optim_factory.learning_rate(int(update), schedule=ours) / row.lr
            assert rate == pytest.approx(max(rates) / max(recorded['base_lr']), rel=1e-11), update
    if recorded := optim['groups'].get(file):
        with torch.device('meta'):
            optimizer = optim_factory.create_optimizer(models.create_dense(row.name), row)
        found = {name: (group['lr_scale'], group['weight_decay'])
                 for group in optimizer.param_groups for name in group['names']}
        assert found.keys() == recorded['parameters'].keys()
        for name, (number, _) in recorded['parameters'].items():
            assert found[name] == pytest.approx(tuple(recorded['kinds'][number]), rel=1e-8)  # written with 9 digits
