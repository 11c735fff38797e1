"""The router's own questions to the instances over HTTP: health and load.

They have connections of their own, so that they neither wait for requests nor are
told of an instance by a connection that it has long closed.
"""

from __future__ import annotations

import logging
import ssl
from typing import Self

import aiohttp

from vllm_pd.router.tls import trouble_of

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
MAX_METRICS_LEN = 16 * 1024 * 1024
"""Longest page of metrics that is read, in bytes."""

MAX_TOLD = 4096
"""Instances of which it is remembered what the log says of them."""

_READ_LEN = 64 * 1024


class Probes:
    """Asks instances; an async context that owns the connections.

    Args:
        connect_timeout_s: longest wait for a connection.
        tls: for ``https://`` instances.
    """

    def __init__(self, *, connect_timeout_s: float, tls: ssl.SSLContext) -> None:
        self._told: dict[str, str] = {}  # what the log says is wrong, by base URL
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True, ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S, connect=connect_timeout_s),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def is_healthy(self, base_url: str) -> bool:
        """Ask an instance for its health."""
        try:
            async with self._session.get(f"{base_url}/health", allow_redirects=False) as response:
                self._told.pop(base_url, None)
                return response.status == 200
        except (aiohttp.ClientError, OSError) as exc:
            self._tell(base_url, trouble_of(exc))
            return False

    async def metrics_text(self, base_url: str) -> str | None:
        """Return an instance's metrics as Prometheus would read them; None if there are none."""
        text = bytearray()
        try:
            async with self._session.get(f"{base_url}/metrics", allow_redirects=False) as response:
                if response.status != 200:
                    return None
                async for chunk in response.content.iter_chunked(_READ_LEN):
                    text += chunk
                    if len(text) > MAX_METRICS_LEN:
                        return None
        except (aiohttp.ClientError, OSError):
            return None
        return text.decode(errors="replace")

    def _tell(self, base_url: str, trouble: str | None) -> None:
        """Log what no retry will mend, once; that nobody answers yet is no news."""
        if trouble is not None and self._told.get(base_url) != trouble:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()  # some of them may be gone for good
            self._told[base_url] = trouble
            logger.error("instance %s cannot be used: %s", base_url, trouble)
