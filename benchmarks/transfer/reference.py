"""What the machine can do at best: a memmove, and a bare pair of TCP sockets."""

from __future__ import annotations

import ctypes
import socket
import time

from benchmarks.transfer.arena import Arena
from benchmarks.transfer.mover import GO, Mover
from benchmarks.transfer.plan import Plan
from benchmarks.transfer.wire import Wire

_MAX_IOV = 512
_HOST = "127.0.0.1"


class Memmove(Mover):
    """Copies inside one process, from private memory to private memory."""

    def __init__(self, link: Wire, name: str) -> None:
        super().__init__(link, name)
        self._source: Arena | None = None
        self._pairs: list[tuple[int, int]] = []
        self._block_len = 0

    def run(self) -> float:  # noqa: D102
        copy, length = ctypes.memmove, self._block_len
        started = time.perf_counter()
        for dst, src in self._pairs:
            copy(dst, src, length)
        return time.perf_counter() - started

    def _take_memory(self, arena: Arena) -> None:
        self._source = Arena(arena.num_bytes)
        self._source.fill()

    def _set_up(self, plan: Plan, arena: Arena) -> None:
        assert self._source is not None
        self._block_len = plan.block_len
        from_addr, to_addr = self._source.addr, arena.addr
        self._pairs = [
            (to_addr + dst, from_addr + src) for src, dst in zip(*plan.offsets(), strict=True)
        ]


class SocketProducer(Mover):
    """Sends the blocks with ``sendmsg``, up to 512 of them per call."""

    def __init__(self, link: Wire, name: str) -> None:
        super().__init__(link, name)
        with socket.create_server((_HOST, 0)) as server:
            link.send(server.getsockname()[1])
            self._sock, _ = server.accept()
        self._views: list[memoryview] = []

    def run(self) -> float:  # noqa: D102
        self._link.receive()
        started = time.perf_counter()
        views = self._views
        for first in range(0, len(views), _MAX_IOV):
            batch = views[first : first + _MAX_IOV]
            left = sum(map(len, batch)) - self._sock.sendmsg(batch)
            while left:  # only after a signal: a blocking socket takes everything
                batch = _drop_sent(batch, left)
                left -= self._sock.sendmsg(batch)
        return time.perf_counter() - started

    def close(self) -> None:  # noqa: D102
        super().close()
        self._sock.close()

    def _take_memory(self, arena: Arena) -> None:
        arena.fill()

    def _set_up(self, plan: Plan, arena: Arena) -> None:
        src, _ = plan.offsets()
        self._views = _cut(arena, src, plan.block_len)


class SocketConsumer(Mover):
    """Receives one block after the other, each in place, with ``recv_into``."""

    def __init__(self, link: Wire, name: str) -> None:
        super().__init__(link, name)
        self._sock = socket.create_connection((_HOST, link.receive()))
        self._views: list[memoryview] = []

    def run(self) -> float:  # noqa: D102
        receive = self._sock.recv_into
        started = time.perf_counter()
        self._link.send(GO)
        for view in self._views:
            num_received = receive(view)
            while num_received < len(view):
                if not (more := receive(view[num_received:])):
                    raise ConnectionError("the sender is gone")
                num_received += more
        return time.perf_counter() - started

    def close(self) -> None:  # noqa: D102
        super().close()
        self._sock.close()

    def _set_up(self, plan: Plan, arena: Arena) -> None:
        _, dst = plan.offsets()
        self._views = _cut(arena, dst, plan.block_len)


def _cut(arena: Arena, offsets: list[int], block_len: int) -> list[memoryview]:
    whole = arena.view()
    return [whole[offset : offset + block_len] for offset in offsets]


def _drop_sent(batch: list[memoryview], left: int) -> list[memoryview]:
    """Return the last ``left`` bytes of a batch."""
    sent = sum(map(len, batch)) - left
    while sent >= len(batch[0]):
        sent -= len(batch[0])
        batch = batch[1:]
    return [batch[0][sent:], *batch[1:]]
