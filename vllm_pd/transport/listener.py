"""A listening socket that stays harmless when its process runs out of descriptors.

Who cannot be accepted stays in the kernel's queue and keeps the socket readable,
so a thread that polls it would never sleep again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time

from vllm_pd.transport.timer import Timer

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Listener:
    """Accepts connections; without descriptors it turns them away, or lets them wait.

    It keeps a descriptor in reserve. With it, a connection is accepted and closed at
    once, so that the peer knows. Where another thread has snatched the reserve, the
    socket is not polled until there is a descriptor again: that is looked up after
    ``_RETRY_S``, and whenever the owner calls ``resume``.

    Args:
        sock: bound and listening; owned from now on.
        epoll: where to register, for as long as this is not closed.
        name: for the log.

    Raises:
        OSError: there are no descriptors left.
    """

    def __init__(self, sock: socket.socket, epoll: select.epoll, name: str) -> None:
        sock.settimeout(0.0)
        self._sock = sock
        self._epoll = epoll
        self._name = name
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._retry = Timer()
        self._is_paused = False
        self._is_warned = False
        epoll.register(sock.fileno(), select.EPOLLIN)
        epoll.register(self._retry.fileno(), select.EPOLLIN)

    def owns(self, fd: int) -> bool:
        """Return whether ``epoll`` speaks of this listener."""
        return fd in (self._sock.fileno(), self._retry.fileno())

    def accept(self) -> socket.socket | None:
        """Return a new connection; None if there is none, or it cannot be taken.

        Call it when ``epoll`` reports a descriptor that this ``owns``.
        """
        if self._is_paused:
            self.resume()
        if self._is_paused:
            return None
        try:
            sock, _ = self._sock.accept()
        except OSError as exc:
            if exc.errno in _EXHAUSTED:
                self._turn_away(exc)
            return None  # else: the peer is gone already
        self._is_warned = False
        return sock

    def resume(self) -> None:
        """Take connections again if there is a descriptor; nothing unless paused."""
        if not self._is_paused:
            return
        if not self._take_spare():
            self._retry.set(time.monotonic() + _RETRY_S)
            return
        self._is_paused = False
        self._retry.set(None)
        self._epoll.modify(self._sock.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Close everything but ``epoll``; idempotent."""
        self._is_paused = False
        self._drop_spare()
        self._retry.close()
        self._sock.close()

    def _turn_away(self, error: OSError) -> None:
        if not self._is_warned:
            self._is_warned = True
            logger.warning("%s: turning peers away: %s", self._name, error.strerror)
        self._drop_spare()
        with contextlib.suppress(OSError):
            self._sock.accept()[0].close()
        if not self._take_spare():
            self._is_paused = True
            # Unlike ``unregister``, this needs no memory to be undone.
            self._epoll.modify(self._sock.fileno(), 0)
            self._retry.set(time.monotonic() + _RETRY_S)

    def _take_spare(self) -> bool:
        """Return whether there is a descriptor in reserve now."""
        if self._spare_fd < 0:
            with contextlib.suppress(OSError):
                self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return self._spare_fd >= 0

    def _drop_spare(self) -> None:
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
            self._spare_fd = -1
