"""Intervals of percentiles against what is known: of simulated services that stall."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.interval_coverage import Queue, Stalls, of_latencies, of_stalls
from vllm_pd.bench.stats import Run
from vllm_pd.bench.tails import paired_tail, tail

NUM_SIMULATIONS = 100


def streams(count: int, *, stalled: int, stall_ms: float = 300.0) -> Run:
    """Return the gaps of requests, of which the first ``stalled`` were stalled once."""
    gaps = np.linspace(20.0, 21.0, 50)
    return [np.append(gaps, stall_ms if number < stalled else 20.5) for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize(("count", "runs"), [(640, 1), (100, 3), (20, 3)])
def test_p99_of_gaps_with_shared_stalls_is_covered_as_often_as_is_documented(
    rate: float, count: int, runs: int
) -> None:
    found = of_stalls(Stalls(rate, (300.0,)), count, runs, NUM_SIMULATIONS)
    assert found.enough >= 0.9
    assert found.missed <= 0.17


@pytest.mark.slow
def test_p99_of_two_queues_is_covered_where_there_is_a_verdict() -> None:
    found = of_latencies(Queue((0.56, 0.7)), 200, 3, NUM_SIMULATIONS, level=99)
    assert found.enough > 0.2
    assert found.missed <= 0.2  # of some thirty


def test_percentile_at_a_cliff_has_an_interval_that_spans_it() -> None:
    runs = [streams(100, stalled=number) for number in (20, 50, 80)]  # 1 % of all gaps
    found = tail(runs, 99).interval
    assert found.low < 22
    assert found.high == 300.0


def test_percentile_far_from_a_cliff_has_a_short_interval() -> None:
    runs = [streams(100, stalled=number, stall_ms=300 + number) for number in (98, 99, 100)]
    found = tail(runs, 90).interval
    assert 20 < found.low <= found.value <= found.high < 21


def test_what_the_machine_does_from_run_to_run_is_in_the_interval() -> None:
    order = [7 * number % 400 for number in range(400)]  # so that the parts of a run are alike
    alike, apart = (
        [
            [run[index] * (1 + 1e-6 * index) for index in order]
            for run in (streams(400, stalled=one) for one in stalled)
        ]
        for stalled in ((280, 281, 282), (80, 280, 400))
    )
    assert tail(alike, 99).interval.low >= 300.0
    assert tail(apart, 99).interval.low < 22


def test_few_requests_say_nothing_of_what_lies_beyond() -> None:
    few, many = ([[np.asarray([20.0 + n]) for n in range(count)]] * 3 for count in (99, 200))
    assert not paired_tail(few, few, 99).is_enough
    assert paired_tail(many, many, 99).is_enough


def test_fewer_requests_with_many_gaps_each_are_enough() -> None:
    few, many = ([streams(count, stalled=count)] * 3 for count in (19, 20))
    assert not paired_tail(few, few, 99).is_enough
    assert paired_tail(many, many, 99).is_enough


def test_systems_that_do_the_same_are_not_told_apart() -> None:
    runs = [
        [np.asarray([one]) for one in np.random.default_rng(seed).exponential(1.0, 200)]
        for seed in range(3)
    ]
    found = paired_tail(runs, runs, 99)
    assert found.ratio.low < found.ratio.value == 1.0 < found.ratio.high
    assert found.difference.low < found.difference.value == 0.0 < found.difference.high


def test_systems_with_different_requests_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same requests"):
        paired_tail([streams(3, stalled=0)], [streams(4, stalled=0)], 99)


def test_nothing_measured_has_no_bounds() -> None:
    found = tail([[np.zeros(0)] * 9], 99).interval
    assert math.isnan(found.value)
    assert math.isnan(found.low)
