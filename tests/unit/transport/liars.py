"""Peers that are let in and then say what they please."""

from __future__ import annotations

import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec

from tests.transport_conformance import SESSION, TIMEOUT_S, Worker
from vllm_pd.transport.base import TransferOutcome
from vllm_pd.transport.links import Endpoint, Greeting


def framed(message: object) -> bytes:
    """Return a frame as a link carries it."""
    data = msgspec.msgpack.encode(message)
    return struct.pack("!I", len(data)) + data


class LyingProducer:
    """Something that a consumer connects to; it answers nothing by itself.

    Args:
        consumer: who is to connect.
        family: of the socket.
        peer_id: of the session.
    """

    def __init__(
        self, consumer: Worker, family: socket.AddressFamily, peer_id: str = SESSION
    ) -> None:
        self._consumer = consumer
        self._listener = socket.socket(family)
        if family == socket.AF_UNIX:
            address = f"vllm-pd-test-{secrets.token_hex(8)}"
            self._listener.bind(f"\0{address}")
        else:
            self._listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1|{self._listener.getsockname()[1]}|plain"
        self._listener.listen()
        endpoint = Endpoint(scheme=consumer.transport.name, token=b"t", address=address)
        consumer.transport.add_peer(peer_id, msgspec.msgpack.encode(endpoint))
        self.socks: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for sock in (self._listener, *self.socks):
            sock.close()

    def accept(self, num_streams: int = 1) -> socket.socket:
        """Let the consumer connect; return its first connection."""
        for _ in range(num_streams):
            sock, _ = self._listener.accept()
            sock.settimeout(TIMEOUT_S)
            self.socks.append(sock)
        return self.socks[0]

    def send(self, message: object, fds: Sequence[int] = (), stream: int = 0) -> None:
        """Send a frame."""
        socket.send_fds(self.socks[stream], [framed(message)], list(fds))


def connect_as_consumer(
    producer: Worker, *, stream: int = 0, num_streams: int = 1
) -> socket.socket:
    """Connect to a producer and show who we are."""
    endpoint = msgspec.msgpack.decode(producer.transport.local_endpoint(), type=Endpoint)
    if endpoint.scheme == "shm":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"\0{endpoint.address}")
    else:
        host, port, _ = endpoint.address.split("|")
        sock = socket.create_connection((host, int(port)))
    greeting = Greeting(
        peer_id=SESSION, token=endpoint.token, stream=stream, num_streams=num_streams
    )
    sock.sendall(framed(greeting))
    sock.settimeout(TIMEOUT_S)
    return sock


def poll_until_outcome(worker: Worker) -> TransferOutcome:
    """Poll a worker until it has exactly one outcome."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (outcomes := worker.transport.poll()):
        assert time.monotonic() < deadline
        select.select([worker.transport.fileno()], [], [], 0.05)
    (outcome,) = outcomes
    return outcome


def receive_frame(sock: socket.socket, *workers: Worker) -> dict[str, object]:
    """Return the next frame on a socket, polling workers meanwhile."""
    data = b""
    wanted = 4
    deadline = time.monotonic() + TIMEOUT_S
    while len(data) < wanted:
        for worker in workers:
            worker.transport.poll()
        assert time.monotonic() < deadline
        if select.select([sock], [], [], 0.01)[0]:
            data += sock.recv(wanted - len(data))
        if len(data) == 4 == wanted:
            wanted += struct.unpack("!I", data)[0]
    frame: dict[str, object] = msgspec.msgpack.decode(data[4:])
    return frame
