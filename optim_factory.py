"""Parameter groups, layer-wise learning-rate decay, the optimizer, the schedules, and the moving average."""
import copy
import math
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from recipes import Recipe
from utils import UserError

# The blocks are merged into at most so many groups for layer-wise decay: with one level a block, L's stem would learn
# at 0.8^59 = 2e-6 of the rate; with 12 groups, the stem's share at 0.7 is 0.7^13 = 0.0097.
MAX_BLOCK_GROUPS = 12


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The level of every parameter for layer-wise decay: 0 the stem, 1..12 the blocks in order, the highest the head.

    The order comes from the model's own `group_matcher` (timm's convention); consecutive blocks are merged into groups
    of nearly equal size.

    Raises:
        UserError: where the model does not name its layers.
    """
    fine = _levels(model, coarse=False, refusal='--layer_decay: {} does not name its layers; give 1')
    head = max(fine.values())
    blocks = head - 1
    groups = min(blocks, MAX_BLOCK_GROUPS)

    def merged(layer: int) -> int:
        if layer == 0:
            return 0
        return groups + 1 if layer == head else 1 + (layer - 1) * groups // blocks

    return {name: merged(layer) for name, layer in fine.items()}


def _levels(model: nn.Module, *, coarse: bool, refusal: str) -> dict[str, int]:
    """The level of every parameter by the model's `group_matcher`: layers, or with `coarse` stages.

    Raises:
        UserError: `refusal`, with the model's name, where it has none of the kind.
    """
    try:
        return group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    except Exception as error:  # a model without, or for layers alone, which timm's say by various errors
        raise UserError(refusal.format(type(model).__name__)) from error


def freeze(model: nn.Module, *, stages: int = 0, linear_probe: bool = False) -> None:
    """Takes the gradient from a model's stem and first stages, or from all but its classifier.

    The stages are those of the model's own `group_matcher`. `engine.train_mode` keeps what is frozen in evaluation
    mode, so that its BN statistics stay too.

    Raises:
        UserError: where the model has no such stages, or nothing would be left to train.
    """
    kept = set(model.state_dict())
    if linear_probe:
        heads = model.get_classifier()  # of distilled models, two
        heads = heads if isinstance(heads, (tuple, list)) else (heads,)
        classifier = {id(param) for head in heads for param in head.parameters()}
        kept = {name for name, param in model.named_parameters() if id(param) in classifier}
    elif stages:
        level = _levels(model, coarse=True, refusal='--freeze_stages: {} does not name its stages; use --linear_probe')
        if stages >= max(level.values()):
            raise UserError(f'--freeze_stages {stages}: {type(model).__name__} has {max(level.values()) - 1} stages')
        kept = {name for name in level if level[name] > stages}
    for name, param in model.named_parameters():
        param.requires_grad_(name in kept)


def create_param_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters by weight decay and by level.

    Biases, normalisations (every parameter of at most one dimension) and what the model names in `no_weight_decay()`
    (MogaNet: layer scales and sigma scales) are not decayed. The rate of level i is `layer_decay ** (levels - 1 - i)`
    of the head's (Clark et al., ELECTRA, arXiv 2003.10555).

    Args:
        model: a timm model; one with a `group_matcher` where `layer_decay` is below 1.
        weight_decay: decay of the decayed parameters.
        layer_decay: factor from one level to the one below; 1 is none.

    Returns:
        Groups from the stem to the head, each with `params`, `names`, `weight_decay`, `decayed` and `lr_scale`. Every
        trainable parameter is in exactly one.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, 'no_weight_decay') else set()
    level = layer_ids(model) if layer_decay != 1.0 else {}
    top = max(level.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        decayed = param.ndim > 1 and name not in exempt
        key = (level.get(name, top), decayed)
        group = groups.setdefault(key, {
            'params': [], 'names': [], 'weight_decay': weight_decay if decayed else 0.0, 'decayed': decayed,
            'lr_scale': layer_decay ** (top - key[0])})
        group['params'].append(param)
        group['names'].append(name)
    return [groups[key] for key in sorted(groups)]


def describe_param_groups(groups: list[dict[str, Any]]) -> str:
    """The groups as a table of text: scale, decay, parameters, and the first and last name of each."""
    lines = [f'{"lr scale":>9}  {"decay":>7}  {"tensors":>7}  {"parameters":>11}  names']
    for group in groups:
        size = sum(param.numel() for param in group['params'])
        first, last = group['names'][0], group['names'][-1]
        names = first if first == last else f'{first} ... {last}'
        lines.append(f'{group["lr_scale"]:9.4f}  {group["weight_decay"]:7g}  {len(group["params"]):7d}  '
                     f'{size:11,d}  {names}')
    return '\n'.join(lines)


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over `create_param_groups`; torch's fused kernel for AdamW and SGD.

    The fused kernel takes the loss scaler's overflow flag on the device, so that no fp16 step waits for the host.
    timm's LAMB has none: under fp16 the scaler reads the flag once an update.
    """
    groups = create_param_groups(model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
    arguments = {
        'adamw': {'eps': recipe.opt_eps, 'betas': recipe.opt_betas, 'fused': True},
        'lamb': {'eps': recipe.opt_eps, 'betas': recipe.opt_betas},
        'sgd': {'fused': True},
    }[recipe.opt]
    return create_optimizer_v2(groups, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay,
                               momentum=recipe.momentum, **arguments)


def cosine(update: int, *, start: float, end: float, first: int, total: int) -> float:
    """A half cosine from `start` at update `first` to exactly `end` at update `total - 1`."""
    span = total - 1 - first
    weight = 0.5 * (1 + math.cos(math.pi * min((update - first) / span, 1.0))) if span > 0 else 0.0
    return start * weight + end * (1 - weight)


def learning_rate(update: int, *, lr: float, min_lr: float, warmup_updates: int, total_updates: int) -> float:
    """The learning rate of an update: linear warm-up from lr / warmup_updates to `lr`, then a cosine to `min_lr`.

    Args:
        update: 0 for the first update of the run.
        lr: peak rate, reached exactly at update `warmup_updates - 1` (at 0 without warm-up).
        min_lr: rate of update `total_updates - 1`, exactly.
        warmup_updates: length of the warm-up.
        total_updates: length of the run.
    """
    if update < warmup_updates:
        return lr * ((update + 1) / warmup_updates)
    return cosine(update, start=lr, end=min_lr, first=max(warmup_updates - 1, 0), total=total_updates)


def set_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, *, update: int, updates_per_epoch: int) -> float:
    """Sets every group's learning rate and weight decay for an update. Returns the unscaled learning rate."""
    total = recipe.epochs * updates_per_epoch
    warmup = recipe.warmup_steps
    if warmup is None:
        warmup = round(recipe.warmup_epochs * updates_per_epoch)
    lr = learning_rate(update, lr=recipe.lr, min_lr=recipe.min_lr, warmup_updates=warmup, total_updates=total)
    decay = recipe.weight_decay
    if recipe.weight_decay_end is not None:
        decay = cosine(update, start=decay, end=recipe.weight_decay_end, first=0, total=total)
    for group in optimizer.param_groups:
        group['lr'] = lr * group['lr_scale']
        if group['decayed']:
            group['weight_decay'] = decay
    return lr


class ModelEma:
    """Exponential moving average of a model: `ema += (1 - decay) * (model - ema)` after every update.

    Floating-point buffers (BN statistics) are averaged with the parameters, integer ones copied. One fused
    `torch._foreach_lerp_` over all tensors: timm's ModelEmaV3 walks the state dict and took 13 ms for XT on our CPU,
    where this takes 2 ms.

    Attributes:
        module: the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool = False, device: torch.device | None = None):
        """
        Args:
            model: the model to follow, on its device and in its memory format; before any wrapper.
            decay: decay per update.
            warmup: let the decay of update t be min(decay, (1 + t) / (10 + t)).
            device: where the average lives; the model's device by default. Another one waits for the device each
                update.
        """
        self.module = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        self.decay, self.warmup = decay, warmup
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._averages, self._values = [list(side) for side in zip(*averaged, strict=True)]
        self._copies, self._originals = [list(side) for side in zip(*copied, strict=True)] if copied else ([], [])

    @torch.no_grad()
    def update(self, update: int, *, skipped: torch.Tensor | None = None) -> None:
        """Averages the model in after update number `update` (from 0).

        Args:
            update: number of the update, for the warm-up.
            skipped: 0-dimensional flag on the device, 1.0 where the loss scaler skipped the update: nothing changes.
        """
        decay = min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
        device = self._averages[0].device
        values = [value.to(device) for value in self._values]
        if skipped is None:
            torch._foreach_lerp_(self._averages, values, 1 - decay)
        else:
            change = torch._foreach_sub(values, self._averages)
            torch._foreach_mul_(change, (1 - decay) * (1 - skipped.to(device)))
            torch._foreach_add_(self._averages, change)
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)
