"""TCP sockets, as links use them: non-blocking, and without waiting for full packets."""

from __future__ import annotations

import ipaddress
import socket

from vllm_pd.errors import TransportUnavailableError


def listen(host: str) -> socket.socket:
    """Return a listening socket on a free port of an address.

    Raises:
        TransportUnavailableError: it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(64)
    except OSError as exc:
        listener.close()
        raise TransportUnavailableError(f"cannot listen on {host}: {exc}") from exc
    return listener


def check_address(host: str, port: int) -> socket.AddressFamily:
    """Check what a peer says where it listens; it is an IP address, so that no name is looked up.

    Raises:
        ValueError: it is something else.
    """
    version = ipaddress.ip_address(host).version
    if not 0 < port < 65536:
        raise ValueError(f"{port} is not a port")
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def send_at_once(sock: socket.socket) -> None:
    """Do not hold small frames back in the hope for more."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connect(host: str, port: int) -> socket.socket:
    """Begin to connect; the first write or a hang-up tells how it ended.

    Raises:
        OSError: it cannot even begin.
    """
    sock = socket.socket(check_address(host, port), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        send_at_once(sock)
        sock.connect((host, port))
    except BlockingIOError:
        pass  # in progress
    except OSError as exc:
        sock.close()
        raise OSError(exc.errno, f"connect to {host} port {port}: {exc.strerror}") from exc
    return sock
