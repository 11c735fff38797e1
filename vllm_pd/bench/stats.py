"""Summaries, proportions, and how long a run remembers. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Statistic = Callable[[Values], float]
Run = Sequence[Values]
"""What was measured of each request of one run, in the order of arrival: one value, or
several, or none."""

LEVEL = 0.95

_MOST_ALIKE = 0.97
"""Largest correlation of neighbours: beyond, a run of hundreds says as little as it can."""

FEW_FOR_P99 = 299
"""Requests below which a sample says nothing certain about the 99th percentile: with fewer
it is above all of them with a probability of more than 5 %."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A sample in figures; NaN where it is empty."""

    mean: float
    p50: float
    p90: float
    p99: float
    count: int


def summarize(values: Sequence[float] | Values) -> Summary:
    """Return mean and percentiles, interpolated linearly as numpy and ``vllm bench`` do."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return Summary(math.nan, math.nan, math.nan, math.nan, 0)
    p50, p90, p99 = np.percentile(array, (50, 90, 99))
    return Summary(float(array.mean()), float(p50), float(p90), float(p99), int(array.size))


def mean(values: Values) -> float:
    """Return the mean; NaN of nothing."""
    return float(values.mean()) if values.size else math.nan


def percentile(level: float) -> Statistic:
    """Return the statistic that takes a percentile, 0 to 100; NaN of nothing."""

    def take(values: Values) -> float:
        return float(np.percentile(values, level)) if values.size else math.nan

    return take


def wilson(share: float, count: float, level: float = LEVEL) -> Interval:
    """Return a proportion with Wilson's score interval (1927).

    Its coverage stays near the level close to 0 and 1, where that of the normal
    approximation collapses.

    Args:
        share: what was found.
        count: how many independent things it was found of, which may be a fraction.
        level: of the interval.

    Raises:
        ValueError: not 0 <= share <= 1, or nothing was counted.
    """
    if not (0 <= share <= 1 and count > 0):
        raise ValueError(f"{share} of {count} is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return Interval(share, low, high)


def memory(series: Values) -> float:
    """Return for how many requests neighbours are alike; 1 if they are not.

    That is the integrated autocorrelation time. Correlations are summed up to the first that is
    not positive; in a short series they are too small, so it is at least what the correlation of
    neighbours alone would give in an autoregressive series, corrected for its bias (Kendall, 1954).
    """
    count = series.size
    deviations = series - mean(series)
    variance = float((deviations**2).sum())
    if not variance > 0:
        return 1.0
    summed = 1.0
    for lag in range(1, count // 2):
        correlation = float((deviations[:-lag] * deviations[lag:]).sum()) / (1 - lag / count)
        if correlation <= 0:
            break
        summed += 2 * correlation / variance
    first = float((deviations[:-1] * deviations[1:]).sum()) / variance
    first = min(max(first + (1 + 4 * first) / count, 0.0), _MOST_ALIKE)
    return max(summed, (1 + first) / (1 - first))


def ratio(one: float, other: float) -> float:
    """Return the ratio of two figures of which none is negative; NaN of 0 to 0."""
    if other:
        return one / other
    return math.inf if one > 0 else math.nan
