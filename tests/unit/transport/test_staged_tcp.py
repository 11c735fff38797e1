"""TCP with the KV cache on a device: what happens to buffers when things go wrong."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest

from tests.stand_in_device import StandInDevice, StandInEvent
from tests.transport_conformance import (
    SESSION,
    Worker,
    drive,
    introduce,
    make_worker,
    outcomes_of,
    with_heads,
)
from tests.unit.transport.liars import (
    LyingProducer,
    connect_as_consumer,
    framed,
    poll_until_outcome,
    receive_frame,
)
from tests.unit.transport.placing import on_device
from vllm_pd.config import Digests
from vllm_pd.errors import PeerLostError, TransferError, TransportUnavailableError
from vllm_pd.transport.base import KVRegion, TransportOptions
from vllm_pd.transport.chunks import plan_chunks
from vllm_pd.transport.tcp import TcpTransport

SHAPES = with_heads(2)
BUFFER_LEN = 4096  # a few blocks
BLOCKS = [5, 1, 0, 7, 2, 3, 6, 4]  # several chunks; more than there are buffers

Make = Callable[..., Worker]


class Device(StandInDevice):
    """Can fail when it is asked what it computes."""

    is_lost = False

    def mark(self) -> list[StandInEvent]:
        if self.is_lost:
            raise RuntimeError("device lost\nand much advice")
        return super().mark()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr("vllm_pd.transport.tcp.CHUNK_LEN", BUFFER_LEN)
    device = Device()
    yield device
    device.close()


@pytest.fixture
def make(device: Device) -> Iterator[Make]:
    """Makes workers with two buffers for each direction."""
    workers: list[Worker] = []

    def make(name: str, *, num_streams: int = 1) -> Worker:
        options = TransportOptions(num_streams=num_streams, staging_len=4 * BUFFER_LEN)
        transport = TcpTransport(options, open_device=lambda _: device)
        locate: Callable[[KVRegion], KVRegion] = lambda region: on_device(region, device)  # noqa: E731
        workers.append(make_worker(name, transport, shapes=SHAPES, locate=locate))
        return workers[-1]

    yield make
    device.release_all()
    for worker in workers:
        worker.transport.close()


def fetch(producer: Worker, consumer: Worker, peer_id: str, transfer_id: int = 1) -> None:
    """Move all blocks, and check that they arrive; it takes all buffers."""
    producer.transport.send_blocks(peer_id, transfer_id, BLOCKS, digests=Digests.ALWAYS)
    consumer.transport.recv_blocks(peer_id, transfer_id, sorted(BLOCKS))
    seen = outcomes_of(producer, consumer)
    assert [outcomes[0].error for outcomes in seen.values()] == [None, None], seen
    for region in range(len(SHAPES)):
        for src, dst in zip(BLOCKS, sorted(BLOCKS), strict=True):
            assert consumer.block(region, dst) == producer.block(region, src)


def test_consumers_that_leave_in_the_middle_cost_the_producer_no_buffer(make: Make) -> None:
    producer, consumer = make("p0"), make("decode")
    for number in range(4):  # twice as often as there are buffers
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, number, BLOCKS)
        with connect_as_consumer(producer) as sock:
            assert receive_frame(sock, producer)["type"] == "data"
            if number % 2:
                producer.transport.remove_peer(SESSION)
        assert isinstance(poll_until_outcome(producer).error, PeerLostError)
        producer.transport.remove_peer(SESSION)
        consumer.transport.remove_peer(SESSION)
    introduce(producer, consumer, "another")
    fetch(producer, consumer, "another")


def test_consumers_that_leave_while_the_device_copies_cost_the_producer_no_buffer(
    make: Make, device: Device
) -> None:
    producer, consumer = make("p0"), make("decode")
    for number in range(3):
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, number, BLOCKS)
        num_recorded = device.num_recorded
        device.hold()
        with connect_as_consumer(producer):
            drive(producer, until=partial(has_recorded, device, num_recorded + 2))
        producer.transport.remove_peer(SESSION)
        assert producer.transport.poll() == []
        device.resume()
        assert isinstance(poll_until_outcome(producer).error, PeerLostError)
        consumer.transport.remove_peer(SESSION)
    introduce(producer, consumer, "another")
    fetch(producer, consumer, "another")


def has_recorded(device: Device, count: int) -> bool:
    return device.num_recorded >= count


@pytest.mark.parametrize("num_streams", [1, 2])
def test_producers_that_leave_in_the_middle_cost_the_consumer_no_buffer(
    make: Make, num_streams: int
) -> None:
    consumer, producer = make("decode", num_streams=num_streams), make("p0")
    (first, second, *_) = plan_chunks(consumer.regions, None, len(BLOCKS), max_len=BUFFER_LEN)
    for number in range(4):
        with LyingProducer(consumer, socket.AF_INET) as liar:
            consumer.transport.recv_blocks(SESSION, number, BLOCKS)
            liar.accept(num_streams)
            for index, chunk in enumerate((first, second)[:num_streams]):
                frame = {"type": "data", "transfer_id": number, "chunk": index}
                half = framed({**frame, "num_bytes": chunk.num_bytes}) + b"half"
                liar.socks[index].sendall(half)
            for _ in range(3):
                drive(consumer, until=lambda: True)
            if number % 2:
                consumer.transport.remove_peer(SESSION)
        assert isinstance(poll_until_outcome(consumer).error, PeerLostError)
        consumer.transport.remove_peer(SESSION)
    introduce(producer, consumer, "another")
    fetch(producer, consumer, "another")


def test_lost_transfer_ends_when_the_device_does_not_write_any_more(
    make: Make, device: Device
) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    fetch(producer, consumer, SESSION)
    num_recorded = device.num_recorded
    producer.transport.send_blocks(SESSION, 2, [0])
    device.wait_recorded(num_recorded + 1)
    drive(producer, until=lambda: True)
    consumer.transport.recv_blocks(SESSION, 2, [1])
    device.compute_gate.clear()
    device.run_compute(lambda: None)
    drive(producer, consumer, until=lambda: device.num_recorded >= num_recorded + 2)
    consumer.transport.remove_peer(SESSION)
    assert consumer.transport.poll() == []
    device.compute_gate.set()
    assert isinstance(poll_until_outcome(consumer).error, PeerLostError)


def test_close_ends_transfers_whose_work_was_never_begun(make: Make, device: Device) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    device.hold()
    for transfer_id in (1, 2, 3):
        producer.transport.send_blocks(SESSION, transfer_id, BLOCKS)
    with connect_as_consumer(producer):
        drive(producer, until=lambda: device.num_recorded >= 2)
        device.resume()
        producer.transport.close()
    outcomes = producer.transport.poll()
    assert [outcome.transfer_id for outcome in outcomes] == [1, 2, 3]
    assert all(isinstance(outcome.error, PeerLostError) for outcome in outcomes)


def test_device_that_refuses_a_copy_fails_the_transfer_and_not_the_next_peer(
    make: Make, device: Device
) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    device.refuse(RuntimeError("out of memory"))
    producer.transport.send_blocks(SESSION, 1, BLOCKS)
    consumer.transport.recv_blocks(SESSION, 1, BLOCKS)
    seen = outcomes_of(producer, consumer)
    assert "out of memory" in str(seen[producer.name][0].error)
    assert isinstance(seen[consumer.name][0].error, TransferError)
    for worker in (producer, consumer):
        worker.transport.remove_peer(SESSION)
    introduce(producer, consumer, "another")
    fetch(producer, consumer, "another")


def test_device_that_cannot_say_what_it_computes_fails_the_transfer(
    make: Make, device: Device
) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    device.is_lost = True
    for transfer_id in range(3):  # more often than there are buffers
        producer.transport.send_blocks(SESSION, transfer_id, [0])
        consumer.transport.recv_blocks(SESSION, transfer_id, [1])
        seen = outcomes_of(producer, consumer)
        assert "device lost" in str(seen[consumer.name][0].error)
        assert seen[producer.name][0].error is not None
    device.is_lost = False
    fetch(producer, consumer, SESSION, transfer_id=9)


def test_chunk_that_comes_over_two_streams_while_there_is_no_buffer_loses_that_peer_only(
    make: Make, device: Device
) -> None:
    """It is found when a buffer is free again, which is nobody's call into the transport."""
    consumer, other = make("decode", num_streams=4), make("p0")
    introduce(other, consumer, "good")
    with LyingProducer(consumer, socket.AF_INET) as liar:
        device.compute_gate.clear()
        device.run_compute(lambda: None)
        consumer.transport.recv_blocks(SESSION, 1, BLOCKS)
        liar.accept(num_streams=4)
        chunks = plan_chunks(consumer.regions, None, len(BLOCKS), max_len=BUFFER_LEN)
        # Two chunks take the two buffers; then one waits for a buffer on two streams.
        for stream, chunk in enumerate((0, 1, 2, 2)):
            num_bytes = chunks[chunk].num_bytes
            frame = {"type": "data", "transfer_id": 1, "chunk": chunk, "num_bytes": num_bytes}
            liar.socks[stream].sendall(framed(frame) + bytes(num_bytes if chunk < 2 else 0))
            drive(consumer, until=lambda: True)
        device.wait_blocked(1)
        drive(consumer, until=lambda: True)
        device.compute_gate.set()
        outcome = poll_until_outcome(consumer)
        assert "again" in str(outcome.error)
    fetch(other, consumer, "good")


def test_memory_of_several_kinds_is_not_used() -> None:
    transport = TcpTransport(TransportOptions())
    regions: Sequence[KVRegion] = [
        KVRegion("a", 8, 1, 8, device="cuda"),
        KVRegion("b", 8, 1, 8, device="npu"),
    ]
    with pytest.raises(TransportUnavailableError, match="KV cache in cuda, npu memory"):
        transport.register_regions(regions)
    transport.close()


def test_staging_memory_for_less_than_a_buffer_each_way_is_refused(device: Device) -> None:
    transport = TcpTransport(
        TransportOptions(staging_len=2 * BUFFER_LEN - 1), open_device=lambda _: device
    )
    with pytest.raises(TransportUnavailableError, match="less than two buffers"):
        make_worker("p0", transport, shapes=SHAPES, locate=lambda r: on_device(r, device))
    transport.close()
