"""The benchmarks compare equal functions, count what is there, and hold the traffic that is claimed."""
import json
import time

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import reference
from tools import benchmark, benchmark_model
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


# A quarter of a minute each for the deep ones; the ratio hardly varies between the six (0.64 to 0.66).
@pytest.mark.parametrize('name', [
    XT, 'moganet_tiny', 'moganet_small', 'moganet_base',
    pytest.param('moganet_large', marks=pytest.mark.slow), pytest.param('moganet_xlarge', marks=pytest.mark.slow),
])  # fmt: skip
def test_training_step_moves_at_most_two_thirds_of_the_authors_traffic(name):
    row, = benchmark_model.measure_traffic([name])
    assert row['convolutions_mb'] < row['mb'] <= 0.67 * row['authors_mb']
    assert row['kernels'] <= 1.1 * row['authors_kernels']


# Counted independently on the authors' implementation: 569 MB an image in 1,794 kernels, the 79 allocations included.
def test_count_of_the_authors_formulation_agrees_with_that_of_their_code():
    row, = benchmark_model.measure_traffic([XT])
    assert row['authors_mb'] == pytest.approx(569, rel=0.01)
    assert row['authors_kernels'] == pytest.approx(1794 - 79, rel=0.01)


def test_traffic_counts_each_tensor_once_and_views_not_at_all():
    x = torch.empty(4, 8, device='meta')
    with benchmark_model.Traffic() as counted:
        y = x.t().reshape(32)[:16] + torch.empty(1, device='meta').expand(16)
        y.mul_(2.0)
    # reshape copies 32 in, 32 out; the sum reads 16 and 1 and writes 16; in place, mul_ has one tensor of 16.
    assert counted.bytes == {'clone': 4 * 64, 'add': 4 * 33, 'mul_': 4 * 16}
    assert counted.kernels.total() == 3


def test_alternated_ratios_tell_the_faster_and_their_spread():
    calls = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    taken = benchmark.alternate({'slow': lambda: work('slow', 0.02), 'fast': lambda: work('fast', 0.002)}, rounds=3)
    assert calls == ['slow', 'fast'] * 4
    assert taken['slow']['speedup'] == {'median': 1.0, 'min': 1.0, 'max': 1.0}
    assert 0.02 <= taken['slow']['seconds'] < taken['fast']['seconds'] * 20
    ratio = taken['fast']['speedup']
    assert ratio['median'] > 1.5 and ratio['min'] <= ratio['median'] <= ratio['max'] <= 10.5


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
