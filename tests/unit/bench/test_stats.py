from __future__ import annotations

import math

import numpy as np
import pytest

from tests.unit.bench.queue import serve
from vllm_pd.bench.arrivals import gamma_arrivals
from vllm_pd.bench.records import metric_values
from vllm_pd.bench.stats import (
    Run,
    bootstrap,
    interval_of,
    mean,
    memory,
    paired_bootstrap,
    percentile,
    redrawn,
    summarize,
    wilson,
)


def run_of(values: np.ndarray) -> Run:
    return [np.asarray([value]) for value in values]


def test_percentiles_of_known_numbers() -> None:
    found = summarize(range(1, 102))
    assert (found.mean, found.p50, found.p90, found.p99) == (51, 51, 91, 100)


def test_percentiles_between_two_numbers_are_interpolated() -> None:
    assert summarize([0.0, 10.0]).p90 == pytest.approx(9.0)


def test_nothing_has_no_figures() -> None:
    found = summarize([])
    assert found.count == 0
    assert math.isnan(found.mean)
    assert math.isnan(found.p99)


def test_wilson_interval_of_a_known_case() -> None:
    # Newcombe (1998), example: 81 of 263.
    found = wilson(81, 263)
    assert [found.low, found.high] == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_wilson_interval_keeps_within_0_and_1() -> None:
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 1.0
    assert wilson(20, 20).low == pytest.approx(1 / (1 + 1.959964**2 / 20), abs=1e-6)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, count)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_wilson_interval_covers_the_truth_as_often_as_it_says(share: float) -> None:
    draws = np.random.default_rng(5).binomial(200, share, 4000)
    covered = [wilson(int(k), 200).low <= share <= wilson(int(k), 200).high for k in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(17)
    covered = 0
    for number in range(300):
        (found,) = bootstrap([run_of(rng.exponential(1.0, 200))], [mean], seed=number, num=200)
        covered += found.low <= 1.0 <= found.high
    assert covered / 300 == pytest.approx(0.94, abs=0.04)


@pytest.mark.slow
def test_blocks_cover_the_truth_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(23)
    covered = 0
    for number in range(200):
        noise = rng.normal(size=1001)
        (found,) = bootstrap([run_of(noise[1:] + 0.5 * noise[:-1])], [mean], seed=number, num=200)
        covered += found.low <= 0.0 <= found.high
    assert covered / 200 >= 0.88  # 0.79 for values redrawn one by one


def queue(seed: int, count: int, service_s: float) -> Run:
    """Return latencies of an M/D/1 queue with 7 arrivals a second, once it has filled up."""
    arrivals = gamma_arrivals(2 * count, 7.0, 1.0, np.random.default_rng(seed))
    return metric_values(serve(arrivals.tolist(), service_s)[count:], "ttft")


def mean_of_queue(service_s: float) -> float:
    """Return the mean latency by Pollaczek and Khinchine, in milliseconds."""
    load = 7.0 * service_s
    return 1e3 * service_s * (1 + load / (2 * (1 - load)))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "least"), [(40, 0.68), (120, 0.72), (400, 0.8)])
def test_interval_of_a_queues_mean_covers_as_often_as_is_documented(
    count: int, least: float
) -> None:
    covered = 0
    for seed in range(200):
        (found,) = bootstrap([queue(seed, count, 0.1)], [mean], seed=seed, num=200)
        covered += found.low <= mean_of_queue(0.1) <= found.high
    assert covered / 200 >= least  # 0.57, 0.57, 0.63 with blocks of the cube root


@pytest.mark.slow
@pytest.mark.parametrize(("count", "least"), [(120, 0.65), (400, 0.74)])
def test_paired_ratio_of_two_queues_covers_as_often_as_is_documented(
    count: int, least: float
) -> None:
    covered = 0
    for seed in range(200):
        ours, theirs = queue(seed, count, 0.08), queue(seed, count, 0.1)
        (found,) = paired_bootstrap([ours], [theirs], [mean], seed=seed, num=200)
        true = mean_of_queue(0.08) / mean_of_queue(0.1)
        covered += found.ratio.low <= true <= found.ratio.high
    assert covered / 200 >= least


def test_memory_of_what_is_independent_is_one_and_of_a_queue_more() -> None:
    assert memory(np.random.default_rng(1).normal(size=2000)) < 1.3
    assert memory(np.concatenate(queue(1, 2000, 0.1))) > 4


@pytest.mark.slow
def test_paired_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(29)
    covered = 0
    for number in range(200):
        common = rng.exponential(10.0, 150)  # what makes a request dear to both
        ours, theirs = common + rng.normal(1.0, 1.0, 150), common + rng.normal(0.0, 1.0, 150)
        (found,) = paired_bootstrap([run_of(ours)], [run_of(theirs)], [mean], seed=number, num=200)
        covered += found.difference.low <= 1.0 <= found.difference.high
    assert covered / 200 == pytest.approx(0.94, abs=0.04)


def test_pairing_removes_what_both_have_in_common() -> None:
    rng = np.random.default_rng(31)
    common = rng.exponential(10.0, 300)
    ours, theirs = common + rng.normal(1.0, 0.1, 300), common
    paired = paired_bootstrap([run_of(ours)], [run_of(theirs)], [mean], seed=1)[0].difference
    (alone,) = bootstrap([run_of(ours)], [mean], seed=1)
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_systems_that_do_the_same_are_not_told_apart() -> None:
    runs = [run_of(np.random.default_rng(seed).exponential(1.0, 100)) for seed in range(3)]
    (found,) = paired_bootstrap(runs, runs, [percentile(99)], seed=1)
    assert (found.ratio.low, found.ratio.value, found.ratio.high) == (1.0, 1.0, 1.0)


def test_systems_with_different_requests_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same requests"):
        paired_bootstrap([run_of(np.ones(3))], [run_of(np.ones(4))], [mean], seed=1)


def test_requests_may_have_several_values_or_none() -> None:
    runs = [[np.asarray([1.0, 3.0]), np.zeros(0), np.asarray([5.0])]]
    assert bootstrap(runs, [mean], seed=1)[0].value == 3.0


def test_redrawing_keeps_neighbours_together() -> None:
    drawn = redrawn(1000, np.random.default_rng(1))
    steps = (np.diff(drawn) % 1000 == 1).mean()
    assert len(drawn) == 1000
    assert steps == pytest.approx(0.9, abs=0.01)


def test_interval_counts_a_ratio_to_nothing_as_infinite() -> None:
    found = interval_of(2.0, [*np.linspace(1.0, 3.0, 90), *[math.inf] * 10])
    assert found.high == math.inf
    assert 1.0 < found.low < 1.2


def test_interval_of_nothing_finite_has_no_bounds() -> None:
    found = interval_of(1.0, [math.nan])
    assert math.isnan(found.low)
    assert math.isnan(found.high)
