"""MogaNet computes the authors' function under their names, and keeps timm's interface."""
import copy
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn

import models
import reference
from conftest import ROOT
from tools import export

VARIANTS = list(reference.shapes())
XT = 'moganet_xtiny'


def seeded(variant: str, **kwargs: object) -> nn.Module:
    model = timm.create_model(variant, **kwargs)
    model.load_state_dict(reference.seeded_state_dict(variant))
    return model.eval()


# L and XL are the code of the others once more, at 30 s for these tests on one core; their logits are not slow.
DEEP = [pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS[4:]]


@pytest.fixture(scope='module', params=[*VARIANTS[:4], *DEEP])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A variant with seeded weights, shared by the tests that leave it as it is."""
    return seeded(request.param)


def channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


# The authors' function.


@pytest.mark.parametrize('variant', VARIANTS)
def test_state_dict_has_the_released_names_and_shapes_in_order(variant):
    state = timm.create_model(variant, device='meta').state_dict()
    assert [(name, list(value.shape)) for name, value in state.items()] == list(reference.shapes()[variant].items())


PARAMETERS = [2_956_066, 5_197_332, 25_335_675, 43_720_475, 82_480_978, 180_991_924]


@pytest.mark.parametrize(('variant', 'count'), list(zip(VARIANTS, PARAMETERS, strict=True)))
def test_parameter_count_is_exact(variant, count):
    assert sum(p.numel() for p in timm.create_model(variant, device='meta').parameters()) == count


# Float32 sums in another order: 1e-5 is what two builds of torch differ by at most; measured 2e-7 (XT) to 5e-7 (XL).
@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_equal_the_recorded_ones(variant):
    model = seeded(variant)
    for size in (224, 256) if variant == 'moganet_tiny' else (224,):
        with torch.inference_mode():
            logits = model(reference.seeded_images(2, 3, size, size))
        assert reference.relative_error(logits, reference.LOGITS[f'{variant}/{size}']) <= 1e-5


@pytest.mark.parametrize('variant', [XT, 'moganet_small'])
def test_double_gate_equals_the_recorded_one_and_differs_from_the_single(variant):
    with torch.inference_mode():
        logits = seeded(variant, gate='double')(reference.seeded_images(2, 3, 224, 224))
    assert reference.relative_error(logits, reference.LOGITS[f'{variant}/224/double_gate']) <= 1e-5
    assert reference.relative_error(logits, reference.LOGITS[f'{variant}/224']) > 1e-3


@pytest.mark.parametrize('variant', [XT, 'moganet_small'])
def test_stage_means_equal_the_recorded_ones(variant):
    with torch.inference_mode():
        stages = seeded(variant).forward_intermediates(reference.seeded_images(1, 3, 96, 128), intermediates_only=True)
    assert len(stages) == 4
    for i, stage in enumerate(stages):
        assert reference.relative_error(stage.mean((2, 3)), reference.LOGITS[f'{variant}/96x128/stage{i}_mean']) <= 1e-5


def test_three_training_steps_equal_the_recorded_ones():
    recorded = reference.load_json('train_steps_moganet_xtiny.json.gz')
    model = seeded(XT).train()
    images, labels = reference.seeded_images(4, 3, 64, 64), reference.seeded_labels(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for step, expected in enumerate(recorded['loss']):
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        # 1e-4: AdamW divides by the root of near-zero second moments, which magnifies round-off after the first step.
        assert loss.item() == pytest.approx(expected, rel=1e-5 if step == 0 else 1e-4)
        if step == 0:
            buffers = dict(model.named_buffers())
            assert len(recorded['running_mean_norm']) == sum(name.endswith('running_mean') for name in buffers)
            for name, norm in recorded['running_mean_norm'].items():
                name = name if name.endswith('running_mean') else f'{name}.running_mean'
                assert buffers[name].norm().item() == pytest.approx(norm, rel=1e-5), name
            gradients = {name: p.grad.norm().item() for name, p in model.named_parameters()}
            assert gradients.keys() == recorded['grad_norm'].keys()
            largest = max(gradients.values())
            for name, norm in recorded['grad_norm'].items():
                # Below 1e-6 of the largest a gradient is round-off: a bias before a training-mode BN has a true 0.
                assert gradients[name] == pytest.approx(norm, rel=1e-4, abs=1e-6 * largest), name
        optimizer.step()


# timm's interface, after timm's own model tests.


def test_forward_gives_finite_logits_at_any_size_from_32(model):
    with torch.inference_mode():
        for height, width in ((32, 32), (33, 64)):
            logits = model(torch.randn(1, 3, height, width))
            assert logits.shape == (1, 1000) and logits.isfinite().all()


def test_backward_reaches_every_parameter(model):
    model = copy.deepcopy(model).train()
    model(torch.randn(2, 3, 32, 32)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_default_cfg_describes_the_model(model):
    cfg, state = model.default_cfg, model.state_dict()
    assert (cfg['input_size'], cfg['crop_pct'], cfg['interpolation']) == ((3, 224, 224), 0.9, 'bicubic')
    assert cfg['classifier'] + '.weight' in state and state[cfg['first_conv'] + '.weight'].shape[1] == 3
    assert model.num_classes == cfg['num_classes'] == model.get_classifier().out_features
    with torch.inference_mode():
        features = model.forward_features(torch.randn(1, 3, 224, 224))
    assert features.shape == (1, model.num_features, *cfg['pool_size'])


def test_head_is_pooled_features_and_classifier(model):
    x = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        features = model.forward_features(x)
        pre_logits = model.forward_head(features, pre_logits=True)
        assert features.shape == (2, model.num_features, 2, 1)
        assert pre_logits.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(pre_logits, features.mean((2, 3)))
        torch.testing.assert_close(model(x), model.forward_head(features))
        torch.testing.assert_close(model.get_classifier()(pre_logits), model(x))


def test_intermediates_and_feature_list_agree(model):
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        final, stages = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        torch.testing.assert_close(stages[-1], final)
        stopped, first_two = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        assert stopped is first_two[1] and len(first_two) == 2
        torch.testing.assert_close(first_two, stages[:2])
        for info, stage in zip(model.feature_info, stages, strict=True):
            assert stage.shape == (1, info['num_chs'], 64 // info['reduction'], 96 // info['reduction'])


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
def test_features_only_gives_the_chosen_stages(feature_cls):
    whole = seeded(XT)
    features = timm.create_model(XT, features_only=True, out_indices=(1, 3), feature_cls=feature_cls).eval()
    assert features.feature_info.channels() == [64, 192] and features.feature_info.reduction() == [8, 32]
    weights = reference.seeded_state_dict(XT)
    own = features.state_dict()
    features.load_state_dict({name: weights[re.sub(r'^(body|model|graph_module)\.', '', name)] for name in own})
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        out = features(x)
        out = list(out.values()) if isinstance(out, dict) else list(out)
        expected = whole.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    torch.testing.assert_close(out, expected)


def test_features_only_is_the_list_by_default_and_works_for_all():
    for variant in VARIANTS:
        features = timm.create_model(variant, features_only=True, device='meta')
        out = features(torch.empty(1, 3, 64, 64, device='meta'))
        assert [x.shape[1] for x in out] == features.feature_info.channels()
        assert [64 // x.shape[2] for x in out] == features.feature_info.reduction() == [4, 8, 16, 32]


def test_pruning_leaves_the_wanted_stages_alone():
    model, whole = seeded(XT), seeded(XT)
    x = torch.randn(1, 3, 64, 64)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert not any(name.startswith(('blocks3', 'norm4', 'head')) for name in model.state_dict())
    with torch.inference_mode():
        expected = whole.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), expected)
        assert model.num_features == 64 and model(x).shape == (1, 64, 8, 8)


def test_torchscript_equals_eager(model):
    x = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_fx_graph_equals_eager_and_trains(model):
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        torch.testing.assert_close(graph(x), model(x))
    graph(x).mean().backward()
    assert all(p.grad is not None for p in graph.parameters())
    graph.zero_grad()


# Dynamo takes a quarter of a second a block; the five left to the slow tests differ in sizes alone.
@pytest.mark.parametrize(
    'variant', [pytest.param(v, marks=() if v == XT else pytest.mark.slow) for v in VARIANTS]
)
def test_compiles_without_graph_break(variant):
    torch._dynamo.reset()
    model, x = timm.create_model(variant).eval(), torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='eager')(x), model(x))


def test_exports_with_a_dynamic_batch():
    model, x = seeded(XT), torch.randn(2, 3, 32, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes={'x': {0: torch.export.Dim('batch')}}).module()
    with torch.no_grad():
        for batch in (x, torch.randn(5, 3, 32, 64)):
            torch.testing.assert_close(exported(batch), model(batch))


@pytest.mark.parametrize('options', [{'gate': 'double'}, {'gate_fp32': True}], ids=str)
def test_every_gate_survives_script_trace_compile_and_export(options):
    torch._dynamo.reset()
    model = models.moganet.MogaNet(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), **options).eval()
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_inductor_training_step_equals_eager():
    torch._dynamo.reset()
    eager, x = seeded(XT).train(), reference.seeded_images(4, 3, 64, 64)
    compiled = copy.deepcopy(eager)
    losses = [F.cross_entropy(net(x), torch.arange(4)) for net in (eager, torch.compile(compiled, fullgraph=True))]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        # Relative to the largest gradient: fused kernels round differently, and some true gradients are 0.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


# Arguments.


def test_reset_classifier_and_no_classifier():
    model, x = seeded(XT), torch.randn(2, 3, 32, 32)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == model.get_classifier().out_features == 7
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), model.forward_features(x))
    assert timm.create_model(XT, num_classes=0)(x).shape == (2, 192)
    assert timm.create_model(XT, num_classes=0, global_pool='')(x).shape == (2, 192, 1, 1)


def test_misspelt_argument_is_named():
    with pytest.raises(TypeError, match='drop_path_rat'):
        timm.create_model(XT, drop_path_rat=0.1)


@pytest.mark.parametrize(
    'options', [{'gate': 'triple'}, {'global_pool': 'max', 'num_classes': 0}, {'global_pool': '', 'num_classes': 10}]
)
def test_impossible_argument_is_refused(options):
    with pytest.raises(ValueError, match='|'.join(options)):
        timm.create_model(XT, **options)


def test_other_input_channels_change_the_first_convolution_only():
    model = timm.create_model(XT, in_chans=1)
    state, expected = model.state_dict(), dict(reference.shapes()[XT])
    expected['patch_embed1.projection.0.weight'] = [16, 1, 3, 3]
    assert {name: list(value.shape) for name, value in state.items()} == expected
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 1000)


def test_initial_values_follow_the_paper():
    torch.manual_seed(0)
    model = timm.create_model('moganet_small', layer_scale_init_value=0.5)
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name:
            assert parameter.eq(0.5).all(), name
        elif name.endswith('sigma.scale'):
            assert parameter.eq(1e-5).all(), name
        elif name.endswith('bias'):
            assert parameter.eq(0).all(), name
        elif parameter.ndim == 1:
            assert parameter.eq(1).all(), name
        elif parameter.numel() > 10_000 and parameter.ndim == 4:
            convolution = model.get_submodule(name.removesuffix('.weight'))
            fan_out = parameter.shape[0] * parameter[0, 0].numel() / convolution.groups
            assert parameter.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_head_init_scale_scales_the_classifier_alone():
    models_ = []
    for scale in (1.0, 0.001):
        torch.manual_seed(0)
        models_.append(timm.create_model(XT, head_init_scale=scale))
    plain, scaled = (m.state_dict() for m in models_)
    torch.testing.assert_close(scaled.pop('head.weight'), plain.pop('head.weight') * 0.001)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=0)


def test_drop_path_rises_linearly_and_drops_whole_branches():
    model = timm.create_model(XT, drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    torch.testing.assert_close(rates, torch.linspace(0, 0.5, 18).tolist())
    block = seeded(XT, drop_path_rate=0.5).blocks4[-1].train()
    x = torch.randn(8, 192, 4, 4)
    torch.manual_seed(0)
    out = block(x)
    torch.manual_seed(0)
    u = block.norm1(x)
    expected = x + block.drop_path(block.layer_scale_1 * (block.attn(u) + u))
    expected = expected + block.drop_path(block.layer_scale_2 * block.mlp(block.norm2(expected)))
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, block(x))
    block.eval()
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)


@pytest.mark.parametrize(('option', 'reaches_features'), [('drop_rate', False), ('proj_drop_rate', True)])
def test_dropout_acts_in_training_where_it_says(option, reaches_features):
    x = torch.randn(2, 3, 32, 32)
    plain, dropped = seeded(XT), seeded(XT, **{option: 0.5})
    torch.testing.assert_close(dropped(x), plain(x), rtol=0, atol=0)
    plain.train()
    dropped.train()
    expected, features = plain.forward_features(x), dropped.forward_features(x)
    assert torch.allclose(features, expected) != reaches_features
    assert not torch.allclose(dropped.forward_head(features), plain.forward_head(features)) or reaches_features
    torch.testing.assert_close(plain(x), plain(x))


def test_gate_fp32_is_the_same_function():
    x = reference.seeded_images(2, 3, 64, 64)
    plain, island = seeded(XT), seeded(XT, gate_fp32=True)
    with torch.inference_mode():
        expected = plain(x)
        torch.testing.assert_close(island(x), expected, rtol=0, atol=0)
        with torch.autocast('cpu', torch.bfloat16):
            low, high = plain(x).float(), island(x).float()
    assert not torch.equal(low, high)
    # bfloat16 keeps 8 bits: 0.4 % an operation, a few per cent through 18 blocks; another function would miss by more.
    assert reference.relative_error(low, expected) < 0.05 and reference.relative_error(high, expected) < 0.05


def test_gate_fp32_survives_the_product_that_overflows_fp16():
    for gate_fp32 in (False, True):
        attention = seeded(XT, gate_fp32=gate_fp32).blocks1[0].attn
        nn.init.constant_(attention.gate.bias, 300.0)
        nn.init.constant_(attention.value.PW_conv.bias, 300.0)  # SiLU(300)^2 = 90,000; fp16 ends at 65,504
        with torch.inference_mode(), torch.autocast('cpu', torch.float16):
            assert attention(torch.randn(1, 32, 8, 8)).isfinite().all() == gate_fp32


# Folding the norms for inference.


def randomise_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.3, 1.3)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.3, 3.0)


def test_fused_model_equals_the_original_at_every_stage(model):
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    randomise_norms(model)
    fused, x = models.moganet.fuse(model), reference.seeded_images(2, 3, 32, 64)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        # Folding rounds each weight once more: 1e-7 a layer, below 1e-5 through the 62 blocks of XL.
        assert reference.relative_error(fused(x), model(x)) <= 1e-5
        stages = fused.forward_intermediates(x)[1], model.forward_intermediates(x)[1]
        for mine, theirs in zip(*stages, strict=True):
            assert reference.relative_error(mine, theirs) <= 1e-5


@pytest.mark.parametrize('options', [{'gate': 'double'}, {'gate_fp32': True, 'drop_path_rate': 0.5}], ids=str)
def test_fusing_leaves_the_original_alone_and_twice_is_once(options):
    model = seeded(XT, **options).train()
    before, x = copy.deepcopy(model.state_dict()), reference.seeded_images(2, 3, 64, 64)
    fused = models.moganet.fuse(model)
    assert model.training and not fused.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.inference_mode():
        assert reference.relative_error(fused(x), model.eval()(x)) <= 1e-5
        torch.testing.assert_close(models.moganet.fuse(fused)(x), fused(x), rtol=0, atol=0)


def test_fused_model_scripts_and_exports():
    fused = models.moganet.fuse(models.moganet.MogaNet(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1)))
    x = torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(torch.jit.script(fused)(x), fused(x))
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), fused(x))


def test_only_a_moganet_is_fused():
    with pytest.raises(TypeError, match='ResNet'):
        models.moganet.fuse(timm.create_model('resnet18', device='meta'))


# Training with it.


def test_layer_groups_run_from_stem_to_head_one_a_block(model):
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    depths = [len(model.get_submodule(f'blocks{i}')) for i in (1, 2, 3, 4)]
    assert sorted(set(groups.values())) == list(range(sum(depths) + 2))
    block = 0
    for stage, depth in enumerate(depths, start=1):
        for name, group in groups.items():
            if name.startswith(f'patch_embed{stage}.'):
                assert group == (block + 1 if stage > 1 else 0), name
            elif name.startswith(f'blocks{stage}.'):
                assert group == block + 1 + int(name.split('.')[1]), name
            elif name.startswith(f'norm{stage}.'):
                assert group == block + depth, name
        block += depth
    assert {groups['head.weight'], groups['head.bias']} == {block + 1}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse['patch_embed1.projection.0.weight'] == 0 and coarse['head.bias'] == 5
    assert all(coarse[name] == int(name[6]) for name in coarse if name.startswith('blocks'))


def test_no_weight_decay_names_every_scale_and_nothing_else(model):
    names = model.no_weight_decay()
    blocks = sum(len(model.get_submodule(f'blocks{i}')) for i in (1, 2, 3, 4))
    assert len(names) == 4 * blocks and names <= dict(model.named_parameters()).keys()
    assert all(name.endswith(('layer_scale_1', 'layer_scale_2', 'sigma.scale')) for name in names)


def test_gradient_checkpointing_saves_memory_and_changes_neither_gradients_nor_bn_statistics():
    x = reference.seeded_images(4, 3, 64, 64)
    results = []
    for enable in (False, True):
        model = seeded(XT, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        saved: list[int] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        state = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
        results.append((state, sum(saved)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert results[1][1] < 0.2 * results[0][1]


@pytest.mark.parametrize('training', [False, True])
def test_channels_last_holds_through_every_block(training):
    model = seeded(XT).train(training).to(memory_format=torch.channels_last)
    broken = []
    for name, module in model.named_modules():
        if not isinstance(module, DropPath):  # it sees [B, C, 1, 1] scales
            module.register_forward_hook(
                lambda _, __, out, name=name: None if out.ndim < 4 or channels_last(out) else broken.append(name)
            )
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    out = model(x)
    assert not broken
    model = model.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(out, model(x.contiguous()), rtol=1e-4, atol=1e-4)  # other kernels, float32


def test_lower_precisions_stay_near_float32():
    x = reference.seeded_images(2, 3, 64, 64)
    expected = seeded(XT)(x)
    for dtype in (torch.bfloat16, torch.float16):
        model = seeded(XT)
        with torch.inference_mode(), torch.autocast('cpu', dtype):
            assert model.blocks1[0](model.patch_embed1(x)).dtype == torch.float32  # the residual stream
            out = model(x)
        assert out.dtype == dtype and reference.relative_error(out.float(), expected) < 0.05
        whole = timm.create_model(XT, dtype=dtype)
        assert {p.dtype for p in whole.parameters()} == {dtype} and whole(x.to(dtype)).dtype == dtype


def test_registered_entry_points_take_no_unknown_variants():
    assert set(VARIANTS) == set(timm.list_models('moganet_*'))
    for variant in VARIANTS:
        assert inspect.getdoc(getattr(models.moganet, variant)).startswith('MogaNet-')


# Beside other code: the file copied away, and timm with a MogaNet of its own.


def run_python(code: str, folder: Path, *, path: str = '') -> subprocess.CompletedProcess:
    """Runs Python in a folder, with `path` as PYTHONPATH. It must succeed."""
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, env={'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


# What follows the lines of README in the other project
CHECK_OF_COPY = '''
import sys
torch.save(backbone(torch.ones(1, 3, 64, 64)), 'features.pt')
random = timm.create_model('moganet_xtiny', features_only=True)
assert random.feature_info.channels() == [32, 64, 96, 192]
try:
    timm.create_model('moganet_xtiny', pretrained=True)
except RuntimeError as error:
    print(error)
for module in list(sys.modules.values()):
    file = str(getattr(module, '__file__', ''))
    assert not file.startswith(sys.argv[1]) or 'site-packages' in file, module
'''


def test_the_copied_file_is_a_backbone_by_the_lines_of_the_readme(tmp_path):
    lines, = re.findall(r'^## The backbone in another project\n.*?^```python\n(.*?)^```\n',
                        (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)
    other = tmp_path / 'other'
    other.mkdir()
    shutil.copy(ROOT / 'models' / 'moganet.py', other)
    torch.save(reference.seeded_state_dict('moganet_tiny'), tmp_path / 'weights.pth')
    export.main(['--checkpoint', str(tmp_path / 'weights.pth'), '--model', 'moganet_tiny', '--format', 'safetensors',
                 '--output', str(other / 'moganet_tiny.safetensors')])
    done = run_python(f'import sys; sys.argv.append({str(ROOT)!r})\n{lines}{CHECK_OF_COPY}', other)
    printed = done.stdout.splitlines()
    assert printed[0] == '[64, 128, 256] [8, 16, 32]'
    assert printed[1].replace('torch.Size(', '').replace(')', '') == '[1, 64, 80, 60] [1, 128, 40, 30] [1, 256, 20, 15]'
    assert printed[2].startswith('No pretrained weights exist for moganet_xtiny')
    with torch.no_grad():
        expected = seeded('moganet_tiny').forward_intermediates(torch.ones(1, 3, 64, 64), intermediates_only=True)[1:]
    torch.testing.assert_close(torch.load(other / 'features.pt', weights_only=True), expected)


PORT = '''
import sys, types, timm
port = types.ModuleType('timm.models.moganet')
sys.modules['timm.models.moganet'] = timm.models.moganet = port
exec("""
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
default_cfgs = generate_default_cfgs({'moganet_tiny.timm_in1k': {'hf_hub_id': 'timm/'}, 'moganet_large': {}})
@register_model
def moganet_tiny(pretrained=False, **kwargs):
    raise AssertionError('the port of timm was called')
@register_model
def moganet_large(pretrained=False, **kwargs):
    raise AssertionError('the port of timm was called')
""", port.__dict__)
assert timm.list_models('moganet_*') == ['moganet_large', 'moganet_tiny']
import models
for name in ('moganet_tiny', 'moganet_tiny.in1k_3aug_256', 'moganet_large'):
    assert type(timm.create_model(name, device='meta')) is models.moganet.MogaNet
assert timm.get_pretrained_cfg('moganet_tiny').url == models.pretrained_cfgs()['moganet_tiny.in1k']['url']
assert {name.split('.')[1][:4] for name in timm.list_pretrained('moganet_*')} == {'in1k'}
'''


def test_ours_win_without_a_word_over_models_of_these_names_in_timm(tmp_path):
    done = run_python(PORT, tmp_path, path=str(ROOT))
    assert done.stderr == done.stdout == ''
