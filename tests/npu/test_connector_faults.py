"""What is lost when a peer is lost, or HCCL fails; with torch_npu and HCCL's double.

Facts about HCCL 9.1 behind it: a matched operation cannot be aborted, so a survivor waits
until its execution timeout; creating a communicator fails with an error code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from functools import partial

import msgspec
import pytest
import torch

from tests.npu.engines import (
    AUTO,
    CONFIG,
    GQA,
    NPU,
    TIMEOUT_S,
    Make,
    NpuEngine,
    Set,
    fetch_everywhere,
    load,
    transports_used,
)
from tests.npu.peer import REQUEST, Peer, request_of
from vllm_pd.session.producer import Grant

TCP_CONNECT = 11  # HCCL_E_TCP_CONNECT

BACKEND = os.environ.get("VLLM_PD_HCCL_BACKEND", "ctypes")
"""With which these tests run; ``test_in_torch_npu`` has both."""

Fail = Callable[[str], None]


@pytest.fixture
def fail(fake_set: Set) -> Fail:
    """Makes calls of the double fail, as NAME:CALL:CODE."""
    return lambda calls: fake_set("FAKE_CANN_FAIL", calls)


def expect_recompute(engine: NpuEngine, request_id: str, blocks: set[int]) -> None:
    assert engine.finished(0) == (set(), {request_id})
    assert engine.workers[0].take_invalid_block_ids() == blocks


def num_issued() -> int:
    """Return how many operations of HCCL this process has issued, those of warm-up included."""
    return int(ctypes.CDLL("libhccl.so").fakeHcclNumIssued())


def wait_issued(before: int) -> None:
    """Wait until there is another one."""
    deadline = time.monotonic() + TIMEOUT_S
    while num_issued() == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fetch_once(producer: NpuEngine, consumer: NpuEngine, transfer_id: str) -> None:
    producer.workers[0].start([], [Grant(transfer_id, f"prefill-{transfer_id}", (2, 3))], [])
    consumer.workers[0].start([load(producer, transfer_id=transfer_id)], [], [])


def test_workers_that_hccl_cannot_link_use_tcp_from_the_next_request_on(
    make: Make, fail: Fail, caplog: pytest.LogCaptureFixture
) -> None:
    producer = make("p", (0,), GQA, config=AUTO)
    consumer = make("d", (1,), GQA, first=10**6, config=AUTO)
    fail(f"HcclCommInitRootInfo:1:{TCP_CONNECT},HcclCommInitRootInfo:2:{TCP_CONNECT}")
    fetch_once(producer, consumer, "a")
    expect_recompute(consumer, "decode-a", {5, 6})
    fetch_everywhere(producer, consumer, "b")
    assert transports_used(consumer) == {"hccl", "tcp"}
    info = [engine.workers[0].transport_info()["hccl"] for engine in (producer, consumer)]
    assert all(mode == BACKEND and reason for mode, reason in info)
    # One side may see only that the other one has given up.
    assert any("TCP_CONNECT" in reason and "HCCL_IF_IP" in reason for _, reason in info)
    assert caplog.text.count("hccl is not used with worker") == 2  # once on each side


def test_workers_that_insist_on_hccl_recompute_where_it_cannot_link(make: Make, fail: Fail) -> None:
    producer, consumer = make("p", (0,), GQA), make("d", (1,), GQA, first=10**6)
    fail(f"HcclCommInitRootInfo:1:{TCP_CONNECT},HcclCommInitRootInfo:2:{TCP_CONNECT}")
    for transfer_id in ("a", "b"):
        fetch_once(producer, consumer, transfer_id)
        expect_recompute(consumer, f"decode-{transfer_id}", {5, 6})
    assert consumer.workers[0].take_stats() is not None


@pytest.mark.skipif(
    BACKEND == "process_group",
    reason="torch_npu issues behind a queue, which keeps such an error and may end the process",
)
@pytest.mark.parametrize("call", ["HcclSend", "HcclRecv"])
def test_refused_operation_fails_one_fetch_and_the_communicator_is_made_anew(
    make: Make, fail: Fail, call: str
) -> None:
    producer, consumer = make("p", (0,), GQA), make("d", (1,), GQA, first=10**6)
    fetch_everywhere(producer, consumer, "a")
    fail(f"{call}:1:4")
    fetch_once(producer, consumer, "b")
    expect_recompute(consumer, "decode-b", {5, 6})
    producer.workers[0].start([], [], ["b"])  # as the consumer's scheduler half asks for
    assert producer.finished(0) == ({"prefill-b"}, set())
    fail("")
    fetch_once(producer, consumer, "c")
    assert consumer.finished(0) == (set(), {"decode-c"})
    assert consumer.workers[0].take_invalid_block_ids() == set()


def test_producer_that_dies_before_it_sends_costs_a_recompute_at_once(make: Make) -> None:
    consumer = make("d", (1,), GQA)
    with Peer("p", 2) as peer:
        peer.ask("grant", "a", [1, 2])
        consumer.workers[0].start([request_of(peer, "a")], [], [])
        assert consumer.finished(0) == (set(), {"decode-a"})
        assert consumer.workers[0].take_invalid_block_ids() == set()
        peer.ask("hold")
        peer.ask("grant", "b", [3, 4])
        consumer.workers[0].start([request_of(peer, "b")], [], [])
        started = time.monotonic()
        peer.kill()
        expect_recompute(consumer, "decode-b", {5, 6})
        assert time.monotonic() - started < CONFIG.transfer_timeout_s


@pytest.mark.parametrize("event", ["complete", "error"])
def test_producer_that_dies_while_it_sends_costs_a_recompute_within_the_timeout(
    make: Make, fake_set: Set, event: str
) -> None:
    fake_set("FAKE_CANN_FAILED_EVENT", event)
    consumer = make("d", (1,), GQA, first=10**6)
    with Peer("p", 2) as peer:
        peer.ask("grant", "a", [1, 2])
        consumer.workers[0].start([request_of(peer, "a")], [], [])
        assert consumer.finished(0) == (set(), {"decode-a"})
        assert consumer.workers[0].take_invalid_block_ids() == set()
        peer.ask("set", "FAKE_CANN_TASK_US", "60000000")  # its gathering never ends
        peer.ask("grant", "b", [3, 4])
        before = num_issued()
        consumer.workers[0].start([request_of(peer, "b")], [], [])
        wait_issued(before)
        started = time.monotonic()
        peer.kill()
        expect_recompute(consumer, "decode-b", {5, 6})
        assert time.monotonic() - started < CONFIG.transfer_timeout_s
    fetch_once(make("q", (0,), GQA), consumer, "c")
    assert consumer.finished(0) == (set(), {"decode-c"})
    assert consumer.workers[0].take_invalid_block_ids() == set()  # digests are compared


def test_operation_that_hccl_never_ends_costs_a_recompute_and_the_worker_serves_on(
    make: Make, fake_set: Set, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a CANN that knows no execution timeout, or on a device that hangs."""
    monkeypatch.setattr("ascend_vllm_plugin.transport.OVERDUE_S", 0.5)
    timeout_s = 30.0 if BACKEND == "process_group" else 1.0  # that one has HCCL_EXEC_TIMEOUT
    config = msgspec.structs.replace(CONFIG, transfer_timeout_s=timeout_s)
    consumer = make("d", (1,), GQA, first=10**6, config=config)
    with Peer("p", 2, transfer_timeout_s=timeout_s) as peer:
        peer.ask("grant", "a", [1, 2])
        consumer.workers[0].start([request_of(peer, "a")], [], [])
        assert consumer.finished(0) == (set(), {"decode-a"})
        assert consumer.workers[0].take_invalid_block_ids() == set()
        before = copy_of(consumer)
        # Receiving begins, and ends well, seconds after it was given up, but within this test.
        fake_set("FAKE_CANN_TASK_US", "38000000" if BACKEND == "process_group" else "7000000")
        for set_hook in (fake_set, partial(peer.ask, "set")):
            set_hook("FAKE_CANN_TIME_SCALE", "20")  # neither side's HCCL gives it up
        peer.ask("grant", "b", [3, 4])
        consumer.workers[0].start([request_of(peer, "b", block_ids=(2, 3))], [], [])
        expect_recompute(consumer, "decode-b", {2, 3})
        assert "its stream is aborted" in caplog.text
        fake_set("FAKE_CANN_TASK_US", "")
        with contextlib.suppress(RuntimeError):  # streams of other tests have failed
            NPU.synchronize(1)  # waits for all streams of the device, so for what was stuck, too
        assert_equal(copy_of(consumer), before)
    fake_set("FAKE_CANN_TIME_SCALE", "0.2")
    fetch_once(make("q", (0,), GQA, config=config), consumer, "c")
    assert consumer.finished(0) == (set(), {"decode-c"})
    assert consumer.workers[0].take_invalid_block_ids() == set()  # digests are compared


def test_consumer_that_dies_holds_the_blocks_no_longer_than_hccl_holds_the_sender(
    make: Make,
) -> None:
    producer = make("p", (0,), GQA)
    worker = producer.workers[0]
    with Peer("d", 3) as peer:
        worker.start([], [Grant("a", "prefill-a", (1, 2))], [])
        peer.ask("fetch", "p", producer.endpoint.port, "a", [1, 2])
        assert peer.ask("finished") == [[], [REQUEST], []]
        assert producer.finished(0) == ({"prefill-a"}, set())
        peer.ask("hold")
        before = num_issued()
        worker.start([], [Grant("b", "prefill-b", (3, 4))], [])
        peer.ask("fetch", "p", producer.endpoint.port, "b", [3, 4])
        wait_issued(before)
        peer.kill()
    worker.start([], [], ["b"])
    assert producer.finished(0) == ({"prefill-b"}, set())
    consumer = make("e", (1,), GQA, first=10**6)
    fetch_everywhere(producer, consumer, "c")


def copy_of(engine: NpuEngine) -> list[torch.Tensor]:
    """Return the KV cache of an engine of one worker."""
    return [part.cpu() for layer in engine.caches[0].values() for part in layer]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)] == [
        True
    ] * len(expected)
