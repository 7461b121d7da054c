"""The benchmarks compare equal functions, count what is there, and hold the traffic that is claimed."""
import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import reference
from tools import alternation, benchmark, benchmark_model
from utils import UserError

XT = 'moganet_xtiny'


def seeded_xtiny(**kwargs: object) -> nn.Module:
    model = timm.create_model(XT, **kwargs)
    model.load_state_dict(reference.seeded_state_dict(XT))
    return model


def test_authors_formulation_is_the_same_function_and_trains_the_same():
    images = reference.seeded_images(4, 3, 64, 64)
    results = []
    for build in (benchmark_model.as_authors, lambda model: model):
        model = build(seeded_xtiny(drop_path_rate=0.3).train())
        torch.manual_seed(0)  # for drop path
        loss = F.cross_entropy(model(images), torch.arange(4))
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    largest = max(gradient.abs().max() for gradient in results[0][1].values())
    for name, gradient in results[1][1].items():
        # Some true gradients are 0 (a bias before a BN), so that round-off is measured by the largest.
        torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-5 * largest.item(), msg=name)
    model = seeded_xtiny().eval()
    with torch.inference_mode():
        logits = benchmark_model.as_authors(model)(images)
        assert reference.relative_error(model(images), logits) <= 1e-5
        assert not torch.equal(model(images), logits)  # it is another formulation


# A quarter of a minute each for the deep ones; the ratio hardly varies between the six (0.60 to 0.63).
@pytest.mark.parametrize('name', [
    XT, 'moganet_tiny', 'moganet_small', 'moganet_base',
    pytest.param('moganet_large', marks=pytest.mark.slow), pytest.param('moganet_xlarge', marks=pytest.mark.slow),
])  # fmt: skip
def test_training_step_moves_at_most_two_thirds_of_the_authors_traffic(name):
    row, = benchmark_model.measure_traffic([name])
    assert row['hidden_mb'] < row['convolutions_mb'] < row['mb'] <= 0.67 * row['authors_mb']
    assert row['kernels'] <= 1.1 * row['authors_kernels']


# Counted independently on the authors' implementation: 569 MB an image in 1,794 kernels, the 79 allocations included.
def test_count_of_the_authors_formulation_agrees_with_that_of_their_code():
    model = timm.create_model(XT, drop_path_rate=0.1, device='meta', dtype=torch.bfloat16).train()
    images = torch.empty(64, 3, 224, 224, device='meta', dtype=torch.bfloat16)
    step = benchmark_model.training_step(benchmark_model.as_authors(model), images, precision='fp32')
    with benchmark_model.Traffic() as counted:
        step()
    assert counted.bytes.total() / 64e6 == pytest.approx(569, rel=0.01)
    assert counted.kernels.total() == pytest.approx(1794 - 79, rel=0.01)


# Counted independently with CUDA's own code under a driver that runs no kernel, at 32 images: by autocast to bf16 615
# and 1,343 MB an image, of them 457 and 1,010 in operators; in float32 1,028 and 2,198. That count left out the second
# copy of a gradient, 0.4 %.
@pytest.mark.parametrize('name, mb, operators, fp32', [(XT, 615, 457, 1028), ('moganet_small', 1343, 1010, 2198)])
def test_count_of_a_training_step_is_that_of_the_kernels_that_cuda_launches(name, mb, operators, fp32):
    row, = benchmark_model.measure_traffic([name], batch_size=32)
    assert row['mb'] == pytest.approx(mb, rel=0.01)
    assert row['mb'] - row['hidden_mb'] == pytest.approx(operators, rel=0.005)
    assert row['fp32_mb'] == pytest.approx(fp32, rel=0.01)


def test_passes_within_a_convolution_are_counted_and_only_where_there_are_some():
    def count(images, channels, *, groups=1, bias=True, backward=False):
        conv = nn.Conv2d(images.shape[1], channels, 1, groups=groups, bias=bias, device='meta')
        with benchmark_model.Traffic() as counted:
            out = conv(images.requires_grad_())
            if backward:
                out.sum().backward()
        return counted

    images = torch.empty(2, 8, 4, 4, device='meta').to(memory_format=torch.channels_last)
    channel = 4 * 2 * 16  # a channel of it, in bytes
    assert count(images, 6, bias=False).hidden == {}
    assert count(images, 6).hidden == {'biases': 2 * 6 * channel}
    assert count(images[:, 2:6], 4, groups=4, bias=False).hidden == {'copies': 2 * 4 * channel}
    assert count(images, 1, bias=False).hidden == {'copies': 2 * 8 * channel}
    # The gradient of a sum is one number expanded, so that its reading costs next to nothing; the copies do not
    both = count(images[:, 2:6], 4, groups=4, backward=True)
    assert both.launches['copies'] >= 3 and both.launches['gradients read twice'] == 1 == both.launches['biases'] - 1
    on_the_cpu = nn.Conv2d(8, 6, 1)
    with benchmark_model.Traffic() as counted:
        on_the_cpu(torch.zeros(2, 8, 4, 4))
    assert counted.bytes.total() and not counted.hidden


def test_autocast_on_meta_casts_what_cudas_does():
    half, full = (torch.empty(2, 3, 4, 4, device='meta', dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    with benchmark_model.CudaAutocast():
        assert nn.Conv2d(3, 3, 1, device='meta')(full).dtype == torch.bfloat16
        assert (full.flatten(1) @ full.flatten(1).T).dtype == torch.bfloat16
        assert torch.addcmul(full, full, half).dtype == torch.float32
        assert F.cross_entropy(half.flatten(1), torch.zeros(2, dtype=torch.long, device='meta')).dtype == torch.float32
        assert F.silu(half).dtype == torch.bfloat16


def test_traffic_counts_each_tensor_once_and_views_not_at_all():
    x = torch.empty(4, 8, device='meta')
    with benchmark_model.Traffic() as counted:
        y = x.t().reshape(32)[:16] + torch.empty(1, device='meta').expand(16)
        y.mul_(2.0)
    # reshape copies 32 in, 32 out; the sum reads 16 and 1 and writes 16; in place, mul_ has one tensor of 16.
    assert counted.bytes == {'clone': 4 * 64, 'add': 4 * 33, 'mul_': 4 * 16}
    assert counted.kernels.total() == 3


def test_alternated_ratios_tell_the_faster_and_their_spread(monkeypatch):
    calls, now = [], 0.0
    # The first of each, which does not count, is slow
    taken = {'slow': [90.0, 20.0, 20.0, 30.0], 'fast': [80.0, 2.0, 4.0, 10.0]}

    def work(name: str) -> None:
        nonlocal now
        now += taken[name][calls.count(name)]
        calls.append(name)

    monkeypatch.setattr(alternation.time, 'perf_counter', lambda: now)
    timed = alternation.alternate({name: lambda name=name: work(name) for name in taken}, rounds=3)
    assert calls == ['slow', 'fast'] * 4
    assert timed == {'slow': {'seconds': 20, 'speedup': {'median': 1.0, 'min': 1.0, 'max': 1.0}},
                     'fast': {'seconds': 4, 'speedup': {'median': 5.0, 'min': 3.0, 'max': 10.0}}}


def test_model_benchmark_reports_every_form(capsys):
    benchmark.main([
        'model', XT, '--batch_size', '2', '--input_size', '128', '--device', 'cpu', '--rounds', '1', '--json',
        '--inference', 'eager', 'fused+channels_last', '--training', 'authors', 'eager',
    ])  # fmt: skip
    rows = json.loads(capsys.readouterr().out)
    assert [(row['mode'], row['form']) for row in rows] == [
        ('inference', 'eager'), ('inference', 'fused+channels_last'), ('training', 'authors'), ('training', 'eager')
    ]  # fmt: skip
    assert all(row['images_per_second'] > 0 and 0 < row['share_of_product'] < 1 for row in rows)
    inference, fused, authors, eager = rows
    assert authors['gmacs'] == pytest.approx(3 * inference['gmacs'], abs=0.002)
    assert fused['mb'] < inference['mb'] < eager['mb'] < authors['mb']


@pytest.mark.slow
def test_compiler_counts_less_traffic_than_eager_kernels_move():
    torch._dynamo.reset()
    model = timm.create_model(XT, depths=(1, 1, 1, 1), dtype=torch.bfloat16).train()
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    compiled = benchmark_model.training_step(torch.compile(model), images, precision='fp32')
    with benchmark_model.Traffic() as eager:
        benchmark_model.training_step(model, images, precision='fp32')()
    assert 0 < benchmark_model.compiled_bytes(compiled) < eager.bytes.total()


@pytest.mark.parametrize(('form', 'says'), [('fussed', 'unknown form fussed'), ('fused', 'no norms to train')])
def test_impossible_form_is_refused(form, says):
    with pytest.raises(UserError, match=says):
        benchmark_model.build_form(timm.create_model(XT).train(), form)


def test_table_aligns_spreads_and_numbers(capsys):
    benchmark.print_table([{'form': 'eager', 'speedup': {'median': 1.0, 'min': 0.9, 'max': 1.2}, 'mb': 12.25}])
    assert capsys.readouterr().out.splitlines() == ['form   speedup        mb', 'eager  1.0 (0.9-1.2)  12.25']


def test_only_a_moganet_has_the_authors_formulation():
    with pytest.raises(UserError, match='only a MogaNet'):
        benchmark_model.measure_traffic(['resnet18'])
    with pytest.raises(UserError, match='moganet_tiny'):
        benchmark_model.measure_traffic(['moganet_tny'])
