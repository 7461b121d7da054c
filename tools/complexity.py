"""Counts parameters and multiply-accumulates (MACs) of timm models, and of detectors and segmentors by their recipes.

    python tools/complexity.py [moganet_small retinanet_moganet_small_1x ...] [--sizes 224 256] [--json]

A detector is counted at 1280 x 800 and a segmentor at 2048 x 512, where the papers count them, up to the heads' last
maps.

The models run on torch's meta device, where nothing is computed: XL takes seconds, and no memory for its weights.
"""
import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from recipes import RECIPES
from recipes.dense import Dense
from utils import UserError, nearest, run_cli


def _norm_flops(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * 2 * math.prod(shape)  # the scale and the shift: fvcore counts each element of an evaluation BN as two


def _pool_flops(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(shape)  # fvcore counts one an element


def build(name: str) -> tuple[nn.Module, Callable[[torch.Tensor], Any]]:
    """The model of a timm name or of a dense recipe, without values, and its pass over images. Raises UserError."""
    if isinstance(RECIPES.get(name), Dense):
        with torch.device('meta'):
            model = models.create_dense(name)
        return model, model.outputs
    if not timm.is_model(name):
        raise UserError(f'unknown model {name}{nearest(name, timm.list_models())}')
    model = timm.create_model(name, device='meta')
    return model, model


def complexity(name: str, size: int | tuple[int, int]) -> dict[str, Any]:
    """Counts of timm model or dense recipe `name` in evaluation mode for one image [3, size, size], or [3, *size].

    Returns:
        {'model', 'size', 'parameters': exact, 'macs': counted as fvcore's FlopCountAnalysis does, that is convolutions
        and matrix products, batch norms and average pooling, 'conv_macs': convolutions and matrix products alone}.

    Raises:
        UserError: timm knows no such model, or it does not take images of that size.
    """
    model, forward = build(name)
    model.eval().requires_grad_(False)
    height, width = size if isinstance(size, tuple) else (size, size)
    aten = torch.ops.aten
    # An overload without an entry of its own is decomposed before it is counted (torch 2.14: the norm, into nothing)
    counter = FlopCounterMode(display=False, custom_mapping={
        aten.native_batch_norm: _norm_flops, aten.native_batch_norm.default: _norm_flops, aten.mean: _pool_flops})
    try:
        with counter:
            forward(torch.empty(1, 3, height, width, device='meta'))
    except (AssertionError, RuntimeError) as error:
        raise UserError(f'{name} does not take images of {height}x{width} ({error}): give other --sizes') from error
    flops = counter.get_flop_counts()['Global']
    elementwise = flops.get(aten.native_batch_norm, 0) + flops.get(aten.mean, 0)
    return {
        'model': name,
        'size': size if height == width else [height, width],
        'parameters': sum(p.numel() for p in model.parameters()),
        'macs': sum(flops.values()) // 2,
        'conv_macs': (sum(flops.values()) - elementwise) // 2,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME',
                        help='timm models, or recipes of detectors and segmentors (default: the six MogaNets)')
    parser.add_argument('--sizes', nargs='+', type=int, metavar='N', help='sides of square images in pixels')
    parser.add_argument('--json', action='store_true', help='print a JSON list in place of the table')
    args = parser.parse_args(argv)
    names = args.names or timm.list_models(module='moganet')
    rows = [complexity(name, size) for name in names for size in args.sizes or (
        [RECIPES[name].count_size()] if isinstance(RECIPES.get(name), Dense) else [224, 256])]
    rows.sort(key=lambda row: row['parameters'])
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    width = max(20, *(len(row['model']) for row in rows))
    print(f'{"model":<{width}} {"size":>8} {"parameters":>13} {"GMACs":>8} {"convolutions":>13}')
    for row in rows:
        size = row['size'] if isinstance(row['size'], int) else f'{row["size"][1]}x{row["size"][0]}'
        print(f'{row["model"]:<{width}} {size:>8} {row["parameters"]:>13,} {row["macs"] / 1e9:>8.3f} '
              f'{row["conv_macs"] / 1e9:>13.3f}')


if __name__ == '__main__':
    run_cli(main)
