"""Better, worse, or not to be told apart. Pure."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_pd.bench.records import METRICS, Record, metric_values
from vllm_pd.bench.stats import (
    FEW_FOR_P99,
    Comparison,
    Interval,
    Statistic,
    mean,
    paired_bootstrap,
    percentile,
)

STATISTICS: dict[str, Statistic] = {"mean": mean, "P50": percentile(50), "P99": percentile(99)}


class Verdict(enum.Enum):
    """What an interval of a ratio says, where less is better."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "not distinguishable"
    FEW = "too few requests to tell"
    WITHHELD = "no verdict, as other requests failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One latency of one system against another.

    Attributes:
        metric: one of ``METRICS``.
        statistic: one of ``STATISTICS``.
        comparison: ratio and difference in milliseconds, ours against theirs.
        is_paired: whether the same requests were answered by both. Those that fail are
            often the slow ones, so leaving them out on one side makes that side look good.
        count: requests of each system.
    """

    metric: str
    statistic: str
    comparison: Comparison
    is_paired: bool
    count: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{METRICS[self.metric]} {self.statistic}"

    @property
    def verdict(self) -> Verdict:
        """What can be said."""
        if not self.is_paired:
            return Verdict.WITHHELD
        if self.statistic == "P99" and self.count < FEW_FOR_P99:
            return Verdict.FEW
        return verdict_of(self.comparison.ratio)


def verdict_of(ratio: Interval) -> Verdict:
    """Return what the interval of a ratio says, where less is better; 1 must be outside."""
    if math.isnan(ratio.low) or ratio.low <= 1 <= ratio.high:
        return Verdict.OPEN
    return Verdict.BETTER if ratio.high < 1 else Verdict.WORSE


def compare(
    ours: Sequence[Sequence[Record]],
    theirs: Sequence[Sequence[Record]],
    metrics: Sequence[str],
    *,
    seed: int = 1,
) -> list[Finding]:
    """Compare two systems that were asked the same requests at the same times.

    Args:
        ours: records of each seed.
        theirs: those of the other system, of the same seeds.
        metrics: which latencies.
        seed: of the bootstrap.
    """
    count = sum(len(run) for run in ours)
    is_paired = _answered(ours) == _answered(theirs)
    findings = []
    for metric in metrics:
        first, second = ([metric_values(run, metric) for run in runs] for runs in (ours, theirs))
        compared = paired_bootstrap(first, second, list(STATISTICS.values()), seed=seed)
        findings += [
            Finding(metric, name, one, is_paired, count)
            for name, one in zip(STATISTICS, compared, strict=True)
        ]
    return findings


def _answered(runs: Sequence[Sequence[Record]]) -> list[list[bool]]:
    return [[record.is_ok for record in run] for run in runs]
