"""Unix sockets between processes of one user on one host, without names in a file system."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from pathlib import Path

from vllm_pd.errors import TransportUnavailableError
from vllm_pd.transport import memory

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UCRED = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


def listen() -> tuple[socket.socket, str]:
    """Open a listening socket; return it and its name.

    Raises:
        TransportUnavailableError: the kernel refuses.
    """
    name = f"vllm-pd-{secrets.token_hex(16)}"
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0{name}")
        listener.listen(64)
    except OSError as exc:
        raise TransportUnavailableError(f"abstract Unix sockets: {exc}") from exc
    return listener, name


def scope() -> str:
    """Return where sockets can be reached from: this kernel, this user.

    Raises:
        TransportUnavailableError: there is no telling.
    """
    try:
        return f"{_BOOT_ID.read_text().strip()}:{os.getuid()}"
    except OSError as exc:
        raise TransportUnavailableError(f"the kernel's boot id: {exc}") from exc


def connect(name: str) -> socket.socket:
    """Return a non-blocking socket to a listener of this user.

    Raises:
        OSError: nobody listens, or it is another user.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(f"\0{name}")
        check_same_user(sock)
    except OSError:
        sock.close()
        raise
    return sock


def check_same_user(sock: socket.socket) -> None:
    """Refuse the other end of a Unix socket if another user runs it.

    Raises:
        PermissionError: it is another user's.
    """
    if (uid := _credentials(sock)[1]) != os.getuid():
        raise PermissionError(f"the other end belongs to user id {uid}")


def pid_of_peer(sock: socket.socket) -> int:
    """Return the process at the other end of a Unix socket, as the kernel knows it."""
    return _credentials(sock)[0]


def check_readable(pid: int, addr: int) -> None:
    """Try to read one byte of a process.

    Raises:
        OSError: the kernel refuses, or does not know the process.
    """
    byte = bytearray(1)
    memory.read_process(pid, [(memory.address_of(byte), addr, 1)])


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of whoever runs the other end."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(credentials)
    return pid, uid, gid
