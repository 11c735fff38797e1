"""Timelines of single requests, for routers that ask."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.connector.test_scheduler import REMOTE, FakeEndpoint, FakeRequest, make_scheduler
from vllm_pd.connector.timeline import Timelines, wants_timeline
from vllm_pd.session.stats import FetchRecord, FetchTimeline, Outcome


def fetched(request_id: str = "r1", **changes: Any) -> FetchRecord:
    facts: dict[str, Any] = {
        "outcome": Outcome.OK,
        "transport": "shm",
        "num_bytes": 4096,
        "num_bytes_saved": 512,
        "timeline": FetchTimeline(0.001, 0.002, 0.003, 0.0005, 0.0061234567),
    }
    return FetchRecord(request_id=request_id, **{**facts, **changes})


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timelines(clock: Clock) -> Timelines:
    timelines = Timelines(clock)
    timelines.expect("r1")
    return timelines


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, False),
        ({}, False),
        ({"timeline": False}, False),
        ({"timeline": "yes"}, False),
        ({"timeline": True}, True),
    ],
)
def test_timeline_is_asked_for_by_true(params: dict[str, Any] | None, expected: bool) -> None:
    assert wants_timeline(params) is expected


def test_request_that_asked_gets_its_fetch_in_microseconds(timelines: Timelines) -> None:
    timelines.add([fetched()])
    assert timelines.take("r1") == {
        "timeline": {
            "handshake_s": 0.001,
            "queued_s": 0.002,
            "transfer_s": 0.003,
            "verify_s": 0.0005,
            "total_s": 0.006123,
            "unseen_s": 0.0,
            "outcome": "ok",
            "num_bytes": 4096,
            "num_bytes_saved": 512,
            "transport": "shm",
        }
    }


def test_request_is_told_how_long_it_was_queued_until_it_had_blocks(
    timelines: Timelines, clock: Clock
) -> None:
    timelines.note_arrival("r2")
    clock.now += 0.25
    timelines.expect("r2")
    clock.now += 1.0
    timelines.add([fetched("r2")])
    params = timelines.take("r2")
    assert params is not None
    assert params["timeline"]["engine_queue_s"] == 0.25


def test_nothing_is_remembered_of_a_request_that_left_the_queue(timelines: Timelines) -> None:
    timelines.note_arrival("r2")
    timelines.take("r2")
    timelines.take("r1")
    assert len(timelines) == 0


def test_request_that_did_not_ask_gets_nothing(timelines: Timelines) -> None:
    timelines.add([fetched("r2")])
    assert timelines.take("r2") is None


def test_request_without_a_fetch_gets_nothing(timelines: Timelines) -> None:
    assert timelines.take("r1") is None


def test_nothing_is_remembered_of_a_request_that_was_taken(timelines: Timelines) -> None:
    timelines.take("r1")
    timelines.add([fetched()])  # ends after its request was aborted
    assert len(timelines) == 0


def test_fetch_is_kept_when_its_request_is_expected_twice(timelines: Timelines) -> None:
    timelines.add([fetched()])
    timelines.expect("r1")
    assert timelines.take("r1") is not None


def test_several_ranks_give_the_slowest_of_each_stage(timelines: Timelines) -> None:
    timelines.add([fetched(timeline=FetchTimeline(0.5, 0.1, 0.2, 0.1, 0.8))])
    timelines.add([fetched(timeline=FetchTimeline(0.1, 0.2, 0.4, 0.0, 0.7))])
    answer = timelines.take("r1")
    assert answer is not None
    timeline = answer["timeline"]
    stages = ("handshake_s", "queued_s", "transfer_s", "verify_s", "total_s")
    assert [timeline[stage] for stage in stages] == [0.5, 0.2, 0.4, 0.1, 0.8]
    assert (timeline["num_bytes"], timeline["num_bytes_saved"]) == (8192, 1024)


@pytest.mark.parametrize("first", [Outcome.OK, Outcome.TIMEOUT])
def test_one_rank_that_failed_is_the_outcome_of_all(timelines: Timelines, first: Outcome) -> None:
    second = Outcome.TIMEOUT if first is Outcome.OK else Outcome.OK
    timelines.add([fetched(outcome=first), fetched(outcome=second)])
    answer = timelines.take("r1")
    assert answer is not None
    assert answer["timeline"]["outcome"] == "timeout"


def test_ranks_that_used_different_transports_name_both(timelines: Timelines) -> None:
    timelines.add([fetched(transport="tcp"), fetched(transport="shm"), fetched(transport="")])
    answer = timelines.take("r1")
    assert answer is not None
    assert answer["timeline"]["transport"] == "shm,tcp"


def test_answer_of_a_decode_request_carries_the_timeline_it_asked_for() -> None:
    scheduler = make_scheduler(FakeEndpoint())
    request = FakeRequest({**REMOTE, "timeline": True})
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=40)
    scheduler.update_fetches([fetched(request.request_id)])
    keep, params = scheduler.request_finished(request, [10, 11, 12])
    assert not keep
    assert params is not None
    assert params["timeline"]["num_bytes"] == 4096


def test_answer_of_a_decode_request_that_did_not_ask_is_that_of_a_colocated_one() -> None:
    scheduler = make_scheduler(FakeEndpoint())
    request = FakeRequest(REMOTE)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=40)
    scheduler.update_fetches([fetched(request.request_id)])
    assert scheduler.request_finished(request, [10, 11, 12]) == (False, None)


def test_answer_of_a_request_that_fetched_nothing_has_no_timeline() -> None:
    scheduler = make_scheduler(FakeEndpoint())
    request = FakeRequest({**REMOTE, "timeline": True})
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=0)
    assert scheduler.request_finished(request, [10, 11, 12]) == (False, None)
