"""HTTP to the instances: pooled connections, timeouts, and what their failures mean."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from yarl import URL

from vllm_pd.config import RouterConfig
from vllm_pd.router.connection import BrokenAnswerError, Connection, Limit, request_head
from vllm_pd.router.replies import SSE_CONTENT_TYPE

UPSTREAM_ERRORS = (OSError,)
"""What a leg raises when the instance is gone, breaks off or is too slow."""

# vLLM closes connections that were idle for 5 s; ours must be the first to let go.
_KEEPALIVE_S = 4.0


class ConnectTimeoutError(TimeoutError):
    """An instance could not be connected to in time."""


def is_idle_timeout(exc: BaseException) -> bool:
    """Return whether an instance was connected but did not answer in time."""
    return isinstance(exc, TimeoutError) and not isinstance(exc, ConnectTimeoutError)


def has_reached(exc: BaseException) -> bool:
    """Return whether a request may have been at the instance when it failed."""
    return isinstance(exc, BrokenAnswerError) or is_idle_timeout(exc)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections lead; those to the same origin are interchangeable.

    Attributes:
        host: name or address.
        port: TCP port.
        tls: whether the connection is encrypted.
    """

    host: str
    port: int
    tls: bool


class Answer:
    """An instance's answer, up to its first bytes.

    Attributes:
        status: HTTP status.
        headers: HTTP headers, as they came.
        first: the first bytes of a stream, or the whole body of any other answer.
        streamed: whether more bytes may follow.
    """

    def __init__(self, pool: ConnectionPool, origin: Origin, connection: Connection) -> None:
        self._pool = pool
        self._origin = origin
        self._connection: Connection | None = connection
        self.status = connection.status
        self.headers = connection.headers
        self.first = b""
        self.streamed = _is_stream(connection.headers)

    async def begin(self) -> Self:
        """Wait for the first bytes of a stream, or for the whole of any other body.

        Nothing has reached the client yet, so whoever fails here can be replaced.

        Raises:
            BrokenAnswerError: the instance broke off.
            TimeoutError: it was silent for too long.
        """
        assert self._connection is not None
        read = self._connection.read if self.streamed else self._connection.read_all
        try:
            self.first = await read()
        except BaseException:
            self.close()
            raise
        if self.streamed and not self.first:
            self.close()
            raise BrokenAnswerError("the stream ended before its first byte")
        return self

    async def pass_over(self, is_prelude: Callable[[bytes], bool]) -> None:
        """Add to the first bytes of a stream, until they are more than a prelude.

        Args:
            is_prelude: whether whoever fails after these bytes could still be replaced.

        Raises:
            BrokenAnswerError: the instance broke off.
            TimeoutError: it was silent for too long.
        """
        while self.streamed and is_prelude(self.first):
            try:
                more = await self.more()
            except BaseException:
                self.close()
                raise
            if not more:
                self.close()
                raise BrokenAnswerError("the stream ended before its output")
            self.first += more

    async def more(self) -> bytes:
        """Return the next bytes of a stream as they come; ``b""`` at its end.

        Raises:
            BrokenAnswerError: the instance broke off.
            TimeoutError: it was silent for too long.
        """
        return b"" if self._connection is None else await self._connection.read()

    def close(self) -> None:
        """Give the connection up; if the answer is not complete, vLLM aborts the request."""
        if self._connection is not None:
            self._pool.give_back(self._origin, self._connection)
            self._connection = None


class ConnectionPool:
    """Idle connections by origin; a request takes the one that was used last."""

    def __init__(self, connect_timeout_s: float, tls: ssl.SSLContext) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._idle: dict[Origin, list[Connection]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    def take(self, origin: Origin) -> Connection | None:
        """Return an idle connection, if there is one."""
        idle = self._idle.get(origin, [])
        oldest = asyncio.get_running_loop().time() - _KEEPALIVE_S
        while idle:
            connection = idle.pop()
            if not connection.is_closed and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    async def connect(self, origin: Origin) -> Connection:
        """Open a connection.

        Raises:
            OSError: nobody listens there, the name is unknown, or TLS fails.
            ConnectTimeoutError: it takes too long.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    Connection,
                    origin.host,
                    origin.port,
                    ssl=self._tls if origin.tls else None,
                )
        except TimeoutError as exc:
            raise ConnectTimeoutError(f"cannot connect to {origin.host}: {exc}") from exc
        return connection

    def give_back(self, origin: Origin, connection: Connection) -> None:
        """End an exchange and keep its connection for the next, if it can be."""
        connection.finish()
        if connection.is_closed:
            return
        if self._is_closed:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault(origin, []).append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(_KEEPALIVE_S, self._sweep)

    def close(self) -> None:
        """Close the idle connections; those in use follow when they are given back."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    def _sweep(self) -> None:
        """Close what was idle for too long."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - _KEEPALIVE_S
        kept: dict[Origin, list[Connection]] = {}
        for origin, idle in self._idle.items():
            for connection in idle:
                if connection.idle_since <= oldest:
                    connection.close()
                elif not connection.is_closed:
                    kept.setdefault(origin, []).append(connection)
        self._idle = kept
        self._sweeper = loop.call_later(_KEEPALIVE_S / 4, self._sweep) if kept else None


class Upstream:
    """Sends requests to instances; an async context that owns the connection pool.

    Args:
        config: of the router.
        tls: for ``https://`` instances.
    """

    def __init__(self, config: RouterConfig, tls: ssl.SSLContext) -> None:
        self._pool = ConnectionPool(config.connect_timeout_s, tls)
        self._prefill_limit = Limit(config.prefill_timeout_s, is_total=True)
        self._decode_limit = Limit(config.decode_idle_timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._pool.close()

    async def prefill(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send the prefill leg and return its whole answer.

        Raises:
            OSError: the instance is gone or broke off.
            TimeoutError: it did not answer within ``prefill_timeout_s``.
        """
        return await self._exchange("POST", url, headers, body, self._prefill_limit)

    async def decode(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        """Send a request to a decode instance and return the beginning of its answer.

        Raises:
            OSError: the instance is gone or broke off.
            TimeoutError: it was silent for ``decode_idle_timeout_s``.
        """
        return await self._exchange(method, url, headers, body, self._decode_limit)

    async def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        limit: Limit,
    ) -> Answer:
        origin, target, host = _locate(url)
        head = request_head(method, target, host, headers, None if body is None else len(body))
        if (connection := self._pool.take(origin)) is not None:
            try:
                return await self._ask(origin, connection, head, body, limit)
            except BrokenAnswerError:
                # The instance may have closed an idle connection just when it was
                # taken from the pool. That says nothing about the instance: once more.
                if connection.touched:
                    raise
            connection = await self._connect_again(origin)
        else:
            connection = await self._pool.connect(origin)
        return await self._ask(origin, connection, head, body, limit)

    async def _connect_again(self, origin: Origin) -> Connection:
        """Open a connection after another one broke with the request on it.

        Raises:
            BrokenAnswerError: nobody is there any more. It may have been the request that
                brought the instance down, so this is not the same as never having had it.
        """
        try:
            return await self._pool.connect(origin)
        except OSError as exc:
            raise BrokenAnswerError(f"connection closed before the answer, then: {exc}") from exc

    async def _ask(
        self,
        origin: Origin,
        connection: Connection,
        head: bytes,
        body: bytes | None,
        limit: Limit,
    ) -> Answer:
        try:
            connection.send(head, body, limit)
            await connection.head()
        except BaseException:
            self._pool.give_back(origin, connection)
            raise
        return await Answer(self._pool, origin, connection).begin()


@lru_cache(maxsize=1024)
def _locate(url: str) -> tuple[Origin, str, str]:
    """Return where an URL leads, the request target and the Host header."""
    parsed = URL(url)
    assert parsed.host is not None
    assert parsed.port is not None
    origin = Origin(parsed.host, parsed.port, parsed.scheme == "https")
    return origin, parsed.raw_path_qs, parsed.host_port_subcomponent or parsed.host


def _is_stream(headers: Mapping[str, str]) -> bool:
    content_type = headers.get("Content-Type", "").partition(";")[0]
    return content_type.strip().lower() == SSE_CONTENT_TYPE
