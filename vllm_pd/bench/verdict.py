"""Better, worse, or not to be told apart. Pure."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_pd.bench.intervals import Comparison, paired
from vllm_pd.bench.records import METRICS, Record, metric_values
from vllm_pd.bench.slo import Objectives
from vllm_pd.bench.stats import Interval, Run, mean, percentile
from vllm_pd.bench.tails import paired_tail

_NAMES = ("mean", "P50")
_STATISTICS = (mean, percentile(50))

THROUGHPUT, ATTAINMENT = "throughput", "SLO attainment"


class Verdict(enum.Enum):
    """What an interval says."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "not distinguishable"
    FEW = "too few requests to tell"
    WITHHELD = "no verdict, as other requests failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure of one system against another.

    Attributes:
        name: for people: a latency with its statistic, ``THROUGHPUT`` or ``ATTAINMENT``.
        comparison: ratio and difference, ours against theirs.
        is_paired: whether the same requests were answered by both. Those that fail are
            often the slow ones, so leaving them out on one side makes that side look good.
        is_more_better: whether more is better.
    """

    name: str
    comparison: Comparison
    is_paired: bool
    is_more_better: bool = False

    @property
    def is_difference(self) -> bool:
        """Whether it is a difference: of SLO attainments, of which theirs may be 0."""
        return self.name == ATTAINMENT

    @property
    def interval(self) -> Interval:
        """What is shown and judged: ratio or difference."""
        return self.comparison.difference if self.is_difference else self.comparison.ratio

    @property
    def verdict(self) -> Verdict:
        """What can be said."""
        if not self.is_paired:
            return Verdict.WITHHELD
        if not self.comparison.is_enough:
            return Verdict.FEW
        same = 0.0 if self.is_difference else 1.0
        return verdict_of(self.interval, same=same, is_more_better=self.is_more_better)


def verdict_of(interval: Interval, *, same: float = 1.0, is_more_better: bool = False) -> Verdict:
    """Return what an interval says.

    Args:
        interval: of a ratio or a difference.
        same: what equal systems have, which must be outside.
        is_more_better: whether what is above that is better.
    """
    if math.isnan(interval.low) or interval.low <= same <= interval.high:
        return Verdict.OPEN
    return Verdict.BETTER if (interval.low > same) is is_more_better else Verdict.WORSE


def compare(
    ours: Sequence[Sequence[Record]], theirs: Sequence[Sequence[Record]], metrics: Sequence[str]
) -> list[Finding]:
    """Compare latencies of two systems that were asked the same requests at the same times.

    Args:
        ours: records of each seed.
        theirs: those of the other system, of the same seeds.
        metrics: which latencies, of ``METRICS``.
    """
    is_paired = is_answered_alike(ours, theirs)
    findings = []
    for metric in metrics:
        first, second = ([metric_values(run, metric) for run in runs] for runs in (ours, theirs))
        compared = paired(first, second, _STATISTICS)
        findings += [
            Finding(f"{METRICS[metric]} {name}", one, is_paired)
            for name, one in zip(_NAMES, compared, strict=True)
        ]
        tail = paired_tail(first, second, 99)
        findings.append(Finding(f"{METRICS[metric]} P99", tail, is_paired))
    return findings


def compare_attainment(
    ours: Sequence[Sequence[Record]], theirs: Sequence[Sequence[Record]], objectives: Objectives
) -> Finding:
    """Compare the parts of the same requests that met all objectives; one that failed did not."""
    first, second = (
        [[np.asarray([float(objectives.are_met_by(one))]) for one in run] for run in runs]
        for runs in (ours, theirs)
    )
    (found,) = paired(first, second, [mean])
    return Finding(ATTAINMENT, found, is_paired=True, is_more_better=True)


def compare_throughput(ours: Sequence[Run], theirs: Sequence[Run], *, is_paired: bool) -> Finding:
    """Compare answers per second.

    Args:
        ours: of each seed, the rates in equal parts of the same time; see ``answer_rates``.
        theirs: those of the other system.
        is_paired: whether both answered the same requests.
    """
    (found,) = paired(ours, theirs, [mean])
    return Finding(THROUGHPUT, found, is_paired, is_more_better=True)


def is_answered_alike(ours: Sequence[Sequence[Record]], theirs: Sequence[Sequence[Record]]) -> bool:
    """Return whether both systems failed the same requests, or none."""
    first, second = ([[one.is_ok for one in run] for run in runs] for runs in (ours, theirs))
    return first == second
