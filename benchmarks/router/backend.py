"""Null backends: a prefill and a decode instance that answer at once, in one process.

    python -m benchmarks.router.backend PREFILL_PORT DECODE_PORT

They speak just enough HTTP/1.1 for a router's legs and probes, and refuse a leg
without the params that it must have, so that a router that skips the hand-over is not
measured as a fast one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from typing import cast

import uvloop

from benchmarks.router import traffic

_HEALTHY = traffic.response(b"{}")
_MODELS = traffic.response(
    json.dumps({"object": "list", "data": [{"id": traffic.MODEL_NAME, "object": "model"}]}).encode()
)
_REFUSAL = traffic.response(b'{"error": {"message": "bad leg", "code": 400}}', "400 Bad Request")


class _Backend(asyncio.Protocol):
    """One connection; answers requests in turn. Subclasses answer legs."""

    def __init__(self) -> None:
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (head_len := self._received.find(b"\r\n\r\n") + 4) > 3:
            head = bytes(self._received[:head_len])
            end = head_len + _content_length(head)
            if len(self._received) < end:
                return
            body = bytes(self._received[head_len:end])
            del self._received[:end]
            if head.startswith(b"POST"):
                self.answer(body.replace(b": ", b":"))
            else:
                self.write(_MODELS if b"/v1/models" in head[:40] else _HEALTHY)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def answer(self, body: bytes) -> None:
        raise NotImplementedError


class Prefill(_Backend):
    """Answers prefill legs."""

    _answer = traffic.prefill_answer()

    def answer(self, body: bytes) -> None:
        """Answer a leg."""
        self.write(self._answer if b'"do_remote_decode":true' in body else _REFUSAL)


class Decode(_Backend):
    """Answers decode legs; a chunk of a stream is a write of its own."""

    _answer = traffic.decode_answer()
    _head = traffic.stream_head()
    _chunks = traffic.stream_chunks()

    def answer(self, body: bytes) -> None:
        """Answer a leg, or begin to."""
        if b'"do_remote_prefill":true' not in body:
            self.write(_REFUSAL)
        elif b'"stream":true' not in body:
            self.write(self._answer)
        elif b'"%b":' % traffic.PACED.encode() in body:
            self.write(self._head)
            num_chunks, interval_s = json.loads(body)[traffic.PACED]
            self._pace(num_chunks, interval_s)
        else:
            self.write(self._head)
            self._stream(0)

    def _stream(self, index: int) -> None:
        self.write(self._chunks[index])
        if index + 1 < len(self._chunks):
            # In the next turn of the loop: writes of one turn would be sent as one.
            asyncio.get_running_loop().call_soon(self._stream, index + 1)

    def _pace(self, num_left: int, interval_s: float) -> None:
        if self._transport.is_closing():
            return
        if num_left == 0:
            self.write(traffic.stream_end())
            return
        self.write(traffic.chunk(b"data: %.6f\n\n" % time.monotonic()))
        again = partial(self._pace, num_left - 1, interval_s)
        asyncio.get_running_loop().call_later(interval_s, again)


def _content_length(head: bytes) -> int:
    name = b"\r\ncontent-length:"
    start = head.lower().find(name)
    if start < 0:
        return 0
    return int(head[start + len(name) : head.index(b"\r\n", start + 2)])


async def _serve(prefill_port: int, decode_port: int) -> None:
    loop = asyncio.get_running_loop()
    # The backlog is for thousands of streams that begin at once.
    prefill = await loop.create_server(Prefill, "127.0.0.1", prefill_port, backlog=4096)
    decode = await loop.create_server(Decode, "127.0.0.1", decode_port, backlog=4096)
    async with prefill, decode:
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(*map(int, sys.argv[1:3])))
