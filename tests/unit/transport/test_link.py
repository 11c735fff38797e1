"""One link over a socket pair: frames, payload behind them, and who is told what."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.transport_conformance import noise
from vllm_pd.errors import LocalProtocolError, RemoteProtocolError
from vllm_pd.transport.link import Link, Mark, Outgoing
from vllm_pd.transport.scatter import Scatter

Pair = tuple[Link, Link]
LONG = 8 << 20  # more than a socket takes at once


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = (
        Link(sock, max_frame_len=1 << 20, takes_fds=True) for sock in socket.socketpair()
    )
    yield left, right
    left.close()
    right.close()


class Feed:
    """Hands out what it was given, one after the other, and notes what was sent."""

    def __init__(self, *lengths: int) -> None:
        self.sent: list[int] = []
        self._waiting = list(enumerate(lengths))

    def __call__(self) -> Outgoing | None:
        if not self._waiting:
            return None
        index, length = self._waiting.pop(0)
        payload = memoryview(noise(index, length))
        return Outgoing(b"next", Scatter.of(payload), lambda: self.sent.append(index))


def received(link: Link) -> list[bytes | Mark]:
    return list(link.receive())


def transfer(sender: Link, receiver: Link, *lengths: int) -> tuple[list[bytes], list[bytes]]:
    """Let payloads of these lengths arrive; return them, and the other frames."""
    targets = [bytearray(length) for length in lengths]
    waiting = list(targets)
    frames: list[bytes] = []
    num_ended = 0
    while num_ended < len(lengths) or sender.waits_to_write:
        for item in receiver.receive():
            match item:
                case b"next":
                    receiver.expect_payload(Scatter.of(memoryview(waiting.pop(0))))
                case bytes() as frame:
                    frames.append(frame)
                case _:
                    num_ended += 1
        sender.flush()
    frames += [item for item in receiver.receive() if isinstance(item, bytes)]
    return [bytes(target) for target in targets], frames


def test_frames_arrive_whole_and_in_order(pair: Pair) -> None:
    left, right = pair
    for frame in (b"one", b"two" * 1000, b"3"):
        left.send_frame(frame)
    assert received(right) == [b"one", b"two" * 1000, b"3"]


def test_frame_that_comes_in_bits_is_put_together(pair: Pair) -> None:
    _, right = pair
    raw = socket.socket(fileno=os.dup(pair[0].fileno()))
    for byte in b"\0\0\0\2hi":
        assert received(right) == []
        raw.send(bytes([byte]))
    assert received(right) == [b"hi"]
    raw.close()


@pytest.mark.parametrize("length", [0, (1 << 20) + 1, (1 << 32) - 1])
def test_frame_of_no_length_or_too_long_blames_the_peer(pair: Pair, length: int) -> None:
    left, right = pair
    raw = socket.socket(fileno=os.dup(left.fileno()))
    raw.send(length.to_bytes(4, "big"))
    raw.close()
    with pytest.raises(RemoteProtocolError, match=f"frame of {length} bytes"):
        received(right)


def test_peer_that_closes_is_an_error_after_what_it_sent(pair: Pair) -> None:
    left, right = pair
    left.send_frame(b"bye")
    left.close()
    items = right.receive()
    assert next(items) == b"bye"
    with pytest.raises(ConnectionResetError):
        next(items)


def test_paused_link_reads_nothing_until_it_goes_on(pair: Pair) -> None:
    left, right = pair
    left.send_frame(b"one")
    left.send_frame(b"two")
    items = right.receive()
    assert next(items) == b"one"
    right.paused = True
    assert list(items) == []
    right.paused = False
    assert received(right) == [b"two"]


def test_link_that_is_closed_while_it_is_read_yields_no_more(pair: Pair) -> None:
    left, right = pair
    left.send_frame(b"one")
    left.send_frame(b"two")
    items = right.receive()
    next(items)
    right.close()
    assert list(items) == []


def test_payload_goes_where_it_is_expected(pair: Pair) -> None:
    left, right = pair
    left.feed = Feed(10)
    left.flush()
    first, second = bytearray(4), bytearray(6)
    items = right.receive()
    assert next(items) == b"next"
    right.expect_payload(Scatter.of(memoryview(first), memoryview(b""), memoryview(second)))
    assert list(items) == [Mark.PAYLOAD_END]
    assert first + second == noise(0, 10)


def test_feed_is_asked_when_the_link_has_nothing_else(pair: Pair) -> None:
    left, right = pair
    feed = left.feed = Feed(LONG, 100)
    left.flush()
    assert left.waits_to_write
    assert feed.sent == []
    assert transfer(left, right, LONG, 100) == ([noise(0, LONG), noise(1, 100)], [])
    assert feed.sent == [0, 1]
    assert not left.waits_to_write


def test_frame_that_is_queued_behind_a_payload_follows_it(pair: Pair) -> None:
    left, right = pair
    left.feed = Feed(LONG)
    left.flush()
    left.send_frame(b"after")
    assert transfer(left, right, LONG) == ([noise(0, LONG)], [b"after"])


def test_payload_is_given_back_when_the_link_is_closed_in_the_middle(pair: Pair) -> None:
    """Else a staging buffer would be lost with every peer that leaves."""
    left, _ = pair
    feed = left.feed = Feed(LONG, LONG)
    left.flush()
    left.close()
    assert feed.sent == [0]
    left.close()
    assert feed.sent == [0]


def test_descriptors_travel_with_the_first_frame(pair: Pair) -> None:
    left, right = pair
    reader, writer = os.pipe()
    left.send_frame_with_fds(b"here", [reader, writer])
    os.close(reader)
    assert received(right) == [b"here"]
    os.write(writer, b"x")
    assert os.read(right.received_fds[0], 1) == b"x"
    os.close(writer)
    right.close_received_fds()
    assert right.received_fds == []


def test_descriptors_behind_other_frames_are_our_bug(pair: Pair) -> None:
    left, _ = pair
    left.feed = Feed(LONG)
    left.flush()
    with pytest.raises(LocalProtocolError):
        left.send_frame_with_fds(b"here", [0])


def test_descriptors_that_nobody_took_are_closed_with_the_link(pair: Pair) -> None:
    left, right = pair
    num_fds = len(os.listdir("/proc/self/fd"))
    reader, writer = os.pipe()
    left.send_frame_with_fds(b"here", [reader, writer])
    received(right)
    os.close(reader)
    os.close(writer)
    right.close()
    assert len(os.listdir("/proc/self/fd")) == num_fds - 1
