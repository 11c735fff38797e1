"""An instance without a model: prefills and decodes as vLLM does, in a process of its own.

    python -m benchmarks.endurance.instance PORT NAME

NAME is of this process alone, and its streams tell it. Takes either role, refuses legs that
are damaged or carry the params of another request, and takes a moment for a prefill.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import cast

import httptools
import uvloop

from benchmarks.endurance import traffic
from benchmarks.router.traffic import chunk, response, stream_head

_PREFILL_S = (0.002, 0.03)
_HEALTHY = response(b"{}")
_END = chunk(traffic.DONE + b"\n\n") + b"0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One connection; answers requests in turn."""

    def __init__(self, name: str) -> None:
        self._stream_head = stream_head(f"{traffic.SENDER}: {name}\r\n".encode())
        self._parser = httptools.HttpRequestParser(self)
        self._next: asyncio.TimerHandle | None = None
        self._request_id = ""
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the connection."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        """Abort what is being answered."""
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse; the parser calls the methods that begin with ``on_``."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._request_id, self._parts = "", []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take the name of the request."""
        if name.lower() == b"x-request-id":
            self._request_id = value.decode()

    def on_body(self, part: bytes) -> None:
        """Take a part of the body."""
        self._parts.append(part)

    def on_message_complete(self) -> None:
        """Answer."""
        if self._parser.get_method() != b"POST":
            self._transport.write(_HEALTHY)
            return
        try:
            asked = traffic.read_leg(b"".join(self._parts))
        except (ValueError, KeyError, TypeError) as exc:
            self._refuse(f"no leg: {exc}")
            return
        if not asked.is_intact:
            self._refuse("the prompt is damaged")
        elif asked.is_prefill:
            self._later(random.uniform(*_PREFILL_S), self._prefilled)
        elif asked.prefilled_for not in (None, self._request_id):
            self._refuse("the params are of another request")
        elif asked.stream:
            self._transport.write(self._stream_head)
            self._stream(asked.shape, 0)
        else:
            shape = asked.shape
            answer = response(traffic.whole_answer(self._request_id, shape))
            self._later(shape.num_chunks * shape.interval_s, partial(self._transport.write, answer))

    def _prefilled(self) -> None:
        answer = traffic.prefill_answer(self._request_id, f"engine-{os.getpid()}")
        self._transport.write(response(answer))

    def _stream(self, shape: traffic.Shape, index: int) -> None:
        if index == shape.num_chunks:
            self._transport.write(_END)
            return
        self._transport.write(chunk(traffic.event(self._request_id, index, shape)))
        self._later(shape.interval_s, partial(self._stream, shape, index + 1))

    def _refuse(self, why: str) -> None:
        self._transport.write(response(why.encode(), "400 Bad Request"))

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        self._next = asyncio.get_running_loop().call_later(delay_s, what)


async def _serve(port: int, name: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(Connection, name), "127.0.0.1", port)
    async with server:
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2]))
