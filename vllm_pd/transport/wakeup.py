"""A descriptor by which one thread wakes another out of poll."""

from __future__ import annotations

import os
import threading


class Wakeup:
    """Readable from ``set`` to ``clear``. Any thread may call any method.

    The lock keeps ``set`` from writing to a descriptor that ``close`` has given
    back and somebody else has got.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_set = False

    def fileno(self) -> int:
        """Return the descriptor to poll; -1 once closed."""
        return self._fd

    def set(self) -> None:
        """Wake the thread that polls; nothing once closed."""
        with self._lock:
            if self._fd >= 0 and not self._is_set:
                os.eventfd_write(self._fd, 1)
                self._is_set = True

    def clear(self) -> None:
        """Take note of all that was set so far."""
        with self._lock:
            if self._fd >= 0 and self._is_set:
                os.eventfd_read(self._fd)
                self._is_set = False

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
