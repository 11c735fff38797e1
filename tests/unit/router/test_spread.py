from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.router.spread import BOUNDS, Spread, bucket_of

DURATIONS = st.lists(st.floats(min_value=1e-5, max_value=899.0), min_size=1)


def spread_of(*seconds: float) -> Spread:
    spread = Spread()
    spread.add([bucket_of(one) for one in seconds], math.fsum(seconds))
    return spread


def test_nothing_has_no_percentiles() -> None:
    assert Spread().quantile(0.5) is None


@given(DURATIONS, st.sampled_from([0.5, 0.9, 0.99]))
def test_percentiles_are_right_within_a_bucket(seconds: list[float], share: float) -> None:
    found = spread_of(*seconds).quantile(share)
    exact = sorted(seconds)[math.ceil(share * len(seconds)) - 1]
    assert found is not None
    assert exact / 1.15 <= found <= exact * 1.15 or bucket_of(found) == bucket_of(exact) == 0


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    assert BOUNDS[bucket_of(0.025)] == 0.025
    assert spread_of(0.025).cumulative([0.02, 0.025, 0.05]) == [0, 1, 1]


@given(DURATIONS)
def test_cumulative_counts_are_those_of_a_histogram(seconds: list[float]) -> None:
    bounds = [0.001, 0.25, 10.0]
    expected = [sum(value <= bound for value in seconds) for bound in bounds]
    assert spread_of(*seconds).cumulative(bounds) == expected


def test_what_is_beyond_the_last_bound_counts() -> None:
    spread = spread_of(5000.0)
    assert (spread.num, spread.total_s) == (1, 5000.0)
    assert spread.quantile(0.5) == BOUNDS[-1]


def test_merged_spreads_are_one() -> None:
    both, one = spread_of(0.1, 0.2), spread_of(0.1)
    one.merge(spread_of(0.2))
    assert one.num == both.num
    assert one.total_s == pytest.approx(both.total_s)
    assert one.cumulative(BOUNDS) == both.cumulative(BOUNDS)
