"""Ports for test servers."""

from __future__ import annotations

import random
import socket


def free_ports(count: int) -> list[int]:
    """Return ports that are free and follow each other.

    They lie below the range from which the kernel serves outgoing connections: any
    of those could be taken again before the server that is to have it has started.
    """
    while True:
        first = random.randrange(20_000, 32_000)
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
