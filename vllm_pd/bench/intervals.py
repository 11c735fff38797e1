"""Intervals of what was measured of requests that waited for each other. Pure.

Neighbours in a queue are alike, so requests are no independent sample, and a run that saw no
burst knows neither how dear one is nor how rare. Three things make up for that:

- Three runs or more are the blocks, fewer are cut into few long ones. Each is left out once (the
  jackknife), and Student's quantile is that of so few blocks. Parts of a run would agree on what
  was the same for all of it, such as the state of the machine then.
- Figures that are positive have intervals of their logarithms.
- The interval is longer on the side where bursts would lie: by the skewness of what requests
  contribute and by their memory, as in the corrections of t intervals for skewed samples
  (Johnson, 1978). How much longer was found by simulation.

Who looks only at runs that seem to remember little finds those that saw no burst. So a verdict
takes three runs, each of them a block, or eight blocks of full length; see ``Comparison``.

How often all this covers is told by ``benchmarks/interval_coverage.py``, and shown in
docs/performance.md. Percentiles far out have intervals of another kind; see ``tails``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from vllm_pd.bench.stats import LEVEL, Interval, Run, Statistic, Values, mean, memory, ratio

_MIN_RUNS = 3
"""Runs that are each a block: the quantile of Student's distribution is 4.3 for three, and 12.7
for two."""

_MIN_BLOCKS = 4
"""Blocks of fewer runs."""

_BLOCK_LEN = 80
"""Requests of a block that is no run, unless there are too few."""

_FULL_BLOCKS = 8
"""What fewer runs must have for a verdict. By simulation, at loads up to 84 %: then up to 8 % of
the verdicts on equal means are false, with four full blocks up to 15 %, with fewer up to 31 %."""

_DIGITS = 9
"""Of contributions; what differs by less is equal, and remembers nothing."""

_BURSTS = 3.0
"""How much longer an interval is where bursts would lie, per skewness and standard error."""

_MIN_INDEPENDENT = 8
"""Independent requests that those of all runs must be worth, unless each run is one block."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of one system.

    Attributes:
        interval: the figure with its interval.
        is_enough: as of a ``Comparison``.
    """

    interval: Interval
    is_enough: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One system against another on the same requests.

    Attributes:
        ratio: of their statistics, first over second.
        difference: the same, first minus second.
        is_enough: whether there were enough runs, or blocks that are long against their memory;
            if not, the intervals are not to be relied on.
    """

    ratio: Interval
    difference: Interval
    is_enough: bool


def intervals(runs: Sequence[Run], statistics: Sequence[Statistic]) -> list[Estimate]:
    """Return statistics of all values with their intervals; NaN bounds for a single request.

    Args:
        runs: one for each seed of the workload.
        statistics: of the values of all requests together; positive.
    """
    pool, blocks = _Pool(runs), _Blocks(_levels(runs), [len(run) for run in runs])
    return [
        Estimate(
            blocks.of_positive(
                statistic(pool.all()), [statistic(pool.without(one)) for one in blocks.ranges]
            ),
            blocks.are_enough,
        )
        for statistic in statistics
    ]


def paired(
    ours: Sequence[Run], theirs: Sequence[Run], statistics: Sequence[Statistic]
) -> list[Comparison]:
    """Compare statistics of two systems that were asked the same at the same times.

    The same requests of both are left out at a time, so what makes a request dear to
    both does not widen the interval.

    Raises:
        ValueError: they were not asked the same number of requests.
    """
    counts = [len(run) for run in ours]
    if counts != [len(run) for run in theirs]:
        raise ValueError("both systems must have been asked the same requests")
    pools = _Pool(ours), _Pool(theirs)
    pairs = _pairs(ours, theirs)
    blocks, plain = _Blocks(_contrasts(pairs), counts), _Blocks(_differences(pairs), counts)
    found = []
    for statistic in statistics:
        one, other = (statistic(pool.all()) for pool in pools)
        left = [[statistic(pool.without(part)) for pool in pools] for part in blocks.ranges]
        found.append(
            Comparison(
                ratio=blocks.of_positive(ratio(one, other), [ratio(a, b) for a, b in left]),
                difference=plain.of_any(one - other, [a - b for a, b in left]),
                is_enough=blocks.are_enough,
            )
        )
    return found


def block_ranges(counts: Sequence[int]) -> list[range]:
    """Return the runs, or blocks of neighbours if they are fewer than three.

    What changes from run to run would be in no interval if parts of one run counted as
    independent.

    Args:
        counts: requests of each run; blocks are counted through all runs.
    """
    if len(counts) < _MIN_RUNS:
        return part_ranges(counts)
    edges = [0, *itertools.accumulate(counts)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def part_ranges(counts: Sequence[int]) -> list[range]:
    """Return blocks of neighbours, of about equal length, of which none has some of two runs."""
    least = len(counts) if len(counts) >= _MIN_RUNS else _MIN_BLOCKS
    wanted = max(least, sum(counts) // _BLOCK_LEN)
    per_run = -(-wanted // max(len(counts), 1))
    found: list[range] = []
    start = 0
    for count in counts:
        edges = np.linspace(start, start + count, min(per_run, count) + 1).round().astype(int)
        found += [range(a, b) for a, b in itertools.pairwise(edges.tolist())]
        start += count
    return found


def has_blocks_enough(counts: Sequence[int]) -> bool:
    """Return whether runs of so many requests can have seen what a burst costs."""
    return len(counts) >= _MIN_RUNS or sum(counts) >= _FULL_BLOCKS * _BLOCK_LEN


def student(num_free: float) -> float:
    """Return the two-sided quantile of Student's distribution at ``LEVEL``.

    By the first terms of its expansion (Abramowitz and Stegun, 26.7.5): right to 1 % from
    two degrees of freedom on, and too small by 11 % for one.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / num_free**power for power, term in enumerate(terms, 1))


class _Blocks:
    """Runs in blocks of neighbours, and what is to be made of leaving one of them out.

    Args:
        contributions: what each request of a run that has any adds to the figure, in
            comparison with the mean.
        counts: requests of each run.
    """

    def __init__(self, contributions: Sequence[Values], counts: Sequence[int]) -> None:
        self.ranges = block_ranges(counts)
        contributions = [one.round(_DIGITS) for one in contributions]
        values = np.concatenate([np.zeros(0), *contributions])
        count = max(values.size, 1)
        remembered = max(sum(one.size * memory(one) for one in contributions) / count, 1.0)
        self._skewness = _skewness(values)
        self._longer = 1 + _BURSTS * abs(self._skewness) * math.sqrt((remembered - 1) / count)
        are_runs = len(self.ranges) == len(counts)  # which are independent
        self.are_enough = has_blocks_enough(counts) and (
            are_runs or count / remembered >= _MIN_INDEPENDENT
        )

    def of_positive(self, value: float, left: Sequence[float]) -> Interval:
        """Return the interval of a positive figure, by its logarithm.

        Args:
            value: of all requests.
            left: the same without each of the blocks.
        """
        if not all(0 < one < math.inf for one in (value, *left)):
            return Interval(value, math.nan, math.nan)
        found = self.of_any(math.log(value), [math.log(one) for one in left])
        return Interval(value, math.exp(found.low), math.exp(found.high))

    def of_any(self, value: float, left: Sequence[float]) -> Interval:
        """Return the interval of any figure."""
        num = len(left)
        if num < 2 or math.isnan(value):
            return Interval(value, math.nan, math.nan)
        deviations = np.asarray(left) - np.mean(left)
        half = student(num - 1) * math.sqrt((num - 1) / num * float((deviations**2).sum()))
        below = half * (self._longer if self._skewness < 0 else 1)
        above = half * (self._longer if self._skewness > 0 else 1)
        return Interval(value, value - below, value + above)


def _levels(runs: Sequence[Run]) -> list[Values]:
    """Return what each request that has any values adds to the logarithm of the mean."""
    return _contrasts(_pairs(runs, [[np.ones(1)] * len(run) for run in runs]))


def _pairs(ours: Sequence[Run], theirs: Sequence[Run]) -> list[Values]:
    """Return the means of each request that both answered, in two columns for each run."""
    return [
        np.asarray(
            [(a.mean(), b.mean()) for a, b in zip(*runs, strict=True) if a.size and b.size],
            dtype=np.float64,
        ).reshape(-1, 2)
        for runs in zip(ours, theirs, strict=True)
    ]


def _contrasts(pairs: Sequence[Values]) -> list[Values]:
    """Return what each request adds to the logarithm of the ratio of means."""
    first, second = np.concatenate([np.zeros((0, 2)), *pairs]).T
    means = mean(first) or 1.0, mean(second) or 1.0
    return [run[:, 0] / means[0] - run[:, 1] / means[1] for run in pairs]


def _differences(pairs: Sequence[Values]) -> list[Values]:
    """Return what each request adds to the difference of means."""
    return [run[:, 0] - run[:, 1] for run in pairs]


def _skewness(values: Values) -> float:
    deviations = values - mean(values)
    variance = mean(deviations**2)
    return mean(deviations**3) / variance**1.5 if variance > 0 else 0.0


class _Pool:
    """The values of all requests of some runs, of which a block can be left out quickly."""

    def __init__(self, runs: Sequence[Run]) -> None:
        every = (values for run in runs for values in run)
        self._values: Values = np.concatenate([np.zeros(0), *every])
        sizes = np.asarray([len(values) for run in runs for values in run], dtype=np.int64)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])

    def all(self) -> Values:
        """Return the values of every request."""
        return self._values

    def without(self, block: range) -> Values:
        """Return those of all requests but these, counted through all runs."""
        start, stop = self._starts[block.start], self._starts[block.stop]
        return np.concatenate([self._values[:start], self._values[stop:]])
