"""Parameter groups, layer-wise learning-rate decay, the optimizer, the schedules, and the moving average."""
import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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


def _our_exempt(model: nn.Module) -> set[str]:
    """Biases, normalisations (every parameter of at most one dimension) and the names of `no_weight_decay()`.

    MogaNet names its layer scales and sigma scales there.
    """
    named = set(model.no_weight_decay()) if hasattr(model, 'no_weight_decay') else set()
    return named | {name for name, param in model.named_parameters() if param.ndim <= 1}


def _authors_exempt(model: nn.Module) -> set[str]:
    """What has 'scale' or 'norm' in its name. Biases decay, and so do the stem's norms, which are named by number."""
    return {name for name, _ in model.named_parameters() if 'scale' in name or 'norm' in name}


def _authors_layers_exempt(model: nn.Module) -> set[str]:
    """Biases, and every parameter with a single dimension above 1, which the weight of `decompose` is too."""
    return {name for name, param in model.named_parameters()
            if name.endswith('.bias') or sum(size != 1 for size in param.shape) == 1}


def _authors_levels(model: nn.Module) -> dict[str, int]:
    """The authors' levels for detectors over MogaNet-B and L: 0 the stem, 13 the heads.

    Their oddities belong to the recorded results: no parameter has level 1, the embedding of stage 3 has a higher level
    than the stage's first blocks, and the norms after the stages learn as fast as the heads.

    Raises:
        UserError: where the model has no MogaNet's stages.
    """
    fixed = {'patch_embed1': 0, 'blocks1': 2, 'patch_embed2': 3, 'blocks2': 3, 'patch_embed3': 4, 'patch_embed4': 12,
             'blocks4': 12}
    levels = {}
    for name, _ in model.named_parameters():
        stage, block = re.match(r'(?:backbone\.)?([^.]*)\.?(\d*)', name).groups()
        levels[name] = min(3 + int(block) // 2, 11) if stage == 'blocks3' else fixed.get(stage, 13)
    if not set(levels.values()) - {13}:
        raise UserError(f"--layer_decay: {type(model).__name__} has no MogaNet's stages; give 1")
    return levels


class Rule(NamedTuple):
    """How a model's parameters are grouped."""
    exempt: Callable[[nn.Module], set[str]]  # the names that weight decay spares
    levels: Callable[[nn.Module], dict[str, int]] = layer_ids  # the level of every name, where there is layer decay


RULES: dict[str, Rule] = {
    'ours': Rule(_our_exempt),
    'authors': Rule(_authors_exempt),  # RetinaNet, Mask R-CNN, Cascade S and UPerNet
    'authors_layers': Rule(_authors_layers_exempt, _authors_levels),  # Cascade B and L
    'all': Rule(lambda model: set()),  # Semantic FPN: every parameter decays
}


def create_param_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0,
                        rule: str = 'ours') -> list[dict[str, Any]]:
    """Splits a model's trainable parameters by weight decay and by level, as a rule says.

    The rate of level i is `layer_decay ** (levels - 1 - i)` of the head's (Clark et al., ELECTRA, arXiv 2003.10555).

    Args:
        model: a timm model; one with a `group_matcher` where `layer_decay` is below 1.
        weight_decay: decay of the decayed parameters.
        layer_decay: factor from one level to the one below; 1 is none.
        rule: a name of `RULES`: which parameters are not decayed, and what the levels are.

    Returns:
        Groups from the stem to the head, each with `params`, `names`, `weight_decay`, `decayed` and `lr_scale`. Every
        trainable parameter is in exactly one.
    """
    exempt = RULES[rule].exempt(model)
    level = RULES[rule].levels(model) if layer_decay != 1.0 else {}
    top = max(level.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        decayed = name not in exempt
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
    groups = create_param_groups(model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
                                 rule=recipe.param_groups)
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


def poly(update: int, *, start: float, end: float, first: int, total: int, power: float) -> float:
    """From `start` at update `first` to `end` at update `total`, by a power of the updates that remain.

    The last update of a run, `total - 1`, stays above `end`, as in mmcv.
    """
    remaining = 1 - min((update - first) / max(total - first, 1), 1.0)
    return (start - end) * remaining ** power + end


def step(update: int, *, start: float, end: float, milestones: tuple[int, ...], gamma: float) -> float:
    """`start` times `gamma` for every milestone that the update has reached, never below `end`."""
    return max(start * gamma ** sum(update >= milestone for milestone in milestones), end)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate over a run: a linear warm-up, then a decay. Every length is in updates.

    Attributes:
        lr: the peak.
        total_updates: length of the run.
        kind: the decay, a function of this name.
        min_lr: where the decay ends; of 'step', what it does not go below.
        warmup_updates: length of the warm-up, 0 for none.
        warmup_ratio: None: from lr / warmup_updates at update 0 to exactly `lr` at update `warmup_updates - 1`, where
            the decay begins. A ratio (mmcv's rule): the decay begins at update 0, and the warm-up multiplies it, by
            the ratio at update 0 and by 1 from update `warmup_updates` on.
        milestones: of 'step', the updates from which `gamma` multiplies once more.
        gamma: of 'step'.
        power: of 'poly'.
    """
    lr: float
    total_updates: int
    kind: Literal['cosine', 'poly', 'step'] = 'cosine'
    min_lr: float = 0.0
    warmup_updates: int = 0
    warmup_ratio: float | None = None
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    power: float = 1.0


def learning_rate(update: int, *, schedule: Schedule) -> float:
    """The learning rate of an update, 0 for the first of the run, without any group's `lr_scale`."""
    warmup, ratio = schedule.warmup_updates, schedule.warmup_ratio
    if ratio is None and update < warmup:
        return schedule.lr * ((update + 1) / warmup)
    first = max(warmup - 1, 0) if ratio is None else 0
    lr, min_lr, total = schedule.lr, schedule.min_lr, schedule.total_updates
    match schedule.kind:
        case 'cosine':
            rate = cosine(update, start=lr, end=min_lr, first=first, total=total)
        case 'poly':
            rate = poly(update, start=lr, end=min_lr, first=first, total=total, power=schedule.power)
        case 'step':
            rate = step(update, start=lr, end=min_lr, milestones=schedule.milestones, gamma=schedule.gamma)
        case _:
            raise ValueError(f'no schedule {schedule.kind!r}')
    if ratio is not None and update < warmup:
        rate *= 1 - (1 - update / warmup) * (1 - ratio)
    return rate


def schedule_of(recipe: Recipe, *, updates_per_epoch: int) -> Schedule:
    """A recipe's schedule, with its epochs turned into updates."""
    warmup = recipe.warmup_steps
    if warmup is None:
        warmup = round(recipe.warmup_epochs * updates_per_epoch)
    unit = updates_per_epoch if recipe.updates is None else 1
    return Schedule(lr=recipe.lr, min_lr=recipe.min_lr, kind=recipe.sched, warmup_updates=warmup,
                    warmup_ratio=recipe.warmup_ratio, total_updates=recipe.total_updates(updates_per_epoch),
                    milestones=tuple(round(unit * milestone) for milestone in recipe.milestones), gamma=recipe.gamma,
                    power=recipe.power)


def set_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, *, update: int, updates_per_epoch: int) -> float:
    """Sets every group's learning rate and weight decay for an update. Returns the unscaled learning rate."""
    schedule = schedule_of(recipe, updates_per_epoch=updates_per_epoch)
    lr = learning_rate(update, schedule=schedule)
    decay = recipe.weight_decay
    if recipe.weight_decay_end is not None:
        decay = cosine(update, start=decay, end=recipe.weight_decay_end, first=0, total=schedule.total_updates)
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
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        if device is not None:
            self.module.to(device)
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
