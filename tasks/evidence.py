"""What the single images of an evaluation tell: intervals, calibration, single classes, whether two models differ."""
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHOWN = 10  # of the worst classes, and of the commonest confusions
BINS = 15  # of the calibration error, as in arXiv 1706.04599
# 1 / temperature, from 1/8 to 8: 14 % from one to the next, between which a cubic finds the fitted one to 1e-5
SHARPNESS = torch.logspace(-3, 3, 33, base=2)


# ---- Accuracies -----------------------------------------------------------------------------------------------------

def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, % (Wilson's score interval, Brown, Cai and DasGupta 2001)."""
    z = NormalDist().inv_cdf(0.975)
    share, extra = right / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * share * (1 - share) + extra**2 / 4) / (1 + extra)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def mcnemar(one: Tensor, other: Tensor) -> tuple[int, int, float]:
    """McNemar's exact test of two models on the same images.

    Args:
        one: bool [images], which the first model has right.
        other: the same of the second.

    Returns:
        how many the first alone has right, and the second alone; and the probability that as uneven a share, or a more
        uneven one, comes of chance where both models are equally good: two-sided, binomial, exact.
    """
    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    apart, term, total = first + second, 1, 1  # whole numbers of any length: the sum of binomial coefficients
    for k in range(1, min(first, second) + 1):
        term = term * (apart - k + 1) // k
        total += term
    return first, second, min(1.0, 2 * total / 2**apart)


# ---- Calibration ----------------------------------------------------------------------------------------------------

def calibration_error(confidences: Tensor, right: Tensor) -> float:
    """The expected calibration error, %: how far accuracy and mean confidence are apart in a bin, over the images.

    Args:
        confidences: float [images], probability of the likeliest class.
        right: bool [images].
    """
    bins = (confidences * BINS).ceil().long().clamp(1, BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right.double() - confidences.double())
    return 100 * (gaps.abs().sum() / len(right)).item()


def slopes(logits: Tensor, targets: Tensor) -> Tensor:
    """The slope of the cross-entropy, summed over a batch, in the factor on the logits, at `SHARPNESS`, [33].

    It rises with the factor, and is zero at the one that fits best. Sums of it are all that a fit over many batches,
    on many ranks, needs.
    """
    shifted = logits - logits.amax(1, keepdim=True)
    of_target = shifted.gather(1, targets[:, None])[:, 0]
    return torch.stack([((factor * shifted).softmax(1) * shifted).sum(1).sub(of_target).sum()
                        for factor in SHARPNESS.tolist()])


def temperature(sums: Sequence[float]) -> float | None:
    """The temperature by which to divide the logits for the least cross-entropy; None beyond 1/8 and 8.

    Args:
        sums: of `slopes` over the images.
    """
    after = next((i for i, value in enumerate(sums) if value > 0), 0)
    if not 0 < after < len(sums) or not all(map(math.isfinite, sums)):
        return None
    first = min(max(after - 2, 0), len(sums) - 4)  # of the four points around it
    where, values = np.log2(SHARPNESS.double().numpy()[first:first + 4]), np.array(sums[first:first + 4])
    low, high = where[after - 1 - first], where[after - first]
    scale = np.abs(values).max()
    roots = np.roots(np.polyfit(where - low, values / scale, 3))
    inside = [root.real for root in roots if abs(root.imag) < 1e-9 and -1e-9 <= root.real <= high - low + 1e-9]
    return float(2 ** -(low + inside[0])) if inside else None


# ---- Single classes -------------------------------------------------------------------------------------------------

def class_rows(targets: Tensor, guesses: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes that have images, in the order of their labels: accuracy with its interval, commonest wrong guess."""
    rows = []
    for label in targets.unique().tolist():
        guessed = guesses[targets == label]
        right = int((guessed == label).sum())
        low, high = wilson(right, len(guessed))
        wrong, times = guessed[guessed != label].unique(return_counts=True)
        most = int(times.argmax()) if len(times) else None
        rows.append({'class': label, 'name': names[label], 'images': len(guessed), 'right': right,
                     'acc1': 100 * right / len(guessed), 'low': low, 'high': high,
                     'taken_for': '' if most is None else names[int(wrong[most])],
                     'times': 0 if most is None else int(times[most])})
    return rows


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, images and accuracy of the classes with the lowest accuracy, the lowest first."""
    ranked = sorted(rows, key=lambda row: (row['acc1'], row['class']))
    return [{name: row[name] for name in ('name', 'images', 'acc1')} for row in ranked[:SHOWN]]


def confusions(targets: Tensor, guesses: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """The commonest pairs of a class and another for which it was taken, the commonest first."""
    wrong = targets != guesses
    pairs, times = torch.stack([targets[wrong], guesses[wrong]], 1).unique(dim=0, return_counts=True)
    order = times.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return [{'name': names[int(pairs[i, 0])], 'taken_for': names[int(pairs[i, 1])], 'times': int(times[i])}
            for i in order]
