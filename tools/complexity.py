"""Parameters and multiply-accumulates (MACs) of the MogaNets, or of any timm models, as a table or as JSON.

    python tools/complexity.py [moganet_small ...] [--sizes 224 256] [--json]

Nothing is computed: the models run on torch's meta device, XL in seconds and without memory for its weights.
"""
import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401 (registers the MogaNets)
from utils import UserError, nearest, run_cli


def _norm_flops(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * 2 * math.prod(shape)  # the scale and the shift: fvcore counts each element of an evaluation BN as two


def _pool_flops(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(shape)  # fvcore: one an element


def complexity(name: str, size: int) -> dict[str, Any]:
    """Counts of timm model `name` in evaluation mode for one image [3, size, size].

    Returns:
        {'model', 'size', 'parameters': exact, 'macs': counted as fvcore's FlopCountAnalysis does, that is convolutions
        and matrix products, batch norms and average pooling, 'conv_macs': convolutions and matrix products alone}.

    Raises:
        UserError: timm knows no such model, or it does not take images of that size.
    """
    if not timm.is_model(name):
        raise UserError(f'unknown model {name}{nearest(name, timm.list_models())}')
    model = timm.create_model(name, device='meta').eval().requires_grad_(False)
    aten = torch.ops.aten
    # An overload without an entry of its own is decomposed before it is counted (torch 2.14: the norm, into nothing)
    counter = FlopCounterMode(display=False, custom_mapping={
        aten.native_batch_norm: _norm_flops, aten.native_batch_norm.default: _norm_flops, aten.mean: _pool_flops})
    try:
        with counter:
            model(torch.empty(1, 3, size, size, device='meta'))
    except (AssertionError, RuntimeError) as error:
        raise UserError(f'{name} does not take images of {size}x{size} ({error}): give other --sizes') from error
    flops = counter.get_flop_counts()['Global']
    elementwise = flops.get(aten.native_batch_norm, 0) + flops.get(aten.mean, 0)
    return {
        'model': name,
        'size': size,
        'parameters': sum(p.numel() for p in model.parameters()),
        'macs': sum(flops.values()) // 2,
        'conv_macs': (sum(flops.values()) - elementwise) // 2,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help='timm models (default: the six MogaNets)')
    parser.add_argument('--sizes', nargs='+', type=int, default=[224, 256], metavar='N', help='image sides in pixels')
    parser.add_argument('--json', action='store_true', help='a JSON list in place of the table')
    args = parser.parse_args(argv)
    names = args.names or timm.list_models(module='moganet')
    rows = [complexity(name, size) for name in names for size in args.sizes]
    rows.sort(key=lambda row: row['parameters'])
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f'{"model":<20} {"size":>5} {"parameters":>13} {"GMACs":>8} {"convolutions":>13}')
    for row in rows:
        print(f'{row["model"]:<20} {row["size"]:>5} {row["parameters"]:>13,} {row["macs"] / 1e9:>8.3f} '
              f'{row["conv_macs"] / 1e9:>13.3f}')


if __name__ == '__main__':
    run_cli(main)
