"""Intervals of percentiles of what was measured of requests that waited for each other. Pure.

One prefill stalls every stream at once, so thousands of tokens may stand for a handful of events,
and a percentile may lie at a cliff: below it no token was stalled, above it all were. There the
percentile itself tells nothing of its spread, and leaving out blocks of requests, as ``intervals``
does for means, often misses it. So what gets an interval is the part of the values that lie
beyond the percentile: by blocks of requests, with Student's quantile, and by its logarithm, as a
small part has a long tail. Where that interval ends in the sample, the percentile's ends (Woodruff,
1952). A P99 would need tens of runs if they were the blocks, so blocks are parts of runs; but what
runs differ by more than their parts let expect, as when the machine changes meanwhile, is added,
and known as badly as so few runs can tell it (Satterthwaite, 1946). The interval of a ratio is made
of those of both systems (Zou and Donner, 2008) as if they were independent, so what they have in
common makes it longer than it had to be.

How often it covers is told by ``benchmarks/interval_coverage.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vllm_pd.bench.intervals import (
    Comparison,
    Estimate,
    block_ranges,
    has_blocks_enough,
    part_ranges,
    student,
)
from vllm_pd.bench.stats import LEVEL, Interval, Run, Values, ratio

FEW_WITH_MANY = 60
"""Requests with many values each, such as gaps between tokens, from which on a percentile gets a
verdict. By simulation, intervals then cover in 90 % of the cases or more; of 36 in 88 %."""


def tail(runs: Sequence[Run], level: float) -> Estimate:
    """Return a percentile of all values with its interval.

    It is enough of requests with one value each if they are hardly all below the percentile, and
    if some of them lie beyond the upper end. Of requests with many values, such as the gaps between
    tokens, each has met several prefills of others, so fewer are enough.

    Args:
        runs: one for each seed of the workload.
        level: 0 to 100, both excluded.
    """
    requests = [values for run in runs for values in run]
    every = np.concatenate([np.zeros(0), *requests])
    counts = [len(run) for run in runs]
    if not every.size or len(part_ranges(counts)) < 2:
        value = float(np.percentile(every, level)) if every.size else math.nan
        return Estimate(Interval(value, math.nan, math.nan), is_enough=False)
    value = float(np.percentile(every, level))
    beyond = 1 - level / 100
    # What each request has beyond the percentile more than its part.
    surplus = np.asarray([float((one > value).sum()) - beyond * one.size for one in requests])
    error, num_free = _error(surplus, counts)
    factor = math.exp(student(num_free) * error / (every.size * beyond))
    low, high = np.percentile(
        every, (100 * (1 - min(beyond * factor, 1.0)), 100 * (1 - beyond / factor))
    )
    answered = sum(one.size > 0 for one in requests)
    has_many = every.size > answered
    is_seen = answered >= FEW_WITH_MANY if has_many else (level / 100) ** answered <= 1 - LEVEL
    some_beyond = every.size * beyond / factor >= 1
    is_enough = has_blocks_enough(counts) and is_seen and some_beyond
    return Estimate(Interval(value, float(low), float(high)), is_enough)


def _error(surplus: Values, counts: Sequence[int]) -> tuple[float, float]:
    """Return the standard error of a sum, and with how many degrees of freedom it is known.

    Args:
        surplus: what each request adds, counted through all runs.
        counts: requests of each run.
    """
    parts, blocks = part_ranges(counts), block_ranges(counts)
    within = _variance(surplus, parts)
    more = max(_variance(surplus, blocks) - within, 0.0)  # of runs, than of their parts
    if not within + more:
        return 0.0, len(parts) - 1
    doubt = within**2 / (len(parts) - 1) + more**2 / (len(blocks) - 1)
    return math.sqrt(within + more), (within + more) ** 2 / doubt


def _variance(surplus: Values, ranges: Sequence[range]) -> float:
    blocks = np.asarray([surplus[one.start : one.stop].sum() for one in ranges])
    return len(ranges) * float(blocks.var(ddof=1))


def paired_tail(ours: Sequence[Run], theirs: Sequence[Run], level: float) -> Comparison:
    """Compare a percentile of two systems that were asked the same at the same times.

    Raises:
        ValueError: they were not asked the same number of requests.
    """
    if [len(run) for run in ours] != [len(run) for run in theirs]:
        raise ValueError("both systems must have been asked the same requests")
    first, second = tail(ours, level), tail(theirs, level)
    return Comparison(
        ratio=_ratio(first.interval, second.interval),
        difference=_difference(first.interval, second.interval),
        is_enough=first.is_enough and second.is_enough,
    )


def _difference(one: Interval, other: Interval) -> Interval:
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    value = one.value - other.value
    return Interval(value, value - below, value + above)


def _ratio(one: Interval, other: Interval) -> Interval:
    value = ratio(one.value, other.value)
    if not all(0 < bound < math.inf for bound in (one.low, one.high, other.low, other.high)):
        return Interval(value, math.nan, math.nan)
    found = _difference(_logarithm(one), _logarithm(other))
    return Interval(value, math.exp(found.low), math.exp(found.high))


def _logarithm(one: Interval) -> Interval:
    return Interval(math.log(one.value), math.log(one.low), math.log(one.high))
