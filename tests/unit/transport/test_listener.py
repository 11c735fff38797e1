"""Links of a worker that has no descriptors left.

Each test runs in a child process, because the limit is that of a whole process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import select
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import msgspec
import pytest

from tests.transport_conformance import SESSION, Worker, introduce, make_worker, outcomes_of
from vllm_pd.transport.base import Transport, TransportOptions
from vllm_pd.transport.links import Endpoint
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport

MakeTransport = Callable[[TransportOptions], Transport]
TIMEOUT_MS = 20_000
SOON_MS = 100  # well before a listener looks again by itself


@pytest.fixture(params=[ShmTransport, TcpTransport], ids=["shm", "tcp"])
def make_transport(request: pytest.FixtureRequest) -> MakeTransport:
    made: MakeTransport = request.param
    return made


def in_child(scene: Callable[[MakeTransport], None], make_transport: MakeTransport) -> None:
    """Run a scene in a fresh process; raise what it raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        executor.submit(scene, make_transport).result(timeout=60)


class Scene:
    """A producer, strangers to come, and what is logged."""

    def __init__(self, make_transport: MakeTransport) -> None:
        self.producer = make_worker("p", make_transport(TransportOptions()))
        self.consumer = make_worker("d", make_transport(TransportOptions()))
        self.poller = select.poll()
        self.poller.register(self.producer.transport.fileno(), select.POLLIN)
        self._endpoint = endpoint_of(self.producer)
        family = socket.AF_UNIX if self._endpoint.scheme == "shm" else socket.AF_INET
        self.strangers = [socket.socket(family) for _ in range(3)]
        self.warnings: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vllm_pd").addHandler(handler)

    def connect(self, stranger: socket.socket) -> None:
        stranger.settimeout(TIMEOUT_MS / 1000)
        if self._endpoint.scheme == "shm":
            stranger.connect(f"\0{self._endpoint.address}")
        else:
            host, port, _ = self._endpoint.address.split("|")
            stranger.connect((host, int(port)))

    def poll_until_idle(self) -> int:
        """Poll the producer as its thread would, until that sleeps; return how often."""
        count = 0
        timeout_ms = TIMEOUT_MS
        while self.poller.poll(timeout_ms):
            timeout_ms = 0
            self.producer.transport.poll()
            count += 1
            assert count < 100, "the thread never sleeps"
        return count

    def check_transfer(self) -> None:
        introduce(self.producer, self.consumer)
        self.producer.transport.send_blocks(SESSION, 1, [0])
        self.consumer.transport.recv_blocks(SESSION, 1, [1])
        outcomes = outcomes_of(self.consumer, self.producer)
        assert outcomes[self.consumer.name][0].error is None


def endpoint_of(worker: Worker) -> Endpoint:
    return msgspec.msgpack.decode(worker.transport.local_endpoint(), type=Endpoint)


@contextmanager
def limit(num_descriptors: int) -> Iterator[None]:
    """Let no descriptor of this number or a higher one be made."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_descriptors, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Let none be made, not even in place of one that is closed: others were faster."""
    with limit(3):
        yield


@contextmanager
def all_in_use() -> Iterator[None]:
    """Let none be made, except in place of one that is closed."""
    held: list[int] = []
    with limit(200):
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        try:
            yield
        finally:
            for fd in held:
                os.close(fd)


def sleeps_and_warns_once(make_transport: MakeTransport) -> None:
    scene = Scene(make_transport)
    with no_descriptors():
        for stranger in scene.strangers:
            scene.connect(stranger)
        assert scene.poll_until_idle() < 10
        assert scene.poll_until_idle() < 10  # and looks again after a while
    assert len(scene.warnings) == 1


def lets_peers_in_later(make_transport: MakeTransport) -> None:
    scene = Scene(make_transport)
    with no_descriptors():
        scene.connect(scene.strangers[0])
        scene.poll_until_idle()
    scene.poll_until_idle()
    scene.check_transfer()
    assert len(scene.warnings) == 1


def listens_as_soon_as_a_link_is_dropped(make_transport: MakeTransport) -> None:
    scene = Scene(make_transport)
    scene.check_transfer()
    with no_descriptors():
        scene.connect(scene.strangers[0])
        scene.poll_until_idle()
    scene.producer.transport.remove_peer(SESSION)
    assert scene.poller.poll(SOON_MS)


def turns_peers_away(make_transport: MakeTransport) -> None:
    scene = Scene(make_transport)
    with all_in_use():
        for stranger in scene.strangers:
            scene.connect(stranger)
            scene.poll_until_idle()
            assert stranger.recv(1) == b""
    assert len(scene.warnings) == 1
    scene.check_transfer()


def test_worker_without_descriptors_sleeps_and_warns_once(make_transport: MakeTransport) -> None:
    in_child(sleeps_and_warns_once, make_transport)


def test_peers_get_in_when_there_are_descriptors_again(make_transport: MakeTransport) -> None:
    in_child(lets_peers_in_later, make_transport)


def test_descriptor_of_a_dropped_link_lets_the_next_peer_in(make_transport: MakeTransport) -> None:
    in_child(listens_as_soon_as_a_link_is_dropped, make_transport)


def test_reserve_is_used_to_turn_peers_away_at_once(make_transport: MakeTransport) -> None:
    in_child(turns_peers_away, make_transport)
