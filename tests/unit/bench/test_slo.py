from __future__ import annotations

import numpy as np
import pytest

from tests.unit.bench.queue import record, serve
from vllm_pd.bench.arrivals import gamma_arrivals
from vllm_pd.bench.records import Record, pooled
from vllm_pd.bench.slo import Objectives, attainment, num_independent, parse_objectives
from vllm_pd.errors import ConfigError

OBJECTIVES = Objectives(ttft_ms=200, tpot_ms=50)


def test_all_objectives_must_be_met_by_the_same_request() -> None:
    records = [
        record(ttft=0.1, gaps=[0.04]),
        record(ttft=0.3, gaps=[0.04]),
        record(ttft=0.1, gaps=[0.06]),
        record(ttft=0.1, gaps=[0.04], error="lost"),
    ]
    assert [OBJECTIVES.are_met_by(one) for one in records] == [True, False, False, False]
    assert attainment([records], OBJECTIVES).value == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("count", [80, 200])
def test_attainment_in_a_queue_is_covered_as_often_as_is_documented(count: int) -> None:
    def latencies(seed: int, num: int) -> list[Record]:
        arrivals = gamma_arrivals(num + 200, 7.0, 1.0, np.random.default_rng(seed))
        return serve(arrivals.tolist(), 0.1)[200:]

    limit_ms = float(np.percentile(pooled(latencies(1, 100_000), "ttft"), 90))
    objectives = Objectives(ttft_ms=limit_ms)
    found = [attainment([latencies(seed, count)], objectives) for seed in range(200)]
    assert np.mean([one.low <= 0.9 <= one.high for one in found]) >= 0.9  # 0.45 if independent
    assert np.mean([one.low > 0.9 for one in found]) <= 0.08


def test_requests_that_waited_together_say_less_than_independent_ones() -> None:
    alternating = [record(ttft=0.15 + 0.05 * (number % 2)) for number in range(100)]
    drifting = [record(ttft=0.1 + 0.002 * number) for number in range(100)]
    assert num_independent([alternating], OBJECTIVES) > 90
    assert num_independent([drifting], OBJECTIVES) < 10
    assert num_independent([drifting, drifting], OBJECTIVES) == pytest.approx(
        2 * num_independent([drifting], OBJECTIVES)
    )


def test_requests_far_from_their_limits_are_all_alike() -> None:
    drifting = [record(ttft=0.001 * number) for number in range(100)]
    assert num_independent([drifting], OBJECTIVES) == 100


def test_nothing_has_no_attainment() -> None:
    with pytest.raises(ValueError, match="no requests"):
        attainment([[]], OBJECTIVES)


def test_late_client_counts_against_the_objective() -> None:
    assert not OBJECTIVES.are_met_by(record(lag=0.15, ttft=0.25))


def test_answer_of_one_token_meets_any_tpot() -> None:
    assert OBJECTIVES.are_met_by(record())


def test_objectives_are_read_as_upstream_writes_them() -> None:
    assert parse_objectives(["ttft:200", "tpot:50"]) == OBJECTIVES
    assert str(OBJECTIVES) == "TTFT <= 200 ms, TPOT <= 50 ms"


@pytest.mark.parametrize("pairs", [[], ["ttft"], ["itl:5"], ["ttft:x"], ["ttft:0"], ["ttft:nan"]])
def test_bad_objectives_are_refused(pairs: list[str]) -> None:
    with pytest.raises(ConfigError, match="objective"):
        parse_objectives(pairs)
