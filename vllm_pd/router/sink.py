"""The client's end of a stream, and the end of one's patience with the client."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Self

from vllm_pd.router.call import Call

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)


class Sink:
    """Takes a stream for one client, who must not hold an instance up for ever.

    To be used as a context. A client who takes nothing for too long loses the
    connection, which cancels the handler like any other disconnect.

    Args:
        call: the client's request.
        response: its answer, prepared.
        timeout_s: longest time that a part may take.
    """

    def __init__(self, call: Call, response: web.StreamResponse, *, timeout_s: float) -> None:
        self._call = call
        self._response = response
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._timer = self._loop.call_later(timeout_s, self._look)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._timer.cancel()

    async def write(self, data: bytes) -> None:
        """Send to the client.

        Raises:
            ConnectionResetError: the client has left.
        """
        self._writing_since = self._loop.time()
        await self._response.write(data)
        self._writing_since = None
        self._call.record.passed(data)

    async def end(self) -> None:
        """Send the end of the answer.

        Raises:
            ConnectionResetError: the client has left.
        """
        self._writing_since = self._loop.time()
        await self._response.write_eof()
        self._writing_since = None

    def _look(self) -> None:
        # One timer for a stream, not one for each of its parts: it looks when it would be due.
        now = self._loop.time()
        since = now if self._writing_since is None else self._writing_since
        left_s = since + self._timeout_s - now
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        logger.info("%s: its client takes nothing and is given up", self._call.request_id)
        if self._call.request.transport is not None:
            self._call.request.transport.abort()  # or what it does not take would be waited for
