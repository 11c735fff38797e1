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

_MIN_PRUNED = 256
"""Connections that are kept in any case; fewer are not worth a look."""


class Newcomers:
    """Tells connections that have sent a request from those that have not."""

    def __init__(self) -> None:
        self._known: set[web.RequestHandler] = set()
        self._prune_at = _MIN_PRUNED

    @property
    def num_known(self) -> int:
        """Connections that it holds on to, as they have sent a request."""
        return len(self._known)

    def note(self, request: web.Request) -> None:
        """Take note that a connection has sent a request."""
        self._known.add(request.protocol)
        if len(self._known) >= self._prune_at:
            self._prune()

    def _prune(self) -> None:
        """Let go of those that are closed.

        Clients that connect for every request would leave very many until the next look. Only at
        twice as many as were open, so that a request costs the same, however many there are.
        """
        self._known = {one for one in self._known if one.transport is not None}
        self._prune_at = max(_MIN_PRUNED, 2 * len(self._known))

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
