"""Arrivals, queue and statistics together, against queueing theory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.bench.queue import serve
from vllm_pd.bench.arrivals import gamma_arrivals
from vllm_pd.bench.records import pooled
from vllm_pd.bench.stats import summarize


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_wait_in_an_m_d_1_queue_is_that_of_pollaczek_and_khinchine(load: float) -> None:
    rng = np.random.default_rng(11)
    service_s = 0.1
    arrivals = gamma_arrivals(150_000, load / service_s, 1.0, rng)
    records = serve(arrivals.tolist(), service_s)
    wait_ms = summarize(pooled(records, "ttft")).mean - service_s * 1e3
    expected_ms = load * service_s * 1e3 / (2 * (1 - load))
    assert wait_ms == pytest.approx(expected_ms, rel=0.02)


def test_equal_gaps_do_not_wait_below_capacity() -> None:
    arrivals = gamma_arrivals(1000, 9.0, 0.0, np.random.default_rng(1))
    found = summarize(pooled(serve(arrivals.tolist(), 0.1), "ttft"))
    assert [found.mean, found.p99] == pytest.approx([100.0, 100.0])


def test_quantiles_of_exponential_gaps_are_those_of_the_law() -> None:
    arrivals = gamma_arrivals(200_000, 2.0, 1.0, np.random.default_rng(3))
    found = summarize(np.diff(arrivals))
    assert found.p50 == pytest.approx(np.log(2) / 2, rel=0.02)
    assert found.p90 == pytest.approx(np.log(10) / 2, rel=0.02)
    assert found.p99 == pytest.approx(np.log(100) / 2, rel=0.02)
