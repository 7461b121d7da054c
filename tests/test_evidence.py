"""Intervals, tests, calibration and classes are what SciPy, or a plain loop, makes of the same images."""
import csv
import io
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks import evidence
from training.evaluation import Evaluated, compare, files_beside, placed

stats = pytest.importorskip('scipy.stats')
optimize = pytest.importorskip('scipy.optimize')


@pytest.mark.parametrize('right,count', [(0, 5), (5, 5), (3, 13), (1, 1), (39800, 50000)])
def test_interval_of_an_accuracy_is_scipys(right, count):
    theirs = stats.binomtest(right, count).proportion_ci(0.95, 'wilson')
    # % of one share, rounded in another order
    assert evidence.wilson(right, count) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-9)


@pytest.mark.parametrize('first,second', [(0, 0), (0, 6), (3, 9), (10, 10), (1020, 1130)])
def test_mcnemars_test_is_scipys(first, second):
    both = torch.tensor([True] * 7 + [False] * 5)
    one = torch.cat([both, torch.ones(first, dtype=bool), torch.zeros(second, dtype=bool)])
    other = torch.cat([both, torch.zeros(first, dtype=bool), torch.ones(second, dtype=bool)])
    theirs = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    # ours is the sum of whole numbers; SciPy's are of logarithms of the gamma function
    assert evidence.mcnemar(one, other) == (first, second, pytest.approx(theirs, rel=1e-9))


def test_calibration_error_is_that_of_a_loop_over_the_bins():
    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(500, generator=generator, dtype=torch.float64)
    confidences[:3] = torch.tensor([1.0, 1 / 15, 2 / 15])  # at the edges of bins, which belong to the lower one
    right = torch.rand(500, generator=generator) < confidences**2
    total = 0.0
    for i in range(15):
        inside = [k for k, value in enumerate(confidences.tolist()) if i / 15 < value <= (i + 1) / 15]
        if inside:
            accuracy, mean = right[inside].double().mean(), confidences[inside].mean()
            total += len(inside) / 500 * abs(float(accuracy - mean))
    assert evidence.calibration_error(confidences, right) == pytest.approx(100 * total, rel=1e-9)  # float64


@pytest.mark.parametrize('scale', [0.3, 1.0, 3.0])
def test_fitted_temperature_is_the_one_that_an_optimizer_finds(scale):
    generator = torch.Generator().manual_seed(1)
    true = 2 * torch.randn(600, 20, generator=generator)
    targets = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    logits = scale * true
    sums = sum(evidence.slopes(*part) for part in zip(logits.split(101), targets.split(101), strict=True))
    best = optimize.minimize_scalar(lambda factor: F.cross_entropy(factor * logits.double(), targets).item(),
                                    bounds=(0.1, 10), method='bounded', options={'xatol': 1e-9}).x
    assert evidence.temperature(sums.tolist()) == pytest.approx(1 / best, rel=1e-4)  # a cubic between the 33 points


def test_no_temperature_fits_where_all_are_right_or_numbers_are_none():
    logits = 5 * torch.eye(3)
    assert evidence.temperature(evidence.slopes(logits, torch.arange(3)).tolist()) is None
    assert evidence.temperature(evidence.slopes(logits * math.nan, torch.arange(3)).tolist()) is None


def test_classes_and_confusions_are_counted():
    targets, guesses = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 2])
    rows = evidence.class_rows(targets, guesses, ['ant', 'bee', 'cat'])
    assert [(row['name'], row['images'], row['right'], row['acc1'], row['taken_for'], row['times'])
            for row in rows] == [('ant', 4, 1, 25.0, 'bee', 2), ('cat', 2, 2, 100.0, '', 0)]
    assert (rows[0]['low'], rows[0]['high']) == evidence.wilson(1, 4)
    assert evidence.worst(rows)[0] == {'name': 'ant', 'images': 4, 'acc1': 25.0}
    assert evidence.confusions(targets, guesses, ['ant', 'bee', 'cat']) == [
        {'name': 'ant', 'taken_for': 'bee', 'times': 2}, {'name': 'ant', 'taken_for': 'cat', 'times': 1}]


def test_ten_of_many_classes_and_confusions_are_shown():
    targets = torch.arange(40).repeat_interleave(3)
    guesses = targets.clone()
    guesses[targets % 2 == 0] += 1
    names = [str(i) for i in range(41)]
    assert [row['name'] for row in evidence.worst(evidence.class_rows(targets, guesses, names))] == [
        str(i) for i in range(0, 20, 2)]
    assert len(evidence.confusions(targets, guesses, names)) == 10


def test_a_published_value_lies_within_the_interval_or_not():
    assert placed(79.6, [79.1, 80.2]) == ', within the 95 % interval 79.10 to 80.20'
    assert placed(79.0, [79.1, 80.2]).startswith(', below') and placed(81.0, [79.1, 80.2]).startswith(', above')
    assert placed(81.0, None) == ''


def test_only_other_checkpoints_on_the_same_images_are_compared(tmp_path):
    def one(checkpoint: int, same: str, right: list[int]) -> Evaluated:
        return Evaluated(tmp_path, {'checkpoint': f'{checkpoint}.pth'}, checkpoint, (same,), torch.tensor(right) > 0,
                         [{'name': 'ant', 'acc1': 50.0}])

    done = [one(0, 'val', [1, 1, 1, 1, 1, 1, 1, 0, 1, 1]), one(0, 'V2', [1] * 10),
            one(1, 'val', [0, 0, 0, 0, 0, 0, 0, 1, 0, 1])]
    for i in range(1, 4):
        compare(done[:i])
    assert 'compared' not in done[0].result and 'compared' not in done[1].result
    assert done[2].result['compared'] == [{'with': '0.pth', 'right_there_alone': 8, 'right_here_alone': 1,
                                           'p': pytest.approx(stats.binomtest(1, 9).pvalue, rel=1e-9)}]
    files = files_beside(done)
    bits = np.load(io.BytesIO(files['eval-bits.npz']))
    for result in done:
        assert np.array_equal(np.unpackbits(bits[result.result['bits']], count=10), result.right.numpy())
    rows = list(csv.DictReader(io.StringIO(files['eval-classes.csv'].decode())))
    assert [row['checkpoint'] for row in rows] == ['0.pth', '0.pth', '1.pth'] and rows[0]['name'] == 'ant'
