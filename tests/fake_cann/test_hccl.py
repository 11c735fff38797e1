"""HCCL as the double plays it: two ranks in two processes, through ctypes.

The rules are those of the project's notes on Ascend, whose sections are named.
"""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cann.abi import Libraries, comm_config
from tests.fake_cann.ranks import Ranks, rank_process

PARA, PTR, NOT_SUPPORT, UNAVAIL, TIMEOUT = 1, 2, 5, 7, 9
TCP_CONNECT, RUNTIME, AGAIN, REMOTE, OOM = 11, 15, 20, 21, 24
NOTIFY_TIMEOUT, COPY_FAILED = 507048, 507052
# Ten times quicker than CANN: quick enough for tests, slow enough for a busy machine.
QUICK = {"FAKE_CANN_TIME_SCALE": "0.1"}


def play(folder: Path, scenario: str, *hooks: dict[str, str]) -> list[Any]:
    """Return what the ranks saw."""
    with Ranks(folder, scenario, *hooks) as group:
        outcomes = group.outcomes()
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes
    return [outcome.result for outcome in outcomes]


# Section 3, "Copy": in pieces of the communicator's buffer.
def test_bytes_arrive_in_chunks_of_the_buffer(fake_cann: Path) -> None:
    first, second = play(fake_cann, "send_and_receive")
    assert first == {"issue": 0, "end": 0, "chunks": 3}
    assert second == {"issue": 0, "end": 0, "equal": True}


# Section 0.2: link set-up blocks the host and needs the peer.
def test_the_first_operation_waits_for_the_peer(fake_cann: Path) -> None:
    with Ranks(fake_cann, "first_operation") as group:
        assert group.ranks[0].hear() == "issuing"
        group.ranks[1].tell("go")
        first, second = (outcome.result for outcome in group.outcomes())
    assert first["end"] == second["end"] == 0
    assert first["moment"] > second["moment"]


# Section 3, "Pairing".
def test_a_later_operation_returns_at_once_and_ends_with_its_match(fake_cann: Path) -> None:
    with Ranks(fake_cann, "later_operation") as group:
        assert group.ranks[0].hear() == "issued"
        group.ranks[1].tell("go")
        first, second = (outcome.result for outcome in group.outcomes())
    assert first == {"end": 0, "before": False, "after": True}
    assert second == {"end": 0}


# Section 3, "Pairing": only matching operations proceed.
def test_two_sends_against_each_other_time_out(fake_cann: Path) -> None:
    first, second = play(fake_cann, "both_send", QUICK)
    assert first == second == {"end": NOTIFY_TIMEOUT}


# Section 0.3: a lost peer shows at the execution timeout, in the stream, and nowhere else.
def test_a_lost_peer_shows_after_the_execution_timeout(fake_cann: Path) -> None:
    with Ranks(fake_cann, "lose_peer", QUICK) as group:
        assert [rank.hear() for rank in group.ranks] == ["warm", "warm"]
        group.ranks[1].kill()
        group.ranks[1].outcome()
        group.ranks[0].tell("go")
        seen = group.ranks[0].outcome().result
    assert seen.pop("elapsed_s") >= 1.0
    assert seen == {
        "issue": 0,
        "end": NOTIFY_TIMEOUT,
        "async_error": 0,
        "destroyed": 0,
        "content": "x",
    }


# Section 2: the execution timeout counts from version 8 of the configuration on.
def test_an_older_config_has_the_execution_timeout_of_the_environment(fake_cann: Path) -> None:
    hooks = {**QUICK, "HCCL_EXEC_TIMEOUT": "15"}
    with Ranks(fake_cann, "lose_peer_by_default", hooks) as group:
        assert [rank.hear() for rank in group.ranks] == ["warm", "warm"]
        group.ranks[1].kill()
        group.ranks[1].outcome()
        group.ranks[0].tell("go")
        seen = group.ranks[0].outcome().result
    assert seen["end"] == NOTIFY_TIMEOUT
    assert seen["elapsed_s"] >= 1.5


def test_a_peer_that_comes_after_the_timeout_gets_nothing(fake_cann: Path) -> None:
    with Ranks(fake_cann, "come_too_late", QUICK) as group:
        assert group.ranks[0].hear() == "failed"
        group.ranks[1].tell("go")
        first, second = (outcome.result for outcome in group.outcomes())
    assert first == {"end": NOTIFY_TIMEOUT}
    assert second == {"end": NOTIFY_TIMEOUT, "content": "1"}


def test_sizes_that_differ_fail_on_both_sides(fake_cann: Path) -> None:
    first, second = play(fake_cann, "sizes_differ")
    assert first == second == {"end": COPY_FAILED}


# Section 3, "Pairing": the sends and receives of one batch do not block each other.
def test_a_batch_goes_both_ways(fake_cann: Path) -> None:
    first, second = play(fake_cann, "send_receive_batch")
    assert first == second == {"end": 0, "equal": True}


def test_a_barrier_ends_when_all_have_come(fake_cann: Path) -> None:
    with Ranks(fake_cann, "barrier") as group:
        assert group.ranks[0].hear() == "issued"
        group.ranks[1].tell("go")
        first, second = (outcome.result for outcome in group.outcomes())
    assert first["end"] == second["end"] == 0
    assert first["ended"] > second["started"]


def test_three_ranks_send_in_a_ring_and_meet(fake_cann: Path) -> None:
    assert play(fake_cann, "ring", {}, {}, {}) == [{"end": 0, "content": n} for n in "201"]


def test_operations_of_a_communicator_keep_their_order_across_streams(fake_cann: Path) -> None:
    first, second = play(fake_cann, "two_streams")
    assert first == {"end": [0, 0]}
    assert second == {"end": 0, "content": "12"}


# Section 2, end: all ranks pass the same configuration.
def test_ranks_with_different_configs_are_refused(fake_cann: Path) -> None:
    assert play(fake_cann, "different_configs") == [{"error": PARA}, {"error": PARA}]


# Section 2, "ABI rule": size and version decide what is read.
def test_ranks_with_different_headers_and_equal_settings_meet(fake_cann: Path) -> None:
    assert play(fake_cann, "longer_config") == [{}, {}]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(comm_config(magic=0x1234), id="magic"),
        pytest.param(comm_config(size=8), id="size"),
        pytest.param(comm_config(buffer_mb=0), id="buffer"),
        pytest.param(comm_config(exec_timeout_s=-7), id="timeout"),
    ],
)
def test_a_malformed_config_is_refused(fake_cann: Path, config: bytes) -> None:
    lib = Libraries(fake_cann)
    lib.acl.aclrtSetDevice(0)
    root_info, comm = bytes(4108), bytearray(8)
    created = lib.hccl.HcclCommInitRootInfoConfig(2, root_info, 0, config, bytes(comm))
    assert created == PARA
    assert b"HcclCommConfig" in lib.acl.aclGetRecentErrMsg()


def test_bytes_that_are_no_root_info_are_refused(fake_cann: Path) -> None:
    lib = Libraries(fake_cann)
    lib.acl.aclrtSetDevice(0)
    assert lib.hccl.HcclCommInitRootInfo(2, bytes(4108), 0, bytes(8)) == PARA


def test_ranks_agree_on_the_name_of_their_communicator(fake_cann: Path) -> None:
    first, second = play(fake_cann, "default_config")
    assert first["name"] == second["name"] != ""


def test_two_ranks_on_one_device_are_refused(fake_cann: Path) -> None:
    hooks = {"ASCEND_RT_VISIBLE_DEVICES": "3"}
    assert play(fake_cann, "default_config", hooks) == [{"error": PARA}, {"error": PARA}]


def test_ranks_on_different_chips_are_refused(fake_cann: Path) -> None:
    chips = ({"FAKE_CANN_SOC": "Ascend910B3"}, {"FAKE_CANN_SOC": "Ascend910_9391"})
    seen = play(fake_cann, "default_config", *chips)
    assert seen == [{"error": NOT_SUPPORT}, {"error": NOT_SUPPORT}]


# Section 3, "Rendezvous": all ranks must come within HCCL_CONNECT_TIMEOUT (+20 s).
def test_a_rank_that_stays_alone_gives_up(fake_cann: Path) -> None:
    hooks = {"FAKE_CANN_TIME_SCALE": "0.01", "HCCL_CONNECT_TIMEOUT": "20"}
    with Ranks(fake_cann, "root_only", hooks) as group:
        seen = group.ranks[0].outcome().result
    assert seen == {"created": TIMEOUT}


def test_a_rank_whose_root_is_gone_gives_up(fake_cann: Path) -> None:
    hooks = {"FAKE_CANN_TIME_SCALE": "0.01", "HCCL_CONNECT_TIMEOUT": "20"}
    ranks = [rank_process(fake_cann, "root_is_gone", rank, hooks) for rank in (0, 1)]
    root_info = ranks[0].hear()
    ranks[0].kill()
    ranks[0].outcome()
    ranks[1].tell(root_info)
    assert ranks[1].outcome().result == {"created": TCP_CONNECT}


def test_link_setup_ends_at_the_connect_timeout(fake_cann: Path) -> None:
    with Ranks(fake_cann, "missing_peer", {**QUICK, "HCCL_CONNECT_TIMEOUT": "10"}) as group:
        seen = group.ranks[0].outcome().result
    assert seen == {"issue": TIMEOUT}


# Section 2: data types of A2 and A3, and the error codes.
def test_bad_arguments_have_their_codes(fake_cann: Path) -> None:
    first, second = play(fake_cann, "bad_arguments")
    assert first == second
    assert first == {
        "thread without device": RUNTIME,
        "fp16": NOT_SUPPORT,
        "host memory": PARA,
        "no memory": PTR,
        "beyond memory": PARA,
        "itself": PARA,
        "rank 7": PARA,
        "no communicator": PTR,
    }


# Section 3, "Memory": two buffers per communicator, taken by the first operation.
def test_the_first_operation_takes_two_buffers(fake_cann: Path) -> None:
    first, second = play(fake_cann, "buffers")
    assert first == second == {"issue": 0, "taken_mib": [0, 0, 64, 0]}


def test_buffers_that_do_not_fit_are_an_error(fake_cann: Path) -> None:
    first, second = play(fake_cann, "buffers", {"FAKE_CANN_MEMORY_MB": "60"})
    assert first["issue"] == second["issue"] == OOM


# Section 3, "Destroy".
def test_a_busy_communicator_is_not_destroyed(fake_cann: Path) -> None:
    with Ranks(fake_cann, "destroy_busy") as group:
        assert group.ranks[0].hear() == "refused"
        group.ranks[1].tell("go")
        first, second = (outcome.result for outcome in group.outcomes())
    assert first == {"busy": AGAIN, "idle": 0, "again": PTR}
    assert second == {"end": 0}


def test_destroying_ends_a_link_setup(fake_cann: Path) -> None:
    with Ranks(fake_cann, "destroy_during_setup") as group:
        seen = group.ranks[0].outcome().result
    assert seen["destroyed"] == 0
    assert seen["issue"] not in (0, TIMEOUT)


# Section 0.1: the rule of serial issue. Real HCCL only misbehaves; the double aborts.
@pytest.mark.parametrize("scenario", ["issue_from_two_threads", "create_in_two_threads"])
def test_breaking_the_serial_rule_ends_the_process(fake_cann: Path, scenario: str) -> None:
    with Ranks(fake_cann, scenario) as group:
        outcome = group.ranks[0].outcome()
    assert outcome.status == -signal.SIGABRT
    assert "RULE BROKEN: serial issue on device 0" in outcome.stderr


# Section 0.4.
def test_nothing_is_issued_during_graph_capture(fake_cann: Path) -> None:
    first, second = play(fake_cann, "issue_during_capture")
    assert (first["during"], first["after"]) == (RUNTIME, 0)
    assert (second["during"], second["after"]) == (RUNTIME, 0)


def test_operations_fail_where_a_test_asks_for_it(fake_cann: Path) -> None:
    with Ranks(fake_cann, "send_and_receive", {"FAKE_CANN_FAIL": f"HcclRecv:1:{REMOTE}"}) as group:
        seen = group.ranks[1].outcome().result
    assert seen["issue"] == REMOTE


# Section 3, "Rendezvous": HCCL_HOST_SOCKET_PORT_RANGE.
def test_an_exhausted_port_range_is_an_error(fake_cann: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hooks = {"HCCL_HOST_SOCKET_PORT_RANGE": f"{port}-{port}"}
    assert play(fake_cann, "make_root", hooks)[0] == {"codes": [0, UNAVAIL]}


@pytest.mark.parametrize(("code", "text"), [(0, b"no error"), (9, b"timeout"), (999, b"unknown")])
def test_errors_have_texts(fake_cann: Path, code: int, text: bytes) -> None:
    assert Libraries(fake_cann).hccl.HcclGetErrorString(code).startswith(text)
