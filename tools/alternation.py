"""How measurements are taken: alternated, and as ratios with their spread.

A shared machine changes its speed within seconds. So a measurement alternates with what it is compared to: each ratio
is formed within a round, and is given with its spread over the rounds.
"""
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
PRECISIONS = ('fp32', 'bf16', 'fp16')
SUBJECTS = ('depthwise', 'model', 'data', 'engine', 'checkpoint', 'traffic')  # of the report, in its order


def spread(values: Sequence[float]) -> dict[str, float]:
    """{'median', 'min', 'max'}, three decimals."""
    return {name: round(of(values), 3) for name, of in (('median', statistics.median), ('min', min), ('max', max))}


def alternate(contenders: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, Row]:
    """Times each contender once a round, in turn, after one call that does not count.

    Returns:
        {contender: {'seconds': the median of a call, 'speedup': over the first contender, with its spread}}. A
        contender waits for its device itself.
    """
    for work in contenders.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    first = next(iter(taken.values()))
    return {
        name: {
            'seconds': statistics.median(each),
            'speedup': spread([a / b for a, b in zip(first, each, strict=True)]),
        }
        for name, each in taken.items()
    }
