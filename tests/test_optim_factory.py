"""Parameter groups, layer-wise decay, schedules and the moving average.

`dense_optim.json.gz` was recorded from the authors' dense configs under mmcv 1.7.2: `groups`, by config the weight
decay, the kinds [lr scale, weight decay], and by parameter [kind, shape]; `schedule`, the learning rates of updates.
"""
import copy
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import models  # noqa: F401, registers the MogaNets
import reference
from optim_factory import (
    RULES,
    ModelEma,
    Schedule,
    create_optimizer,
    create_param_groups,
    describe_param_groups,
    layer_ids,
    learning_rate,
    set_schedule,
)
from recipes import RECIPES, is_moganet, resolve
from utils import UserError


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('moganet_xtiny', dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), ffn_ratios=(2, 2, 2, 2),
                             num_classes=3, **kwargs)


def recipe(*words):
    return resolve(['--model', 'moganet_xtiny', '--warmup_epochs', '1', *words])[0]


@pytest.mark.parametrize('name', sorted({row.model for row in RECIPES.values() if is_moganet(row.model)}))
def test_scales_never_fall_from_stem_to_head_and_the_stem_still_learns(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    groups = create_param_groups(model, weight_decay=0.05, layer_decay=0.7)
    scales = [group['lr_scale'] for group in groups]
    assert scales == sorted(scales)
    assert scales[-1] == 1.0 and 0.009 <= scales[0] < 0.7
    levels = layer_ids(model)
    assert len(set(levels.values())) <= 14
    assert levels['patch_embed1.projection.0.weight'] == 0
    assert levels['head.weight'] == max(levels.values())
    assert levels['patch_embed2.projection.weight'] == levels['blocks2.0.norm1.weight']
    assert levels['norm2.weight'] == max(level for name, level in levels.items() if name.startswith('blocks2.'))
    blocks = [levels[name] for name in levels if name.endswith('layer_scale_1')]
    assert blocks == sorted(blocks)
    sizes = [blocks.count(level) for level in sorted(set(blocks))]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize('name', ['moganet_large', 'resnet18', 'vit_tiny_patch16_224', 'convnext_atto'])
def test_every_trainable_parameter_is_in_exactly_one_group(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    next(model.parameters()).requires_grad_(False)
    for layer_decay in (1.0, 0.8):
        groups = create_param_groups(model, weight_decay=0.05, layer_decay=layer_decay)
        names = [name for group in groups for name in group['names']]
        assert sorted(names) == sorted(name for name, param in model.named_parameters() if param.requires_grad)
        assert all(len(group['names']) == len(group['params']) for group in groups)
        assert (len({group['lr_scale'] for group in groups}) > 3) == (layer_decay < 1)


def test_biases_norms_and_scales_are_not_decayed_but_decompose_is():
    model = tiny()
    groups = create_param_groups(model, weight_decay=0.05, layer_decay=1.0)
    exempt = {name for group in groups if group['weight_decay'] == 0 for name in group['names']}
    decayed = {name for group in groups if group['weight_decay'] == 0.05 for name in group['names']}
    assert exempt | decayed == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        spared = param.ndim == 1 or 'layer_scale' in name or name.endswith('sigma.scale')
        assert (name in exempt) == spared, name
    assert 'blocks1.0.mlp.decompose.weight' in decayed


def test_the_printed_groups_add_up():
    model = tiny()
    text = describe_param_groups(create_param_groups(model, weight_decay=0.05, layer_decay=0.8))
    counts = [int(line.split()[3].replace(',', '')) for line in text.splitlines()[1:]]
    assert sum(counts) == sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize('opt', ['adamw', 'lamb', 'sgd'])
def test_layer_decay_and_the_schedule_reach_the_weights(opt):
    model = tiny()
    row = recipe('--opt', opt, '--layer_decay', '0.5', '--weight_decay', '0', '--epochs', '2', '--lr', '0.01')
    optimizer = create_optimizer(model, row)
    set_schedule(optimizer, row, update=4, updates_per_epoch=5)
    before = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    if opt != 'lamb':  # LAMB scales each tensor's step by its norm
        moved = {name: (param - before[name]).abs().max().item() for name, param in model.named_parameters()}
        ratio = moved['patch_embed1.projection.0.weight'] / moved['head.weight']
        assert ratio == pytest.approx(0.5 ** 5, rel=1e-3)  # float32 subtraction from weights of about 0.1
    lrs = [group['lr'] for group in optimizer.param_groups]
    assert lrs == pytest.approx([max(lrs) * group['lr_scale'] for group in optimizer.param_groups])


@pytest.mark.parametrize('warmup', [0, 1, 7, 50])
def test_warm_up_reaches_lr_exactly_and_the_last_update_min_lr(warmup):
    schedule = Schedule(lr=1e-3, min_lr=1e-5, warmup_updates=warmup, total_updates=50)
    rates = [learning_rate(update, schedule=schedule) for update in range(50)]
    peak = max(warmup - 1, 0)
    assert rates[peak] == 1e-3
    if warmup < 50:
        assert rates[-1] == 1e-5
    assert rates[:peak + 1] == sorted(rates[:peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(1e-3 / max(warmup, 1))


def test_the_cosine_is_half_way_in_the_middle():
    assert learning_rate(50, schedule=Schedule(lr=1.0, total_updates=101)) == pytest.approx(0.5)


RECORDED = reference.load_json('dense_optim.json.gz')


@pytest.mark.parametrize('name', RECORDED['schedule'])
def test_step_and_poly_equal_mmcvs_recorded_rates(name):
    recorded = RECORDED['schedule'][name]
    config, epoch = recorded['lr_config'], recorded['iterations_per_epoch']
    for group, base in enumerate(recorded['base_lr']):
        schedule = Schedule(
            lr=base, total_updates=recorded['max_iterations'], kind=config['policy'],
            min_lr=config.get('min_lr', 0.0), power=config.get('power', 1.0),
            warmup_updates=config.get('warmup_iters', 0), warmup_ratio=config.get('warmup_ratio'),
            milestones=tuple(milestone * epoch for milestone in config.get('step', ())))
        for update, rates in recorded['lr'].items():
            # Doubles; mmcv multiplies by 1 minus a number, which near 0 loses digits of the first rates
            assert learning_rate(int(update), schedule=schedule) == pytest.approx(rates[group], rel=1e-11), update


def random_schedule(rng: random.Random, kind: str) -> Schedule:
    total = rng.randint(1, 400)
    warmup = rng.choice([0, 1, rng.randint(0, total)])
    lr = 10 ** rng.uniform(-5, 0)
    milestones = tuple(sorted(rng.sample(range(warmup, total + 1), min(rng.randint(0, 3), total + 1 - warmup))))
    return Schedule(lr=lr, total_updates=total, kind=kind, min_lr=rng.choice([0.0, lr * rng.random()]),
                    warmup_updates=warmup, warmup_ratio=rng.choice([None, 0.0, rng.random(), 1.0]),
                    milestones=milestones, gamma=rng.uniform(0.1, 1.0), power=rng.choice([0.5, 1.0, 0.9, 3.0]))


@pytest.mark.parametrize('kind', ['cosine', 'poly', 'step'])
def test_any_schedule_rises_to_its_peak_and_falls_to_its_end(kind):
    rng = random.Random(kind)
    for _ in range(150):
        schedule = random_schedule(rng, kind)
        updates = list(range(schedule.total_updates))
        rates = [learning_rate(update, schedule=schedule) for update in updates]
        shuffled = rng.sample(updates, len(updates))
        assert [learning_rate(update, schedule=schedule) for update in shuffled] == [rates[i] for i in shuffled]
        lr, min_lr, warmup, ratio = schedule.lr, schedule.min_lr, schedule.warmup_updates, schedule.warmup_ratio
        assert min(rates) >= 0 and max(rates) <= lr * (1 + 1e-12), schedule
        after = rates[warmup:]
        # Round-off of a power or of a cosine at most; in floating point (lr - min_lr) + min_lr may miss lr
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(after)), schedule
        assert all(rate >= min_lr * (1 - 1e-12) for rate in after), schedule
        plain = Schedule(**vars(schedule) | {'warmup_updates': 0})
        if ratio is None and warmup:
            assert rates[:warmup] == [lr * ((update + 1) / warmup) for update in range(warmup)], schedule
        elif warmup:
            assert rates[0] == pytest.approx(ratio * learning_rate(0, schedule=plain), abs=1e-12 * lr), schedule
            assert after == [learning_rate(update, schedule=plain) for update in updates[warmup:]], schedule
        if kind == 'step':
            passed = [sum(update >= milestone for milestone in schedule.milestones) for update in updates[warmup:]]
            assert after == [max(lr * schedule.gamma ** count, min_lr) for count in passed], schedule
        if kind == 'cosine' and after and schedule.total_updates > 1:
            assert after[-1] == min_lr, schedule


def test_the_cosine_with_our_warm_up_has_the_bits_that_old_checkpoints_go_on_from():
    rng = random.Random(0)
    for _ in range(300):
        lr, min_lr, total = rng.random(), rng.random() * 1e-3, rng.randint(1, 300)
        warmup = rng.randint(0, total)
        schedule = Schedule(lr=lr, min_lr=min_lr, warmup_updates=warmup, total_updates=total)
        for update in range(total):
            span, done = total - 1 - max(warmup - 1, 0), update - max(warmup - 1, 0)
            weight = 0.5 * (1 + math.cos(math.pi * min(done / span, 1.0))) if span > 0 else 0.0
            expected = lr * ((update + 1) / warmup) if update < warmup else lr * weight + min_lr * (1 - weight)
            assert learning_rate(update, schedule=schedule) == expected


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match='cosin'):
        learning_rate(0, schedule=Schedule(lr=1.0, total_updates=2, kind='cosin'))


# ---- The authors' groups --------------------------------------------------------------------------------------------

CONFIGS = {'retinanet_moganet_xtiny_fpn_1x_coco': 'authors', 'mask_rcnn_moganet_xtiny_fpn_1x_coco': 'authors',
           'cascade_mask_rcnn_moganet_s_fpn_giou_4conv1f_ms_3x_coco': 'authors',
           'upernet_moganet_xtiny_512x512_160k_ade20k': 'authors', 'fpn_moganet_xtiny_80k_ade20k': 'all',
           'cascade_mask_rcnn_moganet_b_fpn_giou_4conv1f_ms_3x_coco': 'authors_layers',
           'cascade_mask_rcnn_moganet_l_fpn_giou_4conv1f_ms_3x_coco': 'authors_layers'}


def with_parameters(shapes: dict[str, list[int]]) -> SimpleNamespace:
    """What has parameters of these names and shapes, as a model would."""
    params = [(name, nn.Parameter(torch.empty(shape, device='meta'))) for name, shape in shapes.items()]
    return SimpleNamespace(named_parameters=lambda: iter(params))


@pytest.mark.parametrize('config', RECORDED['groups'])
def test_the_authors_rules_give_the_recorded_groups(config):
    recorded, rule = RECORDED['groups'][config], CONFIGS[config]
    model = with_parameters({name: shape for name, (_, shape) in recorded['parameters'].items()})
    groups = create_param_groups(model, weight_decay=recorded['weight_decay'], rule=rule,
                                 layer_decay=0.8 if rule == 'authors_layers' else 1.0)
    assert len(groups) == len(recorded['kinds'])
    ours = {name: (group['lr_scale'], group['weight_decay']) for group in groups for name in group['names']}
    assert ours.keys() == recorded['parameters'].keys()
    for name, (kind, _) in recorded['parameters'].items():
        assert ours[name] == pytest.approx(tuple(recorded['kinds'][kind]), rel=1e-8), name  # written with 9 digits


@pytest.mark.parametrize('name', ['moganet_xtiny', 'moganet_large'])
def test_the_authors_levels_are_the_same_with_and_without_a_prefix(name):
    bare = timm.create_model(name, features_only=True, device='meta')
    inside = nn.ModuleDict({'backbone': bare})
    levels = RULES['authors_layers'].levels(bare)
    assert RULES['authors_layers'].levels(inside) == {f'backbone.{key}': level for key, level in levels.items()}
    assert min(levels.values()) == 0 and max(levels.values()) == 13


@pytest.mark.parametrize('rule', ['authors_layers', 'authors'])
def test_layer_decay_of_a_model_without_such_levels_is_refused(rule):
    with pytest.raises(UserError, match=r'--layer_decay: .*; give 1'):
        create_param_groups(nn.Linear(2, 2), weight_decay=0.1, layer_decay=0.8, rule=rule)


def test_a_rule_changes_what_an_optimizer_decays():
    model = tiny()
    exempt = {rule: {name for group in create_param_groups(model, weight_decay=0.1, rule=rule)
                     for name in group['names'] if not group['decayed']} for rule in RULES}
    assert exempt['all'] == set() and 'head.bias' in exempt['ours'] - exempt['authors']
    assert 'blocks1.0.mlp.decompose.weight' in exempt['authors_layers'] - exempt['ours']
    assert len({frozenset(names) for names in exempt.values()}) == len(RULES)


def test_weight_decay_follows_its_cosine_to_the_end_and_back():
    row = recipe('--weight_decay', '0.04', '--weight_decay_end', '0', '--epochs', '3')
    optimizer = create_optimizer(tiny(), row)
    seen = []
    for update in (0, 14, 29, 0):
        set_schedule(optimizer, row, update=update, updates_per_epoch=10)
        seen.append(max(group['weight_decay'] for group in optimizer.param_groups))
        assert min(group['weight_decay'] for group in optimizer.param_groups) == 0
    assert seen[0] == seen[3] == 0.04 and seen[2] == 0.0 and 0.015 < seen[1] < 0.025


def noise(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            else:
                tensor.add_(1)


def test_the_average_equals_timms_to_float32_round_off():
    model = tiny()
    ours, theirs = ModelEma(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    for update in range(5):
        noise(model)
        ours.update(update)
        theirs.update(model)
    for (name, a), b in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        if a.is_floating_point():  # timm's lerp rounds once, as ours: differences come from the order of operations
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(a, model.state_dict()[name])


def test_the_warm_up_of_the_average_begins_with_the_model_itself():
    model = tiny()
    fast, slow = ModelEma(model, decay=0.999, warmup=True), ModelEma(model, decay=0.999)
    start = model.head.weight.detach().clone()
    noise(model)
    fast.update(0)
    slow.update(0)
    change = (model.head.weight.detach() - start).norm()
    assert (fast.module.head.weight - start).norm() == pytest.approx(0.9 * change.item(), rel=1e-4)
    assert (slow.module.head.weight - start).norm() == pytest.approx(0.001 * change.item(), rel=1e-2)


def test_a_skipped_update_leaves_the_average_as_it_was():
    model = tiny()
    ema = ModelEma(model, decay=0.9)
    before = copy.deepcopy(ema.module.state_dict())
    noise(model)
    ema.update(0, skipped=torch.tensor(1.0))
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, before[name]), name
    counted, plain = ModelEma(model, decay=0.9), ModelEma(model, decay=0.9)
    noise(model)
    counted.update(0, skipped=torch.tensor(0.0))
    plain.update(0)
    for a, b in zip(counted.module.state_dict().values(), plain.module.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)  # two roundings instead of lerp's one
