from __future__ import annotations

import pytest

from tests.unit.bench.queue import record
from vllm_pd.bench.slo import Objectives, attainment, parse_objectives
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
