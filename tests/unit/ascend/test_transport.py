"""The HCCL transport where HCCL or a peer fails; HCCL and the NPU are stand-ins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.transport_conformance import (
    NUM_BLOCKS,
    SESSION,
    Worker,
    drive,
    introduce,
    make_worker,
    outcomes_of,
)
from tests.unit.ascend.stand_in_hccl import EngineThread, Rig, StandInNpu
from tests.unit.transport.placing import on_device
from vllm_pd.config import Digests
from vllm_pd.errors import PeerLostError, TransportUnavailableError
from vllm_pd.transport.base import TransportOptions

Make = Callable[..., Worker]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def make(rig: Rig) -> Iterator[Make]:
    workers: list[Worker] = []

    def make(name: str, **device: str) -> Worker:
        npu = StandInNpu(**device)
        transport = rig.make(TransportOptions(transfer_timeout_s=1.0), npu)
        workers.append(make_worker(name, transport, locate=partial(on_device, device=npu)))
        return workers[-1]

    yield make
    for worker in workers:
        worker.transport.close()


def fetch(producer: Worker, consumer: Worker, peer_id: str = SESSION, transfer_id: int = 1) -> None:
    """Move all blocks, and check that they arrive."""
    blocks = list(range(NUM_BLOCKS))
    producer.transport.send_blocks(peer_id, transfer_id, blocks, digests=Digests.SAMPLED)
    consumer.transport.recv_blocks(peer_id, transfer_id, blocks)
    seen = outcomes_of(producer, consumer)
    assert [outcomes[0].error for outcomes in seen.values()] == [None, None], seen
    assert consumer.content() == producer.content()


def engine_of(rig: Rig, worker: Worker) -> EngineThread:
    return next(engine for engine in rig.engines if engine.transport is worker.transport)


def test_every_communicator_is_destroyed(rig: Rig, make: Make) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    for worker in (producer, consumer):
        worker.transport.remove_peer(SESSION)
    introduce(producer, consumer, "again")
    fetch(producer, consumer, "again")
    for worker in (producer, consumer):
        worker.transport.close()
    assert [(b.num_made, b.num_destroyed) for b in rig.backends] == [(2, 2), (2, 2)]


def test_queue_of_torch_is_drained_before_hccl_is_called(rig: Rig, make: Make) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    assert all(device.num_drained >= 3 for device in rig.devices.values())


def test_nothing_moves_while_the_engine_computes(rig: Rig, make: Make) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    engine_of(rig, producer).hold()
    before = consumer.content()
    producer.fill(0, 0, value=99)
    producer.transport.send_blocks(SESSION, 2, [0])
    consumer.transport.recv_blocks(SESSION, 2, [1])
    for _ in range(20):
        drive(producer, consumer, until=lambda: True)
    assert consumer.content() == before
    engine_of(rig, producer).resume()
    assert outcomes_of(producer, consumer)[consumer.name][0].error is None
    assert consumer.block(0, 1) == producer.block(0, 0)


def test_workers_that_cannot_be_linked_do_not_try_again(
    rig: Rig, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    for backend in rig.backends:
        backend.refusal = "HCCL error 11 (TCP_CONNECT)"
    producer.transport.send_blocks(SESSION, 1, [0])
    consumer.transport.recv_blocks(SESSION, 1, [1])
    seen = outcomes_of(producer, consumer)
    assert all(isinstance(outcomes[0].error, PeerLostError) for outcomes in seen.values())
    endpoint = producer.transport.local_endpoint()
    drive(producer, consumer, until=lambda: not consumer.transport.can_reach(endpoint))
    drive(producer, consumer, until=lambda: bool(consumer.transport.mode[1]))
    # One side may see only that the other one has given up.
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cannot be linked: HCCL error 11" in line for line in lines)


def test_host_that_hccl_held_the_engine_up_for_is_left_alone(
    rig: Rig, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_vllm_plugin.verdicts.STALL_S", 0.0)
    producer, other, consumer = make("p0"), make("p1"), make("decode")
    introduce(producer, consumer)
    for backend in rig.backends:
        backend.refusal = "HCCL error 9 (TIMEOUT)"
    producer.transport.send_blocks(SESSION, 1, [0])
    consumer.transport.recv_blocks(SESSION, 1, [1])
    outcomes_of(producer, consumer)
    endpoint = other.transport.local_endpoint()
    drive(
        *(producer, consumer),
        until=lambda: (
            not consumer.transport.can_reach(endpoint) or not producer.transport.can_reach(endpoint)
        ),
    )


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"soc": "Stand-in920"}, "different chips"),
        ({"host_index": "same"}, "both workers use NPU same"),
    ],
)
def test_workers_that_cannot_have_a_communicator_do_not_try(
    make: Make, theirs: dict[str, str], words: str
) -> None:
    ours = {"host_index": "same"} if "host_index" in theirs else {}
    producer, consumer = make("p0", **ours), make("decode", **theirs)
    assert not consumer.transport.can_reach(producer.transport.local_endpoint())
    assert words in consumer.transport.mode[1]


def test_consumer_that_does_not_receive_costs_the_sender_its_timeout_and_no_buffer(
    rig: Rig, make: Make
) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    for number in range(5):  # more than there are buffers
        engine_of(rig, consumer).hold()
        producer.transport.send_blocks(SESSION, 2, [0])
        consumer.transport.recv_blocks(SESSION, 2, [1])
        (outcome,) = outcomes_of(producer)[producer.name]
        assert isinstance(outcome.error, PeerLostError)
        for worker in (producer, consumer):
            worker.transport.remove_peer(SESSION)
        engine_of(rig, consumer).resume()
        outcomes_of(consumer)
        introduce(producer, consumer)
        fetch(producer, consumer, transfer_id=10 + number)


def test_backend_that_cannot_be_loaded_makes_the_transport_unavailable() -> None:
    from ascend_vllm_plugin.backend import HcclError
    from ascend_vllm_plugin.transport import HcclTransport

    def refuse(*_: object) -> object:
        raise HcclError("cannot load libhccl.so")

    npu = StandInNpu()
    transport = HcclTransport(
        TransportOptions(),
        open_device=lambda _: npu,
        make_backend=refuse,  # type: ignore[arg-type]
    )
    with pytest.raises(TransportUnavailableError, match=r"cannot load libhccl\.so"):
        make_worker("p0", transport)
    transport.close()
    npu.close()


def leave_an_operation(rig: Rig, producer: Worker, consumer: Worker) -> None:
    """Begin a fetch that the consumer's device never ends."""
    rig.device_of(consumer.transport).hold()
    producer.transport.send_blocks(SESSION, 2, [0])
    consumer.transport.recv_blocks(SESSION, 2, [1])
    (outcome,) = outcomes_of(producer, consumer)[consumer.name]
    assert isinstance(outcome.error, PeerLostError)


def test_operation_that_the_device_never_ends_fails_and_writes_nothing_afterwards(
    rig: Rig, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = make("p0")
    monkeypatch.setattr("ascend_vllm_plugin.transport.OVERDUE_S", 0.0)
    consumer = make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    producer.fill(0, 0, value=99)
    before = consumer.content()
    leave_an_operation(rig, producer, consumer)
    device = rig.device_of(consumer.transport)
    device.resume()
    device.close()  # whatever it still does is done then
    assert device.num_aborted == 1
    assert consumer.content() == before
    assert not consumer.transport.can_reach(producer.transport.local_endpoint())
    assert "the device did not end an operation" in consumer.transport.mode[1]


def test_communicator_of_an_operation_that_never_ended_is_not_destroyed(
    rig: Rig, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = make("p0")
    monkeypatch.setattr("ascend_vllm_plugin.transport.OVERDUE_S", 0.0)
    consumer = make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    leave_an_operation(rig, producer, consumer)
    rig.device_of(consumer.transport).resume()
    for worker in (producer, consumer):
        worker.transport.close()
    made = {id(backend.device): backend for backend in rig.backends}
    theirs = made[id(rig.device_of(consumer.transport))]
    assert (theirs.num_made, theirs.num_destroyed) == (1, 0)


def test_worker_whose_buffers_are_all_left_to_the_device_asks_for_a_restart(
    rig: Rig, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, other = make("p0"), make("p1")
    monkeypatch.setattr("ascend_vllm_plugin.transport.OVERDUE_S", 0.0)
    monkeypatch.setattr("ascend_vllm_plugin.transport.NUM_BUFFERS", 1)
    consumer = make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    leave_an_operation(rig, producer, consumer)
    rig.device_of(consumer.transport).resume()
    assert not consumer.transport.can_reach(other.transport.local_endpoint())
    assert "restart that instance" in consumer.transport.mode[1]


def test_consumer_has_no_more_communicators_than_it_may(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_vllm_plugin.transport.MAX_PAIRS", 1)
    producer, other, consumer = make("p0"), make("p1"), make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    assert not consumer.transport.can_reach(other.transport.local_endpoint())
    assert "1 communicators already" in consumer.transport.mode[1]


def test_worker_whose_streams_have_failed_asks_for_a_restart(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, consumer = make("p0"), make("decode")
    monkeypatch.setattr("ascend_vllm_plugin.device.MAX_STREAMS", 0)
    assert not consumer.transport.can_reach(producer.transport.local_endpoint())
    assert "streams of a worker have failed: restart" in consumer.transport.mode[1]


def test_producer_with_all_communicators_declines_a_consumer_that_then_goes_another_way(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_vllm_plugin.transport.MAX_PAIRS", 1)
    producer, consumer, late = make("p0"), make("decode"), make("late")
    introduce(producer, consumer)
    fetch(producer, consumer)
    introduce(producer, late, "late")
    producer.transport.send_blocks("late", 1, [0])
    late.transport.recv_blocks("late", 1, [1])
    seen = outcomes_of(producer, late)
    assert all(isinstance(outcomes[0].error, PeerLostError) for outcomes in seen.values())
    assert "1 communicators already" in str(seen[late.name][0].error)
    assert not late.transport.can_reach(producer.transport.local_endpoint())
    fetch(producer, consumer, transfer_id=2)


def test_link_that_is_seen_before_the_end_of_the_one_it_replaces_needs_no_further_room(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_vllm_plugin.transport.MAX_PAIRS", 1)
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer)
    consumer.transport.remove_peer(SESSION)
    consumer.transport.add_peer(SESSION, producer.transport.local_endpoint())
    consumer.transport.recv_blocks(SESSION, 2, [1])
    for workers in ((consumer,), (producer, consumer)):  # so the producer finds both in one poll
        for _ in range(20):
            drive(*workers, until=lambda: True)
    producer.transport.send_blocks(SESSION, 2, [0])
    (outcome,) = outcomes_of(producer, consumer)[consumer.name]
    assert outcome.error is None
