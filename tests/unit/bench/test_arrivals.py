from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_pd.bench.arrivals import gamma_arrivals, replayed
from vllm_pd.errors import ConfigError


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(gamma_arrivals(400_000, 5.0, cv, np.random.default_rng(7)))
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_first_request_arrives_at_zero() -> None:
    assert gamma_arrivals(3, 1.0, 1.0, np.random.default_rng(1))[0] == 0.0


def test_infinite_rate_is_all_at_once() -> None:
    assert gamma_arrivals(3, math.inf, 1.0, np.random.default_rng(1)).tolist() == [0.0] * 3


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(ConfigError, match="not positive"):
        gamma_arrivals(3, rate, 1.0, np.random.default_rng(1))
    with pytest.raises(ConfigError, match="not positive"):
        replayed([0.0, 1.0], rate)


def test_trace_is_replayed_as_recorded_from_its_first_request() -> None:
    assert replayed([10.0, 11.0, 14.0], None).tolist() == [0.0, 1.0, 4.0]


def test_trace_can_be_stretched_to_a_rate() -> None:
    assert replayed([10.0, 11.0, 14.0], 0.25).tolist() == [0.0, 2.0, 8.0]


def test_trace_without_duration_has_no_rate_to_change() -> None:
    with pytest.raises(ConfigError, match="at once"):
        replayed([5.0, 5.0], 1.0)
