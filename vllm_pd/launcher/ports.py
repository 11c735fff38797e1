"""HTTP ports, checked before anything is started."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

from vllm_pd.errors import ConfigError

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def http_url(host: str, port: int, *, scheme: str = "http") -> str:
    """Return the address under which a server bound to ``host`` is reached from this machine."""
    host = _ANY.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_ports(wanted: Iterable[tuple[str, str, int]]) -> None:
    """Check that every ``(name, host, port)`` can be bound, each by one process.

    Raises:
        ConfigError: a port is out of range, wanted twice or in use; it is named.
    """
    owners: dict[int, str] = {}
    for name, host, port in wanted:
        if not 1 <= port <= 65535:
            raise ConfigError(f"port {port} ({name}) is not between 1 and 65535")
        if port in owners:
            raise ConfigError(f"port {port} is wanted by {owners[port]} and by {name}")
        owners[port] = name
        if reason := _why_not(host, port):
            raise ConfigError(f"port {port} ({name}) {reason}")


def _why_not(host: str, port: int) -> str | None:
    """Say why ``host:port`` cannot be bound; None: it can."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return "is in use"
        return f"cannot be bound on {host}: {exc.strerror}"
    return None
