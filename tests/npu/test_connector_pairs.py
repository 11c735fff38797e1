"""Worker halves of two engines, their KV caches on NPUs, with torch_npu and HCCL's double."""

from __future__ import annotations

import logging

import msgspec
import pytest
import torch

from tests.npu.engines import (
    AUTO,
    CONFIG,
    GQA,
    Make,
    Model,
    Set,
    fetch_everywhere,
    load,
    replace_blocks,
    transports_used,
)
from tests.npu.peer import Peer, request_of
from vllm_pd.session.producer import Grant

MLA = Model(1, (16, 8))  # latent and positional part: blocks of different lengths


@pytest.mark.parametrize(
    ("prefill", "decode", "model"),
    [
        ((0,), (1,), GQA),
        ((0, 1), (2, 3), GQA),
        ((0, 1), (2, 3, 4, 5), GQA),
        ((0, 1, 2, 3), (4, 5), GQA),
        ((0, 1, 2, 3), (4, 5, 6, 7), GQA),
        ((0, 1, 2, 3), (4, 5), Model(2)),  # heads that several ranks hold
        ((0,), (1,), MLA),
        ((0, 1), (2, 3, 4, 5), MLA),
        ((0, 1, 2, 3), (4, 5), MLA),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, tuple) else f"{value.num_kv_heads}heads",
)
def test_blocks_arrive_over_hccl(
    make: Make, prefill: tuple[int, ...], decode: tuple[int, ...], model: Model
) -> None:
    producer = make("p", prefill, model)
    consumer = make("d", decode, model, first=10**6)
    fetch_everywhere(producer, consumer)
    assert transports_used(consumer) == {"hccl"}


def test_engines_that_compute_in_lockstep_set_up_many_pairs_without_waiting_in_a_circle(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Two engines of two ranks each fetch from two others, all at the same time."""
    producers = [make("p", (0, 1), GQA), make("q", (2, 3), GQA, first=10**6)]
    consumers = [
        make("d", (4, 5), GQA, first=2 * 10**6),
        make("e", (6, 7), GQA, first=3 * 10**6),
    ]
    for number, producer in enumerate(producers):
        for worker in producer.workers:
            grants = [Grant(f"{number}{i}", f"prefill-{i}", (1, 2)) for i in range(2)]
            worker.start([], grants, [])
    for i, consumer in enumerate(consumers):
        for worker in consumer.workers:
            requests = [
                load(producer, transfer_id=f"{number}{i}", block_ids=(3 + 2 * number, 4))
                for number, producer in enumerate(producers)
            ]
            worker.start(requests[:: 1 if i else -1], [], [])
    for consumer in consumers:
        for rank, worker in enumerate(consumer.workers):
            reported: set[str] = set()
            while len(reported) < 2:
                reported |= consumer.finished(rank)[1]
            assert worker.take_invalid_block_ids() == set(), caplog.text
        assert transports_used(consumer) == {"hccl"}


def test_second_fetch_uses_the_communicator_of_the_first(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ascend_vllm_plugin")
    producer, consumer = make("p", (0,), GQA), make("d", (1,), GQA, first=10**6)
    fetch_everywhere(producer, consumer, "a")
    fetch_everywhere(producer, consumer, "b")
    made = [record for record in caplog.records if "communicator with" in record.getMessage()]
    assert len(made) == 2  # one on each side


def test_auto_prefers_hccl(make: Make) -> None:
    producer = make("p", (0,), GQA, config=AUTO)
    consumer = make("d", (1,), GQA, first=10**6, config=AUTO)
    fetch_everywhere(producer, consumer)
    assert transports_used(consumer) == {"hccl"}
    assert producer.workers[0].transport_info()["hccl"] == ("ctypes", "")


def test_workers_on_one_device_use_tcp_and_say_why(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    producer = make("p", (0,), GQA, config=AUTO)
    consumer = make("d", (0,), GQA, first=10**6, config=AUTO)
    fetch_everywhere(producer, consumer)
    assert transports_used(consumer) == {"tcp"}
    assert "both workers use NPU 0" in caplog.text
    mode, reason = consumer.workers[0].transport_info()["hccl"]
    assert (mode, "both workers use NPU 0" in reason) == ("ctypes", True)


def test_device_memory_goes_over_tcp_where_it_is_asked_for(make: Make) -> None:
    tcp = msgspec.structs.replace(CONFIG, transport="tcp")
    producer = make("p", (0, 1), GQA, config=tcp)
    consumer = make("d", (2,), GQA, first=10**6, config=tcp)
    fetch_everywhere(producer, consumer)
    assert transports_used(consumer) == {"tcp"}


def test_transfers_of_several_requests_at_once_arrive(make: Make) -> None:
    producer, consumer = make("p", (0,), GQA), make("d", (1,), GQA, first=10**6)
    num = 6  # more than there are buffers
    producer.workers[0].start([], [Grant(str(i), f"r{i}", (i,)) for i in range(num)], [])
    loads = [load(producer, transfer_id=str(i), block_ids=(6 - i,)) for i in range(num)]
    consumer.workers[0].start(loads, [], [])
    reported: set[str] = set()
    while len(reported) < num:
        reported |= consumer.finished(0)[1]
    blocks = range(num)
    consumer.check_caches(replace_blocks(consumer, [6 - i for i in blocks], producer, blocks))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_transfers_are_issued_one_by_one_with_the_operations_of_the_model(
    make: Make, fake_set: Set, num_ranks: int
) -> None:
    """The ranks of both engines exchange something in every step; the double aborts on overlaps.

    HCCL 9.1 ``api_comm_impl.md``. Those operations are issued by torch_npu's own thread.
    """
    fake_set("FAKE_CANN_ISSUE_US", "3000")  # so that what may overlap does
    producer = make("p", (0, 1), GQA, with_group=True)
    consumer = make("d", (2, 3) if num_ranks == 2 else (2,), GQA, first=10**6, with_group=True)
    for number in range(10):
        fetch_everywhere(producer, consumer, f"t{number}")
    assert transports_used(consumer) == {"hccl"}
    assert producer.num_exchanges > 0


def test_graph_is_captured_undisturbed_while_a_peer_sends_what_was_asked_for(make: Make) -> None:
    """Other threads' work on a device that captures is refused, and ends the capture."""
    consumer = make("d", (1,), GQA, config=CONFIG)
    memory = torch.zeros(1024, dtype=torch.uint8, device="npu:1")
    with Peer("p", 2) as peer:
        peer.ask("grant", "a", [1, 2])
        consumer.workers[0].start([request_of(peer, "a")], [], [])
        assert consumer.finished(0) == (set(), {"decode-a"})
        consumer.is_held.set()  # in vLLM it is the engine's thread that captures
        peer.ask("grant", "b", [3, 4])
        consumer.workers[0].start([request_of(peer, "b")], [], [])
        torch.npu.set_device(1)  # type: ignore[attr-defined]
        for _ in range(20):
            with torch.npu.graph(torch.npu.NPUGraph()):  # type: ignore[attr-defined]
                memory.fill_(1)
        consumer.is_held.clear()
        assert consumer.finished(0) == (set(), {"decode-b"})
        assert consumer.workers[0].take_invalid_block_ids() == set()  # digests are compared
    assert transports_used(consumer) == {"hccl"}
