"""HTTP to the instances: one connection pool, and what its failures mean."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Self

import aiohttp

from vllm_pd.config import RouterConfig
from vllm_pd.router.replies import SSE_CONTENT_TYPE

UPSTREAM_ERRORS = (aiohttp.ClientError, OSError)
"""What a leg raises when the instance is gone, breaks off or is too slow."""

# vLLM closes connections that were idle for 5 s; ours must be the first to let go.
_KEEPALIVE_S = 4.0
_PROBE_TIMEOUT_S = 10.0


def is_idle_timeout(exc: BaseException) -> bool:
    """Return whether an instance was connected but did not answer in time."""
    return isinstance(exc, TimeoutError) and not isinstance(exc, aiohttp.ConnectionTimeoutError)


@dataclass(slots=True)
class _ConnectionTrace:
    """Filled in by aiohttp's tracing while a request is sent."""

    reused: bool = False


class Answer:
    """An instance's answer, up to its first bytes.

    Attributes:
        status: HTTP status.
        headers: HTTP headers, as they came.
        first: the first bytes of a stream, or the whole body of any other answer.
        streamed: whether more bytes may follow.
    """

    def __init__(self, response: aiohttp.ClientResponse, first: bytes) -> None:
        self._response = response
        self.first = first
        self.status = response.status
        self.headers = response.headers
        self.streamed = _is_stream(response)

    @classmethod
    async def begin(cls, response: aiohttp.ClientResponse) -> Self:
        """Wait for the first bytes of a stream, or for the whole of any other body.

        Nothing has reached the client yet, so whoever fails here can be replaced.

        Raises:
            aiohttp.ClientError: the instance broke off.
            TimeoutError: it was silent for too long.
        """
        streamed = _is_stream(response)
        try:
            first = await (response.content.readany() if streamed else response.read())
        except BaseException:
            response.close()
            raise
        if streamed and not first:
            response.close()
            raise aiohttp.ClientPayloadError("the stream ended before its first byte")
        return cls(response, first)

    async def more(self) -> bytes:
        """Return the next bytes of a stream as they come; ``b""`` at its end.

        Raises:
            aiohttp.ClientError: the instance broke off.
            TimeoutError: it was silent for too long.
        """
        return await self._response.content.readany()

    def close(self) -> None:
        """Give the connection up; if the answer is not complete, vLLM aborts the request."""
        self._response.close()


class Upstream:
    """Sends requests to instances; an async context that owns the connection pool."""

    def __init__(self, config: RouterConfig) -> None:
        connect = config.connect_timeout_s
        self._prefill_timeout = aiohttp.ClientTimeout(
            total=config.prefill_timeout_s, connect=connect
        )
        self._decode_timeout = aiohttp.ClientTimeout(
            connect=connect, sock_read=config.decode_idle_timeout_s
        )
        self._probe_timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S, connect=connect)
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),  # one client's cookies are not another's
            auto_decompress=False,
            skip_auto_headers=("Accept", "User-Agent", "Content-Type"),
            trace_configs=[tracing],
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def is_healthy(self, base_url: str) -> bool:
        """Ask an instance for its health."""
        try:
            async with self._session.get(
                f"{base_url}/health", timeout=self._probe_timeout, allow_redirects=False
            ) as response:
                return response.status == 200
        except UPSTREAM_ERRORS:
            return False

    async def prefill(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send the prefill leg and return its whole answer.

        Raises:
            aiohttp.ClientError: the instance is gone or broke off.
            TimeoutError: it did not answer within ``prefill_timeout_s``.
        """
        response = await self._send("POST", url, headers, body, self._prefill_timeout)
        return await Answer.begin(response)

    async def decode(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        """Send a request to a decode instance and return the beginning of its answer.

        Raises:
            aiohttp.ClientError: the instance is gone or broke off.
            TimeoutError: it was silent for ``decode_idle_timeout_s``.
        """
        response = await self._send(method, url, headers, body, self._decode_timeout)
        return await Answer.begin(response)

    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  # aiohttp's own, not a deadline here
    ) -> aiohttp.ClientResponse:
        trace = _ConnectionTrace()
        while True:
            try:
                return await self._session.request(
                    method,
                    url,
                    headers=headers,
                    # A file, since aiohttp warns of raw bytes beyond 1 MiB.
                    data=None if body is None else io.BytesIO(body),
                    timeout=timeout,
                    allow_redirects=False,
                    trace_request_ctx=trace,
                )
            except aiohttp.ClientConnectionError as exc:
                # The instance may have closed an idle connection just when it was
                # taken from the pool. That says nothing about the instance: once more.
                if not trace.reused or isinstance(exc, TimeoutError):
                    raise
                trace.reused = False


async def _note_reuse(
    _session: aiohttp.ClientSession,
    context: SimpleNamespace,
    _params: aiohttp.TraceConnectionReuseconnParams,
) -> None:
    if context.trace_request_ctx is not None:  # probes have none
        context.trace_request_ctx.reused = True


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    return response.content_type == SSE_CONTENT_TYPE
