from __future__ import annotations

import math

import numpy as np
import pytest

from tests.unit.bench.queue import serve
from vllm_pd.bench.arrivals import gamma_arrivals
from vllm_pd.bench.records import pooled
from vllm_pd.bench.stats import memory, summarize, wilson


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
    found = wilson(81 / 263, 263)
    assert [found.low, found.high] == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_wilson_interval_keeps_within_0_and_1() -> None:
    assert wilson(0.0, 20).low == 0.0
    assert wilson(1.0, 20).high == 1.0
    assert wilson(1.0, 20).low == pytest.approx(1 / (1 + 1.959964**2 / 20), abs=1e-6)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0.0), (1.5, 2.0), (-0.1, 5.0)])
def test_wilson_refuses_what_is_no_proportion(share: float, count: float) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(share, count)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_wilson_interval_covers_the_truth_as_often_as_it_says(share: float) -> None:
    draws = np.random.default_rng(5).binomial(200, share, 4000) / 200
    found = [wilson(float(one), 200) for one in draws]
    covered = [one.low <= share <= one.high for one in found]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_memory_of_what_is_independent_is_small_and_of_a_queue_not() -> None:
    assert memory(np.random.default_rng(1).normal(size=2000)) < 1.3
    arrivals = gamma_arrivals(2000, 7.0, 1.0, np.random.default_rng(1))
    assert memory(np.asarray(pooled(serve(arrivals.tolist(), 0.1), "ttft"))) > 4


def test_what_never_changes_is_not_said_to_remember() -> None:
    assert memory(np.ones(50)) == 1.0
    assert memory(np.zeros(0)) == 1.0
