"""The port that the workers share: one socket for each, made by the parent.

The kernel spreads connections over sockets with SO_REUSEPORT by a hash of their
addresses. Of one socket that all workers inherit, the worker that wakes first accepts
all that is there: with four workers and 64 connections at once, the busiest got 24 to
39 of them in six trials, against 17 to 24 with a socket for each.

A socket listens from the moment on in which its worker is ready. The parent keeps it open,
so that connections in the queue of a worker that died wait for the next one.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from vllm_pd.errors import ConfigError

_Address = tuple[socket.AddressFamily, Any]


class SharedPort:
    """Holds a host's port against other programs, and makes sockets that may listen there.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(self, host: str, port: int) -> None:
        self._reserved: list[tuple[_Address, socket.socket]] = []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, *_, address in dict.fromkeys(found):
                self._reserved.append(((family, address), _bound(family, address)))
        except OSError as exc:
            self.close()
            raise listen_error(host, port, exc) from exc
        for _, reserved in self._reserved:
            # Only now: no other program must be able to share it, as two routers could.
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def bind(self) -> list[socket.socket]:
        """Return new sockets that do not listen yet, one for each address of the host."""
        return [_bound(*where, shared=True) for where, _ in self._reserved]

    def close(self) -> None:
        """Leave the port to others."""
        for _, reserved in self._reserved:
            reserved.close()


def listen_error(host: str, port: int, exc: OSError) -> ConfigError:
    """Return what to say if nobody can listen at an address."""
    if exc.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} on {host} is already in use",
            hint="stop what uses it, or choose another port",
        )
    return ConfigError(f"cannot listen on {host}, port {port}: {exc.strerror}")


def _bound(family: socket.AddressFamily, address: Any, *, shared: bool = False) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family is socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made
