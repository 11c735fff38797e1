"""Clients of a soak: most of them ordinary, some that leave, are slow or send too much."""

from __future__ import annotations

import asyncio
import random
import socket
import time
import uuid
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import aiohttp

from benchmarks.endurance import traffic
from benchmarks.endurance.traffic import Shape

RIGHT, BROKEN_OFF, LEFT, GIVEN_UP = "right", "broken off", "left", "given up"
LOST = "lost"
"""Neither right, nor told of by the client's own wish, nor by an error event: a failure."""

MIX: Mapping[str, float] = {
    "whole": 34.0,
    "stream": 45.0,
    "leaves": 12.0,
    "slow": 5.0,
    "big": 3.0,
    "stuck": 1.0,
}
"""Kind of client → its share, in percent."""

CLIENT_TIMEOUT_S = 4.0
"""How long the router is to wait for a client that takes nothing."""

_THINK_S = 0.3  # at the mean
_BIG_LEN = (2**20, 16 * 2**20)
_STUCK = Shape(num_chunks=192, chunk_len=64 * 1024)  # more than all buffers on the way hold
_SLOW = Shape(num_chunks=48, chunk_len=4096)
_SLOW_PAUSE_S = 0.05
_RECEIVE_LEN = 8192  # of a client's socket: what it does not read is felt by the router
_PATIENCE_S = 60.0
_PATIENCE_TO_LEAVE_S = 0.1  # at the mean
_SHARE_OF_STREAMS = 0.7
_STUCK_EXTRA_S = 3.0
_NUM_BEGINNINGS = 100
_SEED_WORDS = "the cache of one instance is fetched by another "


@dataclass(slots=True)
class Tally:
    """What became of the requests.

    Attributes:
        outcomes: how many, by kind of client and outcome.
        losses: what was wrong with the first lost ones.
        latencies_ms: of whole answers that were right.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    def note(self, kind: str, outcome: str, why: str = "") -> None:
        """Count a request."""
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        if outcome == LOST and len(self.losses) < 20:
            self.losses.append(f"{kind}: {why}")

    @property
    def num_lost(self) -> int:
        """Requests that were lost."""
        return sum(counter[LOST] for counter in self.outcomes.values())


class LostError(Exception):
    """A request was lost; the text says how."""


def judge_stream(
    answer: bytes, request_id: str, shape: Shape, *, sender: str | None, killed: Container[str]
) -> str:
    """Return what a stream is that has ended: right, or broken off with a good excuse.

    The only one is that the process which had sent the beginning was killed. What has not
    begun could be sent to another instance.

    Args:
        answer: all of it.
        request_id: of the request.
        shape: that it asked for.
        sender: name of the process that has sent it, by its header.
        killed: names of those that have been killed until now.

    Raises:
        LostError: it is wrong.
    """
    try:
        num_events = traffic.check_stream(answer, request_id, shape)
    except ValueError as exc:
        raise LostError(str(exc)) from exc
    if num_events is None:
        return RIGHT
    if num_events == 0:
        raise LostError("the stream broke off before its first event: it could be retried")
    if sender not in killed:
        raise LostError(f"the stream broke off, and its instance {sender} was not killed")
    return BROKEN_OFF


class Client:
    """Sends one request after the other, of all kinds.

    Args:
        url: of the router.
        tally: counts what becomes of them.
        rng: decides on everything.
        killed: names of the instance processes that have been killed; it grows.
    """

    def __init__(
        self,
        url: str,
        tally: Tally,
        rng: random.Random,
        killed: Container[str],
    ) -> None:
        self._url = url + traffic.PATH
        self._tally = tally
        self._rng = rng
        self._killed = killed
        self._kinds = {
            "whole": self._whole,
            "stream": self._stream,
            "leaves": self._leaves,
            "slow": self._slow,
            "big": self._big,
            "stuck": self._stuck,
        }

    async def run(self, until: float) -> None:
        """Ask until a time by the monotonic clock; the last answer is waited for."""
        connector = aiohttp.TCPConnector(limit=0, socket_factory=_small_socket)
        timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=_RECEIVE_LEN
        ) as session:
            while time.monotonic() < until:
                (kind,) = self._rng.choices(list(MIX), list(MIX.values()))
                try:
                    self._tally.note(kind, await self._kinds[kind](session))
                except LostError as exc:
                    self._tally.note(kind, LOST, str(exc))
                except (aiohttp.ClientError, OSError) as exc:  # a timeout, too
                    self._tally.note(kind, LOST, f"{type(exc).__name__}: {exc}")
                await asyncio.sleep(self._rng.expovariate(1 / _THINK_S))

    async def _whole(self, session: aiohttp.ClientSession) -> str:
        began = time.monotonic()
        outcome = await self._ask_whole(session, self._prompt(), self._shape())
        self._tally.latencies_ms.append((time.monotonic() - began) * 1e3)
        return outcome

    async def _big(self, session: aiohttp.ClientSession) -> str:
        prompt = self._prompt(self._rng.randint(*_BIG_LEN))
        return await self._ask_whole(session, prompt, self._shape())

    async def _ask_whole(self, session: aiohttp.ClientSession, prompt: str, shape: Shape) -> str:
        request_id = uuid.uuid4().hex
        async with self._post(session, request_id, prompt, shape, stream=False) as response:
            answer = await response.read()
            _check_status(response, answer)
        if not traffic.is_right(answer, request_id, shape):
            raise LostError(f"wrong answer {answer[:80]!r}")
        return RIGHT

    async def _stream(self, session: aiohttp.ClientSession) -> str:
        return await self._ask_stream(session, self._shape(), pause_s=0.0)

    async def _slow(self, session: aiohttp.ClientSession) -> str:
        return await self._ask_stream(session, _SLOW, pause_s=_SLOW_PAUSE_S)

    async def _ask_stream(
        self, session: aiohttp.ClientSession, shape: Shape, *, pause_s: float
    ) -> str:
        request_id = uuid.uuid4().hex
        prompt, answer = self._prompt(), bytearray()
        async with self._post(session, request_id, prompt, shape, stream=True) as response:
            async for data in response.content.iter_any():
                answer += data
                if pause_s:
                    await asyncio.sleep(pause_s)
            _check_status(response, answer)
        return self._judge(response, answer, request_id, shape)

    def _judge(
        self, response: aiohttp.ClientResponse, answer: bytearray, request_id: str, shape: Shape
    ) -> str:
        sender = response.headers.get(traffic.SENDER)
        return judge_stream(bytes(answer), request_id, shape, sender=sender, killed=self._killed)

    async def _leaves(self, session: aiohttp.ClientSession) -> str:
        """Leave at any time: during the prefill, before the first bytes or after them."""
        try:
            async with asyncio.timeout(self._rng.expovariate(1 / _PATIENCE_TO_LEAVE_S)):
                if self._rng.random() < _SHARE_OF_STREAMS:
                    return await self._stream(session)
                return await self._ask_whole(session, self._prompt(), self._shape())
        except TimeoutError:
            return LEFT

    async def _stuck(self, session: aiohttp.ClientSession) -> str:
        """Take the beginning of a long answer and then nothing, until the router has had enough."""
        request_id = uuid.uuid4().hex
        async with self._post(session, request_id, self._prompt(), _STUCK, stream=True) as response:
            answer = bytearray(await response.content.readany())
            _check_status(response, answer)
            await asyncio.sleep(CLIENT_TIMEOUT_S + _STUCK_EXTRA_S)
            try:
                async for data in response.content.iter_any():
                    answer += data
            except (aiohttp.ClientError, OSError):
                return GIVEN_UP
        outcome = self._judge(response, answer, request_id, _STUCK)
        if outcome == RIGHT:
            raise LostError("the router has waited for a client that took nothing")
        return outcome  # its instance was killed before the router had enough

    def _post(  # all that a request is made of
        self,
        session: aiohttp.ClientSession,
        request_id: str,
        prompt: str,
        shape: Shape,
        *,
        stream: bool,
    ) -> aiohttp.client._RequestContextManager:
        headers = {"X-Request-Id": request_id, "Content-Type": "application/json"}
        body = traffic.request_body(prompt, shape, stream=stream)
        return session.post(self._url, data=body, headers=headers)

    def _prompt(self, length: int | None = None) -> str:
        length = length or self._rng.randint(20, 8000)
        # Of so many beginnings, so that what the router remembers of them stops to grow.
        start = f"{self._rng.randrange(_NUM_BEGINNINGS)} "
        return start + (_SEED_WORDS * (length // len(_SEED_WORDS) + 1))[:length]

    def _shape(self) -> Shape:
        return Shape(self._rng.randint(1, 40), self._rng.choice((0.0, 0.01, 0.05)))


def _check_status(response: aiohttp.ClientResponse, answer: bytes | bytearray) -> None:
    if response.status != 200:
        raise LostError(f"status {response.status}: {bytes(answer[:120])!r}")


def _small_socket(address: tuple[object, ...]) -> socket.socket:
    family, kind, proto = address[:3]
    sock = socket.socket(family, kind, proto)  # type: ignore[arg-type]  # as getaddrinfo says
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_LEN)
    return sock
