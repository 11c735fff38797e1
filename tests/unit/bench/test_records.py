from __future__ import annotations

import math
from typing import Any

import pytest

from tests.unit.bench.queue import record
from vllm_pd.bench.records import metric_values, pooled, read_result
from vllm_pd.errors import ConfigError


def result(**changed: Any) -> dict[str, Any]:
    """Return what upstream writes of two requests, the second one 0.4 s late."""
    return {
        "start_times": [100.0, 101.4],
        "queue_times": [0.0, 0.1],
        "ttfts": [0.2, 0.3],
        "itls": [[0.05, 0.07], []],
        "input_lens": [10, 20],
        "output_lens": [3, 1],
        "errors": ["", ""],
        **changed,
    }


SCHEDULE = {"started": 100.0, "offsets_s": [0.0, 1.0]}


def test_latencies_count_from_the_intended_arrival() -> None:
    records, is_known = read_result(result(), SCHEDULE)
    assert is_known
    assert records[1].lag_s == pytest.approx(0.4)
    assert records[1].ttft_s == pytest.approx(0.7)
    assert records[0].ttft_s == pytest.approx(0.2)


def test_without_a_schedule_they_count_from_the_release_of_the_request() -> None:
    records, is_known = read_result(result(), None)
    assert not is_known
    assert records[1].ttft_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    "schedule",
    [{"started": 100.0, "offsets_s": [0.0, 1.5]}, {"started": 100.0, "offsets_s": [0.0]}],
)
def test_schedule_that_the_run_did_not_keep_is_not_believed(schedule: dict[str, Any]) -> None:
    assert not read_result(result(), schedule)[1]


def test_figures_of_a_request() -> None:
    (first, last), _ = read_result(result(), SCHEDULE)
    assert first.tpot_s == pytest.approx(0.06)
    assert first.second_s == pytest.approx(0.25)
    assert first.max_stall_s == pytest.approx(0.07)
    assert first.e2el_s == pytest.approx(0.32)
    assert math.isnan(last.tpot_s)
    assert math.isnan(last.second_s)


def test_failed_request_has_its_error_in_one_line_and_no_latency() -> None:
    traceback = "Traceback (most recent call last):\n  File\nOSError: connection lost\n"
    records, _ = read_result(result(errors=["", traceback], ttfts=[0.2, 0.3]), SCHEDULE)
    assert records[1].error == "OSError: connection lost"
    assert pooled(records, "ttft") == [pytest.approx(200.0)]
    assert [len(values) for values in metric_values(records, "itl")] == [2, 0]


def test_request_without_an_answer_failed() -> None:
    records, _ = read_result(result(ttfts=[0.2, 0.0]), SCHEDULE)
    assert not records[1].is_ok


def test_incomplete_result_is_refused() -> None:
    broken = result()
    del broken["itls"]
    with pytest.raises(ConfigError, match="incomplete"):
        read_result(broken, None)


def test_unknown_metric_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        pooled([record()], "speed")
