"""Connections that never send a request: closed after a while, so that they cannot pile up.

aiohttp gives up a connection that is idle after a request, and the router a body that
does not come. Between the two is a client that connects, or begins to send headers, and
then falls silent: nobody else would ever notice. Where there is TLS, this is about
connections whose handshake is over; ``site`` limits the handshake.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)


class Newcomers:
    """Tells connections that have sent a request from those that have not."""

    def __init__(self) -> None:
        self._known: set[web.RequestHandler] = set()

    def note(self, request: web.Request) -> None:
        """Take note that a connection has sent a request."""
        self._known.add(request.protocol)

    async def watch(self, server: web.Server, *, timeout_s: float) -> None:
        """End connections without a request, until cancelled.

        Args:
            server: whose connections.
            timeout_s: shortest time that one is given; the longest is twice as much.
        """
        before: set[web.RequestHandler] = set()
        while True:
            await asyncio.sleep(timeout_s)
            connections = set(server.connections)
            self._known &= connections
            silent = connections - self._known
            for connection in silent & before:
                logger.info("a client sent no request within %g s", timeout_s)
                connection.force_close()
            before = silent
