"""A place where the router listens.

aiohttp's own sites do not limit a TLS handshake, so that a client that never ends one would
be kept for the minute of the event loop's default, whatever the router is told.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

from aiohttp import web
from yarl import URL


class Site(web.BaseSite):
    """Serves at an address, or at a socket that is bound.

    Args:
        runner: of the app.
        where: host and port, or the socket.
        backlog: connections that may wait to be accepted.
        tls: None: plain HTTP.
        handshake_timeout_s: longest time that a TLS handshake may take.
    """

    def __init__(
        self,
        runner: web.AppRunner,
        where: tuple[str, int] | socket.socket,
        *,
        backlog: int,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
    ) -> None:
        super().__init__(runner, ssl_context=tls, backlog=backlog)
        self._options: dict[str, Any] = {"backlog": backlog}
        if isinstance(where, socket.socket):
            host, port = where.getsockname()[:2]
            self._options |= {"sock": where}
        else:
            host, port = where
            self._options |= {"host": host, "port": port}
        if tls is not None:
            self._options |= {"ssl": tls, "ssl_handshake_timeout": handshake_timeout_s}
        self._name = str(URL.build(scheme="https" if tls else "http", host=host, port=port))

    @property
    def name(self) -> str:
        """Its address, for people."""
        return self._name

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: nobody can listen there.
        """
        await super().start()
        assert self._runner.server is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._runner.server, **self._options)
