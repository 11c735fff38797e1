from __future__ import annotations

import numpy as np
import pytest

from tests.unit.bench.queue import record, serve
from vllm_pd.bench.arrivals import gamma_arrivals
from vllm_pd.bench.records import Record
from vllm_pd.bench.steady import Regime, answer_rates, in_flight, is_idle, judge


def queue(load: float, count: int, seed: int) -> list[Record]:
    arrivals = gamma_arrivals(count, 10.0 * load, 1.0, np.random.default_rng(seed))
    return serve(arrivals.tolist(), 0.1)


def share_of(regime: Regime, load: float, count: int) -> float:
    return float(np.mean([judge(queue(load, count, seed)).regime is regime for seed in range(100)]))


def test_moderate_load_is_steady() -> None:
    assert share_of(Regime.STEADY, 0.5, 400) >= 0.99


def test_high_but_bearable_load_is_rarely_taken_for_overload() -> None:
    assert share_of(Regime.UNSTABLE, 0.85, 400) <= 0.05


@pytest.mark.parametrize(("load", "count"), [(1.3, 400), (2.0, 120)])
def test_overload_is_never_called_steady_and_mostly_named(load: float, count: int) -> None:
    assert share_of(Regime.STEADY, load, count) == 0.0
    assert share_of(Regime.UNSTABLE, load, count) >= 0.9


@pytest.mark.parametrize(("load", "share"), [(0.5, 0.8), (1.6, 0.5)])
def test_requests_that_failed_are_not_said_to_be_answered(load: float, share: float) -> None:
    records = queue(load, 500, 1)
    records[::5] = [record(due=one.intended_s, error="lost") for one in records[::5]]
    found = judge(records)
    assert found.completion_rate == pytest.approx(share, abs=0.06)
    assert "(92 failed)" in found.reason


def test_all_at_once_is_no_steady_state() -> None:
    found = judge(serve([0.0] * 50, 0.1))
    assert found.regime is Regime.UNSTABLE
    assert "backlog" in found.reason


def test_few_requests_tell_nothing() -> None:
    assert judge(queue(0.5, 5, 1)).regime is Regime.SHORT


def test_long_requests_need_a_longer_run() -> None:
    records = [record(due=float(n), ttft=0.1, gaps=[20.0]) for n in range(100)]
    assert judge(records).regime is Regime.SHORT


def test_run_of_which_nothing_is_answered_in_time_is_unstable() -> None:
    records = [record(due=float(n), ttft=70.0, gaps=[0.02] * 63) for n in range(60)]
    assert judge(records).regime is Regime.UNSTABLE


def test_overload_that_no_trend_shows_is_named_if_little_is_answered_in_time() -> None:
    bursts = [burst for burst in (0.0, 10.0, 20.0, 50.0, 57.0) for _ in range(4)]
    found = judge([record(due=due, ttft=37.0, gaps=[0.3] * 63) for due in bursts])
    assert found.regime is Regime.UNSTABLE
    assert "of the 8 requests that were due in the first half of the window of 51.3 s, 0" in (
        found.reason
    )


def test_run_of_which_half_of_the_early_ones_are_answered_in_time_is_only_short() -> None:
    records = [record(due=float(n), ttft=37.0) for n in range(60)]
    assert judge(records).regime is Regime.SHORT


def test_requests_that_failed_are_no_backlog() -> None:
    records = [record(due=float(n), error="lost") for n in range(60)]
    records[::5] = [record(due=one.intended_s, ttft=10.0) for one in records[::5]]
    assert judge(records).regime is Regime.SHORT


def test_window_leaves_out_the_first_tenth() -> None:
    records = serve([float(n) for n in range(101)], 0.1)
    found = judge(records)
    assert (found.start_s, found.end_s) == (10.0, 100.0)
    assert not found.contains(records[9])
    assert found.contains(records[10])


def test_requests_are_in_flight_from_when_they_are_due_until_their_last_token() -> None:
    records = [record(due=0.0, ttft=1.0), record(due=0.5, ttft=1.0), record(error="lost")]
    assert in_flight(records, [0.2, 0.7, 1.2, 2.0]) == [1, 2, 1, 0]


def test_throughput_leaves_out_start_and_drain() -> None:
    records = serve([n / 10 for n in range(400)], 0.2)  # half of them wait for the end
    rates = np.concatenate(answer_rates(records))
    assert len(rates) == 20
    assert rates.mean() == pytest.approx(5.0, rel=0.02)


def test_throughput_of_a_backlog_lasts_until_the_last_answer() -> None:
    (rate,) = answer_rates(serve([0.0] * 40, 0.1))
    assert rate == pytest.approx(10.0)


def test_failed_requests_are_no_throughput() -> None:
    (rate,) = answer_rates([*serve([0.0] * 40, 0.1), record(error="lost")])
    assert rate == pytest.approx(10.0)
    (nothing,) = answer_rates([record(error="lost")] * 3)
    assert nothing == 0.0


def test_service_is_idle_where_most_requests_find_no_other() -> None:
    assert is_idle(serve([0.0, 1.0, 2.0, 2.1], 0.5))
    assert not is_idle(serve([0.0, 0.1, 0.2, 5.0], 0.5))
