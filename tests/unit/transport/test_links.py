"""Data links against strangers: who may connect, and what a stranger can do."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import msgspec
import pytest

from tests.transport_conformance import SESSION, Worker, introduce, make_worker, outcomes_of
from vllm_pd.errors import PeerLostError, RemoteProtocolError
from vllm_pd.transport.base import TransportOptions
from vllm_pd.transport.links import Endpoint, Greeting
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport


@pytest.fixture
def pair() -> Iterator[tuple[Worker, Worker]]:
    producer = make_worker("p", TcpTransport(TransportOptions()))
    consumer = make_worker("d", TcpTransport(TransportOptions()))
    introduce(producer, consumer)
    yield producer, consumer
    producer.transport.close()
    consumer.transport.close()


def endpoint_of(worker: Worker) -> Endpoint:
    return msgspec.msgpack.decode(worker.transport.local_endpoint(), type=Endpoint)


def frame(data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + data


def connect(worker: Worker) -> socket.socket:
    host, port, _ = endpoint_of(worker).address.split("|")
    return socket.create_connection((host, int(port)), timeout=5)


def is_closed_by(worker: Worker, sock: socket.socket) -> bool:
    """Poll the worker until the stranger's connection is closed."""
    sock.settimeout(0.01)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        worker.transport.poll()
        try:
            return sock.recv(1) == b""
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


@pytest.mark.parametrize(
    "data",
    [
        frame(msgspec.msgpack.encode(Greeting(peer_id=SESSION, token=b"x" * 32))),
        frame(b"\xc1 no greeting"),
        struct.pack("!I", 2**31),
        frame(b"x" * 257),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["wrong token", "garbage", "huge frame", "long greeting", "another protocol"],
)
def test_stranger_is_turned_away_and_the_service_goes_on(
    pair: tuple[Worker, Worker], data: bytes
) -> None:
    producer, consumer = pair
    with connect(producer) as stranger:
        stranger.sendall(data)
        assert is_closed_by(producer, stranger)
    producer.transport.send_blocks(SESSION, 1, [0])
    consumer.transport.recv_blocks(SESSION, 1, [1])
    assert outcomes_of(consumer, producer)[consumer.name][0].error is None


def test_stranger_with_the_token_but_no_session_is_turned_away(
    pair: tuple[Worker, Worker],
) -> None:
    producer, _ = pair
    greeting = Greeting(peer_id="nobody", token=endpoint_of(producer).token)
    with connect(producer) as stranger:
        stranger.sendall(frame(msgspec.msgpack.encode(greeting)))
        assert is_closed_by(producer, stranger)


def test_silent_strangers_do_not_keep_peers_out(pair: tuple[Worker, Worker]) -> None:
    producer, consumer = pair
    strangers = []
    for _ in range(100):
        strangers.append(connect(producer))
        producer.transport.poll()
    producer.transport.send_blocks(SESSION, 1, [0])
    consumer.transport.recv_blocks(SESSION, 1, [1])
    assert outcomes_of(consumer, producer)[consumer.name][0].error is None
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("address", ["127.0.0.1|99999", "localhost|80", "nonsense", "127.0.0.1|x"])
def test_endpoint_that_is_no_address_blames_the_peer(address: str) -> None:
    transport = TcpTransport(TransportOptions())
    endpoint = msgspec.msgpack.encode(Endpoint(scheme="tcp", token=b"t", address=address))
    with pytest.raises(RemoteProtocolError):
        transport.add_peer("x", endpoint)
    transport.close()


def test_producer_that_confirms_what_was_not_copied_is_not_believed() -> None:
    """A copy counts only after it was made, whatever the other side says."""
    consumer = make_worker("d", ShmTransport(TransportOptions()))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0vllm-pd-test-liar")
        listener.listen()
        liar = Endpoint(scheme="shm", token=b"t", address="vllm-pd-test-liar")
        consumer.transport.add_peer(SESSION, msgspec.msgpack.encode(liar))
        before = consumer.block(0, 1)
        consumer.transport.recv_blocks(SESSION, 1, [1])
        sock, _ = listener.accept()
        sock.sendall(frame(msgspec.msgpack.encode({"type": "confirmed", "transfer_id": 1})))
        (outcome,) = outcomes_of(consumer)[consumer.name]
        sock.close()
    assert isinstance(outcome.error, PeerLostError)
    assert consumer.block(0, 1) == before
    consumer.transport.close()
