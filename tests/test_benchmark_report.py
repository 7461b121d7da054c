"""BENCHMARKS.md says what the kept figures say, and 'not measured' where there are none."""
import json
import re

import pytest

from tools import benchmark_report
from tools.benchmark_report import ROOT

FIGURES = benchmark_report.load()


def test_benchmarks_md_is_what_the_kept_figures_make():
    assert (ROOT / 'BENCHMARKS.md').read_text() == benchmark_report.render(FIGURES)


def test_a_device_without_figures_is_not_measured_and_its_figures_fill_the_gaps():
    alone = benchmark_report.render({'cpu': FIGURES['cpu']})
    assert alone.count('not measured') > 20 and 'tools/gpu_check.sh' in alone
    ratio = benchmark_report.cell(FIGURES['cpu']['data']['ratio'])
    assert re.search(rf'^\| over the common pipeline.*\| {re.escape(ratio)} \| not measured \|$', alone, re.M)
    both = benchmark_report.render({'cpu': FIGURES['cpu'], 'cuda': FIGURES['cpu']})
    assert 'not measured' not in both
    assert re.search(rf'^\| over the common pipeline.*\| {re.escape(ratio)} \| {re.escape(ratio)} \|$', both, re.M)


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
