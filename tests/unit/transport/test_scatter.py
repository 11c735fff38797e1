"""Memory in many places, through a socket pair."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
from collections.abc import Iterator

import pytest

from tests.transport_conformance import noise
from vllm_pd.transport.memory import address_of
from vllm_pd.transport.scatter import Scatter, ScatterQueue

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


def queue_of(*parts: memoryview | bytes) -> ScatterQueue:
    queue = ScatterQueue()
    queue.append(Scatter.of(*parts))
    return queue


def cut(data: bytearray | bytes, rng: random.Random, count: int) -> list[memoryview]:
    """Return all of some memory in so many pieces, some of which may be empty."""
    places = sorted(rng.randrange(len(data)) for _ in range(count - 1))
    view = memoryview(data)
    return [view[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def transfer(pair: Pair, sending: ScatterQueue, filling: ScatterQueue) -> None:
    left, right = pair
    while sending or filling:
        if sending:
            with contextlib.suppress(BlockingIOError):
                sending.send(left.fileno())
        if filling:
            filling.receive(right.fileno())


@pytest.mark.parametrize(("num_parts", "num_bytes"), [(1, 10), (3000, 3 << 20), (700, 900)])
def test_bytes_arrive_in_order_whatever_the_kernel_takes_at_once(
    pair: Pair, num_parts: int, num_bytes: int
) -> None:
    rng = random.Random(num_parts)
    target = bytearray(num_bytes)
    sending = queue_of(*cut(noise(1, num_bytes), rng, num_parts))
    filling = queue_of(*cut(target, rng, num_parts))
    transfer(pair, sending, filling)
    assert target == noise(1, num_bytes)


def test_memory_that_is_added_in_the_middle_follows(pair: Pair) -> None:
    sending = queue_of(noise(1, 4 << 20))
    sending.send(pair[0].fileno())
    assert sending
    sending.append(Scatter.of(b"more"))
    sending.append(Scatter.of(b" and more"))
    target = bytearray((4 << 20) + 13)
    transfer(pair, sending, queue_of(memoryview(target)))
    assert target == noise(1, 4 << 20) + b"more and more"


def test_memory_lives_as_long_as_it_is_queued(pair: Pair) -> None:
    sending = queue_of(bytes(noise(1, 100_000)))
    gc.collect()
    target = bytearray(100_000)
    transfer(pair, sending, queue_of(memoryview(target)))
    assert target == noise(1, 100_000)


def test_places_are_what_they_were_after_they_were_sent(pair: Pair) -> None:
    data = bytearray(noise(1, 4 << 20))
    scatter = Scatter.of(memoryview(data))
    queue = ScatterQueue()
    queue.append(scatter)
    queue.send(pair[0].fileno())
    assert scatter.iov.tolist() == [[address_of(data), len(data)]]


def test_first_are_the_next_bytes_and_no_more_places_than_needed() -> None:
    queue = queue_of(b"one", b"two", b"three", b"four")
    queue.consume(1)
    assert [bytes(view) for view in queue.first(3)] == [b"ne", b"two"]
    queue.consume(2)
    assert [bytes(view) for view in queue.first(100)] == [b"two", b"three", b"four"]


def test_queue_is_empty_when_all_is_done() -> None:
    queue = queue_of(b"abc", b"", b"de")
    queue.consume(5)
    assert not queue
    assert not queue_of(b"")


def test_views_are_the_memory_itself() -> None:
    data = bytearray(b"abcdef")
    first, second = Scatter.of(memoryview(data)[:2], memoryview(data)[4:]).views()
    first[0], second[0] = ord("A"), ord("E")
    assert data == b"AbcdEf"


def fill(sock: socket.socket, sending: ScatterQueue) -> None:
    while sending:
        sending.send(sock.fileno())


def test_socket_without_room_or_bytes_blocks(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        fill(pair[0], queue_of(noise(1, 8 << 20)))
    with pytest.raises(BlockingIOError):
        queue_of(memoryview(bytearray(1))).receive(pair[0].fileno())


def test_peer_that_is_gone_is_an_error_to_send_and_the_end_to_receive(pair: Pair) -> None:
    left, right = pair
    right.close()
    with pytest.raises(BrokenPipeError):
        queue_of(b"abc").send(left.fileno())
    assert queue_of(memoryview(bytearray(1))).receive(left.fileno()) == 0


def test_descriptor_that_is_closed_is_an_error() -> None:
    with pytest.raises(OSError, match=os.strerror(9)):
        queue_of(b"abc").send(-1)
