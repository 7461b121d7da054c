"""Parameter groups, layer-wise decay, schedules and the moving average."""
import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import models  # noqa: F401, registers the MogaNets
from optim_factory import (
    ModelEma,
    create_optimizer,
    create_param_groups,
    describe_param_groups,
    layer_ids,
    learning_rate,
    set_schedule,
)
from recipes import MOGANETS, resolve


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('moganet_xtiny', dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), ffn_ratios=(2, 2, 2, 2),
                             num_classes=3, **kwargs)


def recipe(*words):
    return resolve(['--model', 'moganet_xtiny', '--warmup_epochs', '1', *words])[0]


@pytest.mark.parametrize('name', MOGANETS)
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
    rates = [learning_rate(update, lr=1e-3, min_lr=1e-5, warmup_updates=warmup, total_updates=50)
             for update in range(50)]
    peak = max(warmup - 1, 0)
    assert rates[peak] == 1e-3
    if warmup < 50:
        assert rates[-1] == 1e-5
    assert rates[:peak + 1] == sorted(rates[:peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(1e-3 / max(warmup, 1))


def test_the_cosine_is_half_way_in_the_middle():
    assert learning_rate(50, lr=1.0, min_lr=0.0, warmup_updates=0, total_updates=101) == pytest.approx(0.5)


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
