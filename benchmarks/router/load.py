"""A load generator: clients that ask again as soon as they are answered.

    python -m benchmarks.router.load PLAN

PLAN is a :class:`Plan` as JSON. Prints what happened as JSON. The client is a bare
asyncio protocol, because on two cores every microsecond of it is one that the router
does not get.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import uvloop

from benchmarks.router import traffic


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask.

    Attributes:
        ports: one request of a client goes to each of them in turn: the router's
            alone, or those of prefill and decode backend.
        num_clients: connections that ask at the same time.
        seconds: how long new requests are begun.
        stream: whether the answer is to be streamed.
    """

    ports: Sequence[int]
    num_clients: int
    seconds: float
    stream: bool


@dataclass(slots=True)
class Result:
    """What came of it.

    Attributes:
        seconds: from the first request to the last answer.
        latencies_ms: of every request that was answered as it should be.
        errors: how many were not.
    """

    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    errors: int = 0


class Client(asyncio.Protocol):
    """One connection; ``ask`` sends a request and returns whether the answer is right."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answered: asyncio.Future[bool] | None = None
        self._num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the connection."""
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes, num_events: int) -> asyncio.Future[bool]:
        """Send a request; at least ``num_events`` are due in a stream, 0 in no stream."""
        self._received.clear()
        self._num_events = num_events
        self._answered = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            self._answered.set_result(False)
        else:
            self._transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        """Look whether the answer is complete."""
        self._received += data
        if self._answered is not None and is_complete(self._received):
            right = is_right(self._received, self._num_events)
            self._answered.set_result(right)
            self._answered = None

    def connection_lost(self, _exc: Exception | None) -> None:
        """Count what was being answered as an error."""
        if self._answered is not None:
            self._answered.set_result(False)
            self._answered = None

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


def is_complete(received: bytearray) -> bool:
    """Return whether a whole answer is there."""
    if received.endswith(b"\r\n0\r\n\r\n"):
        return True
    head_len = received.find(b"\r\n\r\n") + 4
    if head_len < 4:
        return False
    head = bytes(received[:head_len]).lower()
    start = head.find(b"content-length:")
    return start >= 0 and len(received) >= head_len + int(head[start + 15 :].split(b"\r\n", 1)[0])


def is_right(answer: bytearray, num_events: int) -> bool:
    """Return whether an answer is a success with all its events."""
    if not answer.startswith(b"HTTP/1.1 200"):
        return False
    return answer.count(b"data: ") >= num_events


async def run(plan: Plan) -> Result:
    """Run the clients until the time is over."""
    result = Result()
    started = time.perf_counter()
    clients = [_ask_again(plan, result, started + plan.seconds) for _ in range(plan.num_clients)]
    await asyncio.gather(*clients)
    result.seconds = time.perf_counter() - started
    return result


async def _ask_again(plan: Plan, result: Result, deadline: float) -> None:
    requests = _requests(plan)
    clients = [await connect(port) for port in plan.ports]
    clock = time.perf_counter
    while (started := clock()) < deadline:
        right = True
        for index, (request, num_events) in enumerate(requests):
            right = right and await clients[index].ask(request, num_events)
        if right:
            result.latencies_ms.append((clock() - started) * 1e3)
            continue
        result.errors += 1
        for client in clients:
            client.close()
        clients = [await connect(port) for port in plan.ports]
    for client in clients:
        client.close()


async def connect(port: int) -> Client:
    """Open a connection to a local port."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(Client, "127.0.0.1", port)
    return client


def _requests(plan: Plan) -> list[tuple[bytes, int]]:
    # With the end of the stream one more, but xpyd-proxy leaves the first token out.
    num_events = traffic.NUM_CHUNKS if plan.stream else 0
    fields = {"stream": True} if plan.stream else {}
    if len(plan.ports) == 1:
        return [(traffic.request(traffic.request_body(**fields)), num_events)]
    return [
        (traffic.request(traffic.prefill_leg()), 0),
        (traffic.request(traffic.decode_leg(**fields)), num_events),
    ]


if __name__ == "__main__":
    found = uvloop.run(run(Plan(**json.loads(sys.argv[1]))))
    json.dump(asdict(found), sys.stdout)
