from __future__ import annotations

import math

import numpy as np
import pytest

from tests.unit.bench.queue import record
from vllm_pd.bench.records import Record
from vllm_pd.bench.slo import Objectives
from vllm_pd.bench.stats import Interval, Run
from vllm_pd.bench.verdict import (
    Verdict,
    compare,
    compare_attainment,
    compare_throughput,
    verdict_of,
)


def answered(ttft: float, *, gaps: tuple[float, ...] = (), count: int = 660) -> list[Record]:
    return [record(due=float(n), ttft=ttft, gaps=gaps) for n in range(count)]


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


def test_verdict_of_a_difference_where_more_is_better() -> None:
    assert verdict_of(Interval(0.2, 0.1, 0.3), same=0.0, is_more_better=True) is Verdict.BETTER
    assert verdict_of(Interval(-0.2, -0.3, -0.1), same=0.0, is_more_better=True) is Verdict.WORSE
    assert verdict_of(Interval(0.0, 0.0, 0.0), same=0.0, is_more_better=True) is Verdict.OPEN


def test_every_statistic_of_every_metric_is_compared() -> None:
    ours, theirs = answered(0.1, gaps=(0.01, 0.02)), answered(0.2, gaps=(0.02, 0.04))
    findings = compare([ours], [theirs], ("ttft", "itl"))
    assert len(findings) == 2 * 3
    assert {finding.verdict for finding in findings} == {Verdict.BETTER}
    assert findings[0].name == "TTFT mean"
    assert findings[0].comparison.ratio.value == pytest.approx(0.5)
    assert findings[0].comparison.difference.value == pytest.approx(-100.0)


def test_p99_of_few_requests_has_no_verdict() -> None:
    ours, theirs = ([answered(ttft, count=90)] * 3 for ttft in (0.1, 0.2))
    found = compare(ours, theirs, ("ttft",))
    assert {one.name: one.verdict for one in found} == {
        "TTFT mean": Verdict.BETTER,
        "TTFT P50": Verdict.BETTER,
        "TTFT P99": Verdict.FEW,
    }


def test_p99_of_many_tokens_of_few_requests_has_no_verdict() -> None:
    ours, theirs = ([answered(0.1, gaps=(gap,) * 50, count=19)] * 3 for gap in (0.01, 0.02))
    verdicts = {one.name: one.verdict for one in compare(ours, theirs, ("itl",))}
    assert verdicts["ITL mean"] is Verdict.BETTER
    assert verdicts["ITL P99"] is Verdict.FEW


def test_run_that_is_short_against_its_memory_has_no_verdict() -> None:
    drift = [record(due=float(n), ttft=0.1 + 0.01 * n) for n in range(660)]
    (mean, *_) = compare([drift], [answered(1.0)], ("ttft",))
    assert mean.verdict is Verdict.FEW


def test_part_that_met_the_objectives_is_better_where_it_is_larger() -> None:
    ours = [answered(0.1)]
    theirs = [[record(due=float(n), ttft=0.1 if n % 3 else 0.5) for n in range(660)]]
    found = compare_attainment(ours, theirs, Objectives(ttft_ms=200))
    assert found.verdict is Verdict.BETTER
    assert found.comparison.difference.value == pytest.approx(1 / 3)


def test_requests_that_failed_missed_their_objectives() -> None:
    theirs = [[record(due=float(n), error="" if n % 3 else "lost") for n in range(660)]]
    found = compare_attainment([answered(0.1)], theirs, Objectives(ttft_ms=200))
    assert found.verdict is Verdict.BETTER


def rates(*values: float) -> list[Run]:
    return [[np.asarray([value])] for value in values]


def test_throughput_of_backlogs_needs_several_seeds() -> None:
    ours, theirs = rates(2.0, 2.1, 2.05), rates(1.0, 1.02, 0.99)
    assert compare_throughput(ours, theirs, is_paired=True).verdict is Verdict.BETTER
    assert compare_throughput(ours[:2], theirs[:2], is_paired=True).verdict is Verdict.FEW
    assert compare_throughput(ours, theirs, is_paired=False).verdict is Verdict.WITHHELD


def test_throughput_is_judged_by_the_ratio_that_is_shown() -> None:
    ours, theirs = rates(2.0, 2.1, 4.0), rates(1.0, 1.05, 1.1)
    found = compare_throughput(ours, theirs, is_paired=True)
    assert found.interval == found.comparison.ratio
    assert found.verdict is verdict_of(found.interval, is_more_better=True)


def test_attainment_is_judged_by_the_difference_as_theirs_may_be_nothing() -> None:
    theirs = [[record(due=float(n), ttft=0.5) for n in range(660)]]
    found = compare_attainment([answered(0.1)], theirs, Objectives(ttft_ms=200))
    assert found.interval == found.comparison.difference
    assert found.verdict is Verdict.BETTER
