"""JSON messages over a stream socket, one per line: parent to child and child to child.

JSON because one of the children runs in an environment without this project's
dependencies, and because nothing here is worth a pickle.
"""

from __future__ import annotations

import json
import socket
from typing import Any

_READ_LEN = 1 << 16


class WireClosedError(Exception):
    """The other end is gone."""


class Wire:
    """A socket that carries JSON values; blocking unless a timeout is given.

    Args:
        sock: connected; closed by ``close``.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = bytearray()

    def send(self, value: Any) -> None:
        """Send one JSON value.

        Raises:
            WireClosedError: the other end is gone.
        """
        try:
            self._sock.sendall(json.dumps(value).encode() + b"\n")
        except OSError as exc:
            raise WireClosedError(str(exc)) from exc

    def receive(self, timeout_s: float | None = None) -> Any:
        """Wait for one JSON value.

        Raises:
            WireClosedError: the other end is gone.
            TimeoutError: nothing came for ``timeout_s``.
        """
        self._sock.settimeout(timeout_s)
        while (end := self._received.find(b"\n")) < 0:
            try:
                data = self._sock.recv(_READ_LEN)
            except ConnectionError as exc:
                raise WireClosedError(str(exc)) from exc
            if not data:
                raise WireClosedError("closed")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return json.loads(line)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
