"""TCP against peers that lie, stop, or are cut off in the middle."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from tests.transport_conformance import (
    BLOCK_LENS,
    SESSION,
    Worker,
    drive,
    introduce,
    make_worker,
    noise,
    of_many_chunks,
    outcomes_of,
)
from tests.unit.transport.liars import (
    LyingProducer,
    connect_as_consumer,
    framed,
    poll_until_outcome,
    receive_frame,
)
from vllm_pd.config import Digests
from vllm_pd.errors import DigestMismatchError, PeerLostError
from vllm_pd.transport.base import Transport, TransportOptions
from vllm_pd.transport.tcp import TcpTransport

BLOCK_LEN = sum(BLOCK_LENS)  # what a transfer of one block moves


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a block of each region be a chunk of its own."""
    monkeypatch.setattr("vllm_pd.transport.tcp.CHUNK_LEN", BLOCK_LENS[0])


def make_transport(num_streams: int = 1) -> Transport:
    return TcpTransport(TransportOptions(num_streams=num_streams))


@pytest.fixture
def consumer(request: pytest.FixtureRequest) -> Iterator[Worker]:
    worker = make_worker("decode", make_transport(getattr(request, "param", 1)))
    yield worker
    worker.transport.close()


@pytest.fixture
def producer() -> Iterator[Worker]:
    worker = make_worker("p0", make_transport())
    yield worker
    worker.transport.close()


@pytest.fixture
def liar(consumer: Worker) -> Iterator[LyingProducer]:
    """Return what the consumer takes for a producer; a fetch of block 1 is under way."""
    with LyingProducer(consumer, socket.AF_INET) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        yield liar


def data(chunk: int, **changes: object) -> dict[str, object]:
    return {
        "type": "data",
        "transfer_id": 1,
        "chunk": chunk,
        "num_bytes": BLOCK_LENS[chunk % 2],
        **changes,
    }


two_streams = pytest.mark.parametrize("consumer", [2], indirect=True)


def test_chunks_may_come_in_any_order(consumer: Worker, liar: LyingProducer) -> None:
    sock = liar.accept()
    for chunk in (1, 0):
        sock.sendall(framed(data(chunk)) + noise(chunk, BLOCK_LENS[chunk]))
    assert poll_until_outcome(consumer).error is None
    assert [consumer.block(region, 1) for region in (0, 1)] == [
        noise(region, BLOCK_LENS[region]) for region in (0, 1)
    ]
    receive_frame(sock)  # the greeting
    assert receive_frame(sock, consumer) == {"type": "received", "transfer_id": 1}


@two_streams
def test_chunks_may_come_over_any_stream(consumer: Worker, liar: LyingProducer) -> None:
    liar.accept(num_streams=2)
    for stream, chunk in ((1, 0), (0, 1)):
        liar.socks[stream].sendall(framed(data(chunk)) + noise(chunk, BLOCK_LENS[chunk]))
    assert poll_until_outcome(consumer).error is None
    assert consumer.block(0, 1) == noise(0, BLOCK_LENS[0])


@pytest.mark.parametrize(
    "message",
    [
        data(2),
        data(-1),
        data(0, num_bytes=BLOCK_LENS[0] - 1),
        data(0, num_bytes=1 << 62),
        {"type": "received", "transfer_id": 1},
        {"type": "abandoned", "transfer_id": 1, "reason": "?"},
        {"type": "memory"},
        ["data"],
    ],
    ids=str,
)
def test_producer_that_sends_what_was_not_asked_for_is_lost(
    consumer: Worker, liar: LyingProducer, message: object
) -> None:
    before = consumer.content()
    liar.accept().sendall(framed(message) + bytes(100))
    assert isinstance(poll_until_outcome(consumer).error, PeerLostError)
    assert consumer.content() == before


def test_chunk_that_comes_twice_loses_the_peer(consumer: Worker, liar: LyingProducer) -> None:
    sock = liar.accept()
    for _ in range(2):
        sock.sendall(framed(data(0)) + noise(0, BLOCK_LENS[0]))
    assert "again" in str(poll_until_outcome(consumer).error)


@two_streams
def test_chunk_that_comes_over_two_streams_loses_the_peer(
    consumer: Worker, liar: LyingProducer
) -> None:
    liar.accept(num_streams=2)
    for sock in liar.socks:
        sock.sendall(framed(data(0)) + b"half of it")
    assert "again" in str(poll_until_outcome(consumer).error)


def test_wrong_digest_fails_the_transfer_and_tells_the_producer(
    consumer: Worker, liar: LyingProducer
) -> None:
    sock = liar.accept()
    for chunk in (0, 1):
        message = data(chunk, digest=b"x" * 16)
        sock.sendall(framed(message) + noise(chunk, BLOCK_LENS[chunk]))
    assert isinstance(poll_until_outcome(consumer).error, DigestMismatchError)
    receive_frame(sock)
    assert receive_frame(sock, consumer)["type"] == "abandoned"
    consumer.transport.recv_blocks(SESSION, 2, [2])
    for chunk in (0, 1):
        sock.sendall(framed(data(chunk, transfer_id=2)) + noise(chunk, BLOCK_LENS[chunk]))
    assert poll_until_outcome(consumer).error is None


@two_streams
@pytest.mark.parametrize("cut", [0, 1])
def test_one_of_several_streams_that_is_cut_in_a_chunk_fails_the_transfer(
    consumer: Worker, liar: LyingProducer, cut: int
) -> None:
    liar.accept(num_streams=2)
    liar.socks[cut].sendall(framed(data(0)) + noise(0, BLOCK_LENS[0])[:5000])
    liar.socks[1 - cut].sendall(framed(data(1)) + noise(1, BLOCK_LENS[1])[:-1])
    drive(consumer, until=lambda: consumer.block(1, 1)[:-1] == noise(1, BLOCK_LENS[1])[:-1])
    assert consumer.transport.poll() == []
    liar.socks[cut].close()
    assert isinstance(poll_until_outcome(consumer).error, PeerLostError)
    after = consumer.content()
    liar.socks[1 - cut].sendall(noise(1, BLOCK_LENS[1])[-1:])
    drive(consumer, until=lambda: True)
    assert consumer.content() == after


def test_stream_that_is_ahead_of_the_consumer_is_not_read_until_it_is_wanted(
    consumer: Worker, liar: LyingProducer
) -> None:
    sock = liar.accept()
    before = consumer.content()
    sock.sendall(framed(data(0, transfer_id=2)) + noise(0, BLOCK_LENS[0]))
    sock.sendall(framed(data(1, transfer_id=2)) + noise(1, BLOCK_LENS[1]))
    for _ in range(3):
        drive(consumer, until=lambda: True)
    assert consumer.content() == before
    consumer.transport.recv_blocks(SESSION, 2, [5])
    for chunk in (0, 1):
        sock.sendall(framed(data(chunk)) + noise(10 + chunk, BLOCK_LENS[chunk]))
    seen = outcomes_of(consumer, count=2)[consumer.name]
    assert [(outcome.transfer_id, outcome.error) for outcome in seen] == [(1, None), (2, None)]
    assert consumer.block(0, 5) == noise(0, BLOCK_LENS[0])
    assert consumer.block(0, 1) == noise(10, BLOCK_LENS[0])


def test_chunk_of_another_length_that_waited_loses_the_peer_when_it_is_wanted(
    consumer: Worker, liar: LyingProducer
) -> None:
    liar.accept().sendall(framed(data(0, transfer_id=2, num_bytes=5)))
    drive(consumer, until=lambda: True)
    consumer.transport.recv_blocks(SESSION, 2, [5])
    seen = outcomes_of(consumer, count=2)[consumer.name]
    assert all(isinstance(outcome.error, PeerLostError) for outcome in seen)


# Consumers that lie


def test_consumer_that_leaves_in_the_middle_of_a_chunk_fails_the_transfer(
    producer: Worker, consumer: Worker
) -> None:
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0, 1, 2], digests=Digests.ALWAYS)
    with connect_as_consumer(producer) as sock:
        frame = receive_frame(sock, producer)
        assert (frame["type"], frame["chunk"]) == ("data", 0)
        sock.recv(100)
    assert isinstance(poll_until_outcome(producer).error, PeerLostError)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "received", "transfer_id": 2},
        {"type": "abandoned", "transfer_id": 2, "reason": "?"},
        data(0),
        {"type": "copied", "transfer_id": 1},
    ],
    ids=str,
)
def test_consumer_that_says_what_it_must_not_is_lost(
    producer: Worker, consumer: Worker, message: object
) -> None:
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0])
    with connect_as_consumer(producer) as sock:
        sock.sendall(framed(message))
        assert isinstance(poll_until_outcome(producer).error, PeerLostError)


def test_nothing_is_sent_before_all_streams_are_there(producer: Worker, consumer: Worker) -> None:
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0])
    with connect_as_consumer(producer, stream=0, num_streams=2) as first:
        for _ in range(3):
            drive(producer, until=lambda: True)
        assert not is_readable(first)
        with connect_as_consumer(producer, stream=1, num_streams=2):
            assert receive_frame(first, producer)["type"] == "data"


def test_streams_that_disagree_about_their_number_are_turned_away(
    producer: Worker, consumer: Worker
) -> None:
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0])
    with (
        connect_as_consumer(producer, stream=0, num_streams=1) as first,
        connect_as_consumer(producer, stream=1, num_streams=2) as second,
    ):
        receive_frame(first, producer)
        drive(producer, until=lambda: is_closed(second))
        first.sendall(framed({"type": "received", "transfer_id": 1}))
        assert poll_until_outcome(producer).error is None


def is_readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def is_closed(sock: socket.socket) -> bool:
    return is_readable(sock) and sock.recv(1) == b""


def test_receipt_of_what_was_not_sent_yet_loses_the_peer(consumer: Worker) -> None:
    """Else the blocks would be given to another request while they are still being sent."""
    producer = make_worker("p0", make_transport(), shapes=of_many_chunks(), num_blocks=4)
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0, 1, 2, 3])
    with connect_as_consumer(producer) as sock:
        assert receive_frame(sock, producer)["type"] == "data"
        sock.sendall(framed({"type": "received", "transfer_id": 1}))
        outcome = poll_until_outcome(producer)
    assert isinstance(outcome.error, PeerLostError)
    assert "receipt of transfer 1" in str(outcome.error)
    producer.transport.close()
