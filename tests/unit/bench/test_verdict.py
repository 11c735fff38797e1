from __future__ import annotations

import math

import pytest

from tests.unit.bench.queue import record
from vllm_pd.bench.stats import Interval
from vllm_pd.bench.verdict import STATISTICS, Verdict, compare, verdict_of


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.5, 0.9, Verdict.BETTER),
        (0.9, 1.1, Verdict.OPEN),
        (1.0, 1.1, Verdict.OPEN),
        (1.1, 1.5, Verdict.WORSE),
        (math.nan, math.nan, Verdict.OPEN),
    ],
)
def test_difference_counts_if_the_interval_excludes_1(
    low: float, high: float, verdict: Verdict
) -> None:
    assert verdict_of(Interval(1.0, low, high)) is verdict


def test_every_statistic_of_every_metric_is_compared() -> None:
    ours = [[record(due=float(n), ttft=0.1, gaps=[0.01, 0.02]) for n in range(300)]]
    theirs = [[record(due=float(n), ttft=0.2, gaps=[0.02, 0.04]) for n in range(300)]]
    findings = compare(ours, theirs, ("ttft", "itl"))
    assert len(findings) == 2 * len(STATISTICS)
    assert {finding.verdict for finding in findings} == {Verdict.BETTER}
    assert findings[0].name == "TTFT mean"
    assert findings[0].comparison.ratio.value == pytest.approx(0.5)
    assert findings[0].comparison.difference.value == pytest.approx(-100.0)


def test_p99_of_few_requests_has_no_verdict() -> None:
    ours = [[record(due=float(n), ttft=0.1) for n in range(298)]]
    theirs = [[record(due=float(n), ttft=0.2) for n in range(298)]]
    verdicts = {one.statistic: one.verdict for one in compare(ours, theirs, ("ttft",))}
    assert verdicts == {"mean": Verdict.BETTER, "P50": Verdict.BETTER, "P99": Verdict.FEW}
