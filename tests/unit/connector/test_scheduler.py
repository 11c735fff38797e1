"""Scheduler decisions, without an engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import pytest

from vllm_pd.config import ConnectorConfig
from vllm_pd.connector.scheduler import PDConnectorScheduler
from vllm_pd.protocol.params import pending_prefill_params, prompt_digest
from vllm_pd.session.outbox import RemoteLease

BLOCK_SIZE = 16
PROMPT = list(range(40))  # two and a half blocks
REMOTE: dict[str, Any] = {
    "do_remote_prefill": True,
    "transfer_id": "t1",
    "remote_engine_id": "p0",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "remote_block_ids": [4, 5, 6],
    "remote_num_tokens": 40,
    "remote_prompt_digest": prompt_digest(PROMPT),
}
PENDING = pending_prefill_params("t1", engine_id="p0", host="127.0.0.1", port=5600)
KEEP: dict[str, Any] = {"do_remote_decode": True, "transfer_id": "t1"}


class Status(enum.Enum):
    FINISHED_STOPPED = 1
    FINISHED_LENGTH_CAPPED = 2
    FINISHED_ABORTED = 3


@dataclass
class FakeRequest:
    kv_transfer_params: dict[str, Any] | None
    request_id: str = "req-1"
    num_prompt_tokens: int = len(PROMPT)
    num_computed_tokens: int = len(PROMPT)
    prompt_token_ids: list[int] | None = field(default_factory=lambda: list(PROMPT))
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    cache_salt: str | None = None
    status: Any = Status.FINISHED_LENGTH_CAPPED


@dataclass
class FakeEndpoint:
    host: str = "127.0.0.1"
    port: int = 7000
    to_take: list[str] = field(default_factory=list)
    renewals_to_take: list[str] = field(default_factory=list)
    sent: list[tuple[str, int, str]] = field(default_factory=list)
    renewing: dict[str, RemoteLease] = field(default_factory=dict)
    renewed_once_more: list[str] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # blocks of each lease
    draining: bool = False

    def take_releases(self) -> list[str]:
        taken, self.to_take = self.to_take, []
        return taken

    def take_renewals(self) -> list[str]:
        taken, self.renewals_to_take = self.renewals_to_take, []
        return taken

    def send_release(self, host: str, port: int, transfer_id: str) -> None:
        self.sent.append((host, port, transfer_id))

    def start_renewing(self, request_id: str, lease: RemoteLease) -> None:
        self.renewing[request_id] = lease

    def stop_renewing(self, request_id: str, *, once_more: bool) -> None:
        if self.renewing.pop(request_id, None) and once_more:
            self.renewed_once_more.append(request_id)

    def try_hold(self, num_blocks: int) -> bool:
        if not self.draining:
            self.held.append(num_blocks)
        return not self.draining

    def end_hold(self, num_blocks: int) -> None:
        self.held.remove(num_blocks)


@pytest.fixture
def endpoint() -> FakeEndpoint:
    return FakeEndpoint()


@pytest.fixture
def scheduler(endpoint: FakeEndpoint) -> PDConnectorScheduler:
    return make_scheduler(endpoint)


def make_scheduler(
    endpoint: FakeEndpoint, min_load_tokens: int = 1, engine_id: str = "d0"
) -> PDConnectorScheduler:
    config = ConnectorConfig(min_load_tokens=min_load_tokens)
    return PDConnectorScheduler(
        config, engine_id=engine_id, block_size=BLOCK_SIZE, tp_size=1, endpoint=endpoint
    )


@pytest.mark.parametrize(
    ("params", "num_computed_tokens", "expected"),
    [
        (None, 0, (0, False)),
        ({}, 0, (0, False)),
        (REMOTE, 0, (40, True)),  # the whole prompt is remote
        (REMOTE, 16, (24, True)),  # starts after the local prefix hit
        (REMOTE, 32, (0, False)),  # 7 tokens saved are below min_load_tokens
        (REMOTE, 40, (0, False)),  # everything is cached here
        ({**REMOTE, "remote_port": "x"}, 0, (0, False)),  # unusable: recompute
        ({**REMOTE, "remote_num_tokens": 41}, 0, (0, False)),  # longer than this prompt
        ({**REMOTE, "remote_prompt_digest": "other"}, 0, (0, False)),  # another prompt
        ({**REMOTE, "remote_prompt_digest": ""}, 0, (40, True)),  # unknown: another connector
    ],
)
def test_num_new_matched_tokens(
    endpoint: FakeEndpoint,
    params: dict[str, Any] | None,
    num_computed_tokens: int,
    expected: tuple[int, bool],
) -> None:
    scheduler = make_scheduler(endpoint, min_load_tokens=16)
    request = FakeRequest(params)
    assert scheduler.get_num_new_matched_tokens(request, num_computed_tokens) == expected
    assert scheduler.get_num_new_matched_tokens(request, num_computed_tokens) == expected


def test_kv_of_another_adapter_is_not_loaded(scheduler: PDConnectorScheduler) -> None:
    @dataclass
    class Lora:
        lora_name: str = "adapter"

    request = FakeRequest(REMOTE, lora_request=Lora())
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)


@dataclass
class Position:
    offset: int


@dataclass
class Image:
    """The part of ``MultiModalFeatureSpec`` that matters; its tokens all have one id."""

    identifier: str
    mm_position: Position


def image(identifier: str, offset: int = 3) -> Image:
    return Image(identifier, Position(offset))


@pytest.mark.parametrize(
    "other",
    [
        {"mm_features": []},
        {"mm_features": [image("dog")]},
        {"mm_features": [image("cat", offset=4)]},
        {"mm_features": [image("cat"), image("cat", offset=9)]},
        {"cache_salt": None},
        {"cache_salt": "theirs"},
    ],
    ids=["no image", "another image", "elsewhere", "one more", "no salt", "another salt"],
)
def test_kv_of_another_image_or_salt_is_not_loaded(
    scheduler: PDConnectorScheduler, other: dict[str, Any]
) -> None:
    inputs: dict[str, Any] = {"mm_features": [image("cat")], "cache_salt": "ours"}
    _, params = scheduler.request_finished(FakeRequest(KEEP, **inputs), [7, 8, 9])
    consumer = make_scheduler(FakeEndpoint(), engine_id="d1")
    same = FakeRequest(params, **inputs)
    assert consumer.get_num_new_matched_tokens(same, 0) == (40, True)
    wrong = FakeRequest(params, request_id="req-2", **{**inputs, **other})
    assert consumer.get_num_new_matched_tokens(wrong, 0) == (0, False)


def test_image_behind_the_prefilled_part_does_not_matter(scheduler: PDConnectorScheduler) -> None:
    """As in a conversation: the next turn adds an image."""
    first = FakeRequest(KEEP, mm_features=[image("cat")])
    _, params = scheduler.request_finished(first, [7, 8, 9])
    tokens = [*PROMPT, *range(500, 520)]
    second = FakeRequest(
        params,
        num_prompt_tokens=len(tokens),
        prompt_token_ids=tokens,
        mm_features=[image("cat"), image("dog", offset=45)],
    )
    consumer = make_scheduler(FakeEndpoint(), engine_id="d1")
    assert consumer.get_num_new_matched_tokens(second, 0) == (40, True)


def test_load_names_only_the_blocks_that_are_missing(scheduler: PDConnectorScheduler) -> None:
    request = FakeRequest(REMOTE)
    scheduler.update_state_after_alloc(request, [10, 11, 12, 13], num_external_tokens=24)
    (load,) = scheduler.build_step_news().loads
    assert (load.block_offset, load.block_ids) == (1, (11, 12))
    assert (load.transfer_id, load.remote_engine_id, load.request_id) == ("t1", "p0", "req-1")
    assert scheduler.build_step_news().loads == []


def test_prefill_that_has_not_ended_is_fetched_with_patience_and_its_prompt_named(
    endpoint: FakeEndpoint,
) -> None:
    config = ConnectorConfig(prefill_wait_s=77.0)
    scheduler = PDConnectorScheduler(
        config, engine_id="d0", block_size=BLOCK_SIZE, tp_size=1, endpoint=endpoint
    )
    request = FakeRequest(PENDING)
    assert scheduler.get_num_new_matched_tokens(request, 16) == (24, True)
    scheduler.update_state_after_alloc(request, [10, 11, 12, 13], num_external_tokens=24)
    (load,) = scheduler.build_step_news().loads
    assert (load.block_offset, load.block_ids) == (1, (11, 12))
    assert (load.prompt_digest, load.wait_s) == (prompt_digest(PROMPT), 77.0)


def test_prefill_that_has_ended_is_fetched_without_more_ado(
    scheduler: PDConnectorScheduler,
) -> None:
    scheduler.update_state_after_alloc(FakeRequest(REMOTE), [10, 11, 12], num_external_tokens=40)
    (load,) = scheduler.build_step_news().loads
    assert (load.prompt_digest, load.wait_s) == ("", 0.0)


@pytest.mark.parametrize(
    ("status", "aborted"),
    [(Status.FINISHED_ABORTED, ["req-1"]), (Status.FINISHED_STOPPED, [])],
)
def test_load_of_an_aborted_request_is_given_up(
    scheduler: PDConnectorScheduler, status: Status, aborted: list[str]
) -> None:
    request = FakeRequest(PENDING, status=status)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=40)
    scheduler.request_finished(request, [])
    assert scheduler.build_step_news().aborted_loads == aborted
    assert scheduler.build_step_news().aborted_loads == []


def test_second_call_after_a_load_changes_nothing(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest(REMOTE)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=40)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=0)
    assert len(scheduler.build_step_news().loads) == 1
    assert endpoint.sent == []


def test_request_is_not_loaded_twice(scheduler: PDConnectorScheduler) -> None:
    """After a failed load, and after a preemption, vLLM asks again: it must not loop."""
    request = FakeRequest(REMOTE)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=40)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)


def test_prefill_that_is_not_needed_is_released(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    scheduler.update_state_after_alloc(FakeRequest(REMOTE), [10, 11, 12], num_external_tokens=0)
    assert endpoint.sent == [("127.0.0.1", 5600, "t1")]


@pytest.mark.parametrize(("num_cached", "num_saved"), [(0, 0), (16, 1), (32, 2), (39, 2), (48, 2)])
def test_blocks_of_a_prefill_that_the_prefix_cache_makes_needless_are_counted_once(
    endpoint: FakeEndpoint, num_cached: int, num_saved: int
) -> None:
    scheduler = make_scheduler(endpoint, min_load_tokens=100)
    request = FakeRequest(REMOTE)
    scheduler.get_num_new_matched_tokens(request, 16)  # there were no free blocks that time
    scheduler.get_num_new_matched_tokens(request, num_cached)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=0)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=0)
    assert scheduler.build_step_news().num_blocks_saved == num_saved
    assert scheduler.build_step_news().num_blocks_saved == 0


def test_blocks_that_a_fetch_leaves_out_are_left_to_the_fetch_to_count(
    scheduler: PDConnectorScheduler,
) -> None:
    request = FakeRequest(REMOTE)
    scheduler.get_num_new_matched_tokens(request, 16)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=24)
    assert scheduler.build_step_news().num_blocks_saved == 0


def test_request_aborted_before_it_was_scheduled_releases_its_prefill(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest(REMOTE, status=Status.FINISHED_ABORTED)
    assert scheduler.request_finished(request, []) == (False, None)
    assert endpoint.sent == [("127.0.0.1", 5600, "t1")]


def test_request_that_loaded_releases_nothing_at_its_end(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest(REMOTE)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=40)
    assert scheduler.request_finished(request, [10, 11, 12]) == (False, None)
    assert endpoint.sent == []


@pytest.mark.parametrize("status", [Status.FINISHED_STOPPED, Status.FINISHED_LENGTH_CAPPED])
def test_finished_prefill_is_leased(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint, status: Status
) -> None:
    # 0.23 may hand in more blocks than hold computed tokens.
    keep, params = scheduler.request_finished(FakeRequest(KEEP, status=status), [7, 8, 9, 10])
    assert keep
    assert params is not None
    assert params["remote_block_ids"] == [7, 8, 9]
    assert (params["remote_num_tokens"], params["remote_port"]) == (40, 7000)
    (grant,) = scheduler.build_step_news().grants
    assert (grant.transfer_id, grant.request_id, grant.block_ids) == ("t1", "req-1", (7, 8, 9))
    assert endpoint.held == [3]
    scheduler.update_finished_sending(["req-1"])
    assert endpoint.held == []


def test_what_one_scheduler_answers_another_can_load(scheduler: PDConnectorScheduler) -> None:
    _, params = scheduler.request_finished(FakeRequest(KEEP), [7, 8, 9])
    consumer = make_scheduler(FakeEndpoint(), engine_id="d1")
    assert consumer.get_num_new_matched_tokens(FakeRequest(params), 0) == (40, True)


@pytest.mark.parametrize(
    ("request_", "block_ids"),
    [
        (FakeRequest(None), [7, 8, 9]),
        (FakeRequest({"do_remote_decode": False}), [7, 8, 9]),
        (FakeRequest(KEEP, status=Status.FINISHED_ABORTED), [7, 8, 9]),
        (FakeRequest(KEEP, num_computed_tokens=0), []),
    ],
    ids=["no params", "not asked", "aborted", "nothing computed"],
)
def test_blocks_are_not_kept_without_a_consumer(
    scheduler: PDConnectorScheduler, request_: FakeRequest, block_ids: list[int]
) -> None:
    assert scheduler.request_finished(request_, block_ids) == (False, None)
    assert scheduler.build_step_news().grants == []


def test_transfer_id_in_use_is_not_leased_again(scheduler: PDConnectorScheduler) -> None:
    assert scheduler.request_finished(FakeRequest(KEEP), [7, 8, 9])[0]
    again = FakeRequest(KEEP, request_id="req-2")
    assert scheduler.request_finished(again, [1, 2, 3]) == (False, None)
    scheduler.update_finished_sending(["req-1"])
    assert scheduler.request_finished(FakeRequest(KEEP, request_id="req-3"), [1, 2, 3])[0]


def test_without_a_routers_id_the_request_id_names_the_transfer(
    scheduler: PDConnectorScheduler,
) -> None:
    _, params = scheduler.request_finished(FakeRequest({"do_remote_decode": True}), [7, 8, 9])
    assert params is not None
    assert params["transfer_id"] == "req-1"


def test_draining_instance_keeps_no_blocks(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    endpoint.draining = True
    assert scheduler.request_finished(FakeRequest(KEEP), [7, 8, 9]) == (False, None)
    assert scheduler.build_step_news().grants == []
    endpoint.draining = False
    assert scheduler.request_finished(FakeRequest(KEEP, request_id="req-2"), [7, 8, 9])[0]


def test_answer_tells_how_long_the_blocks_are_kept(scheduler: PDConnectorScheduler) -> None:
    _, params = scheduler.request_finished(FakeRequest(KEEP), [7, 8, 9])
    assert params is not None
    assert params["remote_lease_s"] == 30.0


@pytest.mark.parametrize(("told", "used"), [({}, 30.0), ({"remote_lease_s": 6}, 6.0)])
def test_lease_is_renewed_from_the_moment_its_request_queues(
    scheduler: PDConnectorScheduler,
    endpoint: FakeEndpoint,
    told: dict[str, Any],
    used: float,
) -> None:
    scheduler.on_new_request(FakeRequest({**REMOTE, **told}))
    assert endpoint.renewing == {"req-1": RemoteLease("127.0.0.1", 5600, "t1", used)}


@pytest.mark.parametrize(
    "params",
    [None, KEEP, {**REMOTE, "remote_port": "x"}, {**REMOTE, "remote_prompt_digest": "other"}],
    ids=["none", "prefill", "unusable", "other prompt"],
)
def test_nothing_is_renewed_without_a_usable_prefill(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint, params: dict[str, Any] | None
) -> None:
    scheduler.on_new_request(FakeRequest(params))
    assert endpoint.renewing == {}


def test_load_ends_renewing_with_a_last_renewal(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest(REMOTE)
    scheduler.on_new_request(request)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=40)
    assert endpoint.renewing == {}
    assert endpoint.renewed_once_more == ["req-1"]


def test_giving_up_ends_renewing_without_a_last_renewal(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest(REMOTE)
    scheduler.on_new_request(request)
    scheduler.update_state_after_alloc(request, [10, 11, 12], num_external_tokens=0)
    assert (endpoint.renewing, endpoint.renewed_once_more) == ({}, [])


def test_abort_of_a_queued_request_ends_renewing(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest(REMOTE, status=Status.FINISHED_ABORTED)
    scheduler.on_new_request(request)
    scheduler.request_finished(request, [])
    assert (endpoint.renewing, endpoint.renewed_once_more) == ({}, [])
    assert endpoint.sent == [("127.0.0.1", 5600, "t1")]


def test_renewals_of_leases_reach_the_worker_half_once(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    scheduler.request_finished(FakeRequest(KEEP), [7, 8, 9])
    endpoint.renewals_to_take = ["t1", "unknown"]
    assert scheduler.build_step_news().renewals == ["t1"]
    assert scheduler.build_step_news().renewals == []


def test_releases_reach_the_worker_half_once(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    endpoint.to_take = ["t5"]
    assert scheduler.build_step_news().releases == ["t5"]
    assert scheduler.build_step_news().releases == []


def test_request_id_of_any_length_is_leased_and_can_be_loaded(
    scheduler: PDConnectorScheduler,
) -> None:
    """vLLM makes request ids of a client's header: a long one must not break the lease."""
    request = FakeRequest({"do_remote_decode": True}, request_id="x" * 2000)
    keep, params = scheduler.request_finished(request, [7, 8, 9])
    assert keep
    assert len(scheduler.build_step_news().grants) == 1
    consumer = make_scheduler(FakeEndpoint(), engine_id="d1")
    assert consumer.get_num_new_matched_tokens(FakeRequest(params), 0) == (40, True)


def test_prefill_of_another_prompt_is_released_once(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest({**REMOTE, "remote_prompt_digest": "other"})
    scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, [1, 2, 3], num_external_tokens=0)
    scheduler.request_finished(request, [1, 2, 3])
    assert endpoint.sent == [("127.0.0.1", 5600, "t1")]


def test_prefill_of_this_very_engine_is_left_to_its_prefix_cache(
    scheduler: PDConnectorScheduler, endpoint: FakeEndpoint
) -> None:
    request = FakeRequest({**REMOTE, "remote_engine_id": "d0"})
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert endpoint.sent == [("127.0.0.1", 5600, "t1")]


def test_transfer_that_would_bring_only_the_last_token_is_not_made(
    scheduler: PDConnectorScheduler,
) -> None:
    """vLLM computes the last prompt token in any case."""
    one = [5]
    request = FakeRequest(
        {**REMOTE, "remote_num_tokens": 1, "remote_prompt_digest": prompt_digest(one)},
        num_prompt_tokens=1,
        prompt_token_ids=one,
    )
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
