"""Many streams at a steady rate: how long the chunks take to come through.

    python -m benchmarks.router.paced PLAN

PLAN is a :class:`Plan` as JSON. Every chunk carries the time at which its backend sent
it, by the clock that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import uvloop

from benchmarks.router import traffic

_GRACE_S = 60.0
_MARK = b"data: "


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask.

    Attributes:
        ports: the router's, or those of prefill and decode backend.
        num_streams: how many at the same time.
        num_chunks: chunks of each.
        interval_s: between two chunks of a stream.
        ramp_s: time over which the streams begin, at random.
    """

    ports: Sequence[int]
    num_streams: int
    num_chunks: int
    interval_s: float
    ramp_s: float


@dataclass(slots=True)
class Result:
    """What came of it.

    Attributes:
        seconds: from the first request to the end of the last stream.
        delays_ms: of every chunk, from its backend to here.
        errors: streams that were refused, broke off or ended early.
    """

    seconds: float = 0.0
    delays_ms: list[float] = field(default_factory=list)
    errors: int = 0


class Stream(asyncio.Protocol):
    """One stream on a connection of its own; ``ended`` tells how many chunks came."""

    def __init__(self, request: bytes, delays_ms: list[float]) -> None:
        self._request = request
        self._delays_ms = delays_ms
        self._received = b""
        self._num_chunks = 0
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the delays of the chunks that are complete."""
        now = time.monotonic()
        if not self._num_chunks and data.startswith(b"HTTP/1.1 ") and data[9:12] != b"200":
            self._end()
        *events, self._received = (self._received + data).split(b"\n\n")
        for event in events:
            _, mark, sent = event.partition(_MARK)
            if sent == b"[DONE]":
                self._end()
            elif mark:
                self._num_chunks += 1
                self._delays_ms.append((now - float(sent)) * 1e3)

    def connection_lost(self, _exc: Exception | None) -> None:
        """End the stream."""
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(self._num_chunks)
            self._transport.close()


async def run(plan: Plan) -> Result:
    """Run all streams to their end."""
    result = Result()
    body = {"stream": True, traffic.PACED: [plan.num_chunks, plan.interval_s]}
    make = traffic.request_body if len(plan.ports) == 1 else traffic.decode_leg
    request = traffic.request(make(**body))
    started = time.monotonic()
    chance = random.Random(1)
    delays = [chance.uniform(0, plan.ramp_s) for _ in range(plan.num_streams)]
    streams = [_stream(plan, request, delay_s, result.delays_ms) for delay_s in delays]
    chunks = await asyncio.gather(*streams)
    result.errors = sum(found != plan.num_chunks for found in chunks)
    result.seconds = time.monotonic() - started
    return result


async def _stream(plan: Plan, request: bytes, delay_s: float, delays_ms: list[float]) -> int:
    await asyncio.sleep(delay_s)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(plan.num_chunks * plan.interval_s + _GRACE_S):
            _, stream = await loop.create_connection(
                lambda: Stream(request, delays_ms), "127.0.0.1", plan.ports[-1]
            )
            return await stream.ended
    except OSError:  # a timeout, too
        return 0


if __name__ == "__main__":
    found = uvloop.run(run(Plan(**json.loads(sys.argv[1]))))
    json.dump(asdict(found), sys.stdout)
