"""BENCHMARKS.md says what the kept figures say, and 'not measured' where there are none."""
import json
import re

import pytest

from tools import benchmark_depthwise, benchmark_report
from tools.benchmark_report import ROOT

FIGURES = benchmark_report.load()


def test_benchmarks_md_is_what_the_kept_figures_make():
    assert (ROOT / 'BENCHMARKS.md').read_text() == benchmark_report.render(FIGURES)


def test_a_device_without_figures_is_not_measured_and_its_figures_fill_the_gaps():
    alone = benchmark_report.render({'cpu': FIGURES['cpu']})
    assert alone.count('not measured') > 15 and 'tools/gpu_check.sh' in alone
    ratio = benchmark_report.cell(FIGURES['cpu']['data']['ratio_uint8'])
    assert re.search(rf"^\| over timm's uint8 path.*\| {re.escape(ratio)} \| not measured \|$", alone, re.M)
    both = benchmark_report.render({'cpu': FIGURES['cpu'], 'cuda': FIGURES['cpu']})
    assert 'not measured' not in both
    assert re.search(rf"^\| over timm's uint8 path.*\| {re.escape(ratio)} \| {re.escape(ratio)} \|$", both, re.M)


@pytest.mark.slow
def test_the_report_measures_every_subject(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_report, 'ROOT', tmp_path)
    (tmp_path / 'benchmarks').mkdir()
    monkeypatch.setitem(benchmark_report.MODELS, 'cpu', {
        'names': ['moganet_xtiny'], 'batch_size': 2, 'input_size': 64, 'inference': ['eager', 'fused'],
        'training': ['authors', 'eager']})
    benchmark_report.measure('cpu', rounds=1)
    kept = json.loads((tmp_path / 'benchmarks' / 'cpu.json').read_text())
    assert kept.keys() == FIGURES['cpu'].keys() and [row['form'] for row in kept['model']] == [
        'eager', 'fused', 'authors', 'eager']
    assert (tmp_path / 'BENCHMARKS.md').read_text() == benchmark_report.render({'cpu': kept})


def test_a_report_keeps_each_model_at_once_and_what_was_kept_of_the_same_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_report, 'ROOT', tmp_path)
    (tmp_path / 'benchmarks').mkdir()
    kept = tmp_path / 'benchmarks' / 'cpu.json'
    like, asked = FIGURES['cpu']['model'][0], []

    def measured(names, *, precisions, **_):
        asked.append((names, precisions))
        if names == ['gone']:
            raise KeyboardInterrupt
        return [{**like, 'model': name, 'precision': precision} for name in names for precision in precisions]

    monkeypatch.setattr(benchmark_report.benchmark_model, 'measure', measured)
    with pytest.raises(KeyboardInterrupt):
        benchmark_report.measure('cpu', subjects=['model'], models=['one', 'gone'], precisions=['fp32', 'bf16'])
    assert asked == [(['one'], ['fp32', 'bf16']), (['gone'], ['fp32', 'bf16'])]
    benchmark_report.measure('cpu', subjects=['model'], models=['two'], precisions=['bf16'])
    rows = [(row['model'], row['precision']) for row in json.loads(kept.read_text())['model']]
    assert rows == [('one', 'fp32'), ('one', 'bf16'), ('two', 'bf16')]
    assert '| CPU | two | bf16 |' in (tmp_path / 'BENCHMARKS.md').read_text()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {'machine': {'processor': 'another'}}))
    assert list(benchmark_report.measure('cpu', subjects=['model'], models=['two'])) == ['machine', 'model']
    assert [row['model'] for row in json.loads(kept.read_text())['model']] == ['two']


def test_every_depthwise_convolution_of_a_model_is_timed_in_both_layouts():
    assert benchmark_depthwise.shapes('moganet_small', input_size=224)[:4] == [
        (64, 5, 1, 56), (24, 5, 2, 56), (32, 7, 3, 56), (512, 3, 1, 56)]  # channels, kernel, dilation, side
    rows = benchmark_depthwise.measure('moganet_xtiny', batch_size=1, input_size=32, device='cpu',
                                       precisions=['fp32'], rounds=1)
    assert len(rows) == len(benchmark_depthwise.shapes('moganet_xtiny', input_size=32)) > 8
    for row in rows:
        assert row.keys() == {'convolution', 'precision', 'NHWC', 'NCHW', 'best', 'copy'}
        assert re.fullmatch(r'\d+ / \d+', row['NHWC']) and row['best'] in ('NHWC', 'NCHW')
