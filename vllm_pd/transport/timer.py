"""A descriptor that becomes readable at a given time."""

from __future__ import annotations

import ctypes
import os
import time

_TFD_TIMER_ABSTIME = 1

_libc = ctypes.CDLL(None, use_errno=True)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


_libc.timerfd_settime.argtypes = [
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(_TimerSpec),
    ctypes.c_void_p,
]


class Timer:
    """Readable from the time that was set until ``set`` is called again.

    Python has timers of this kind from 3.13 on; until then libc is asked.

    Raises:
        OSError: there are no descriptors left.
    """

    def __init__(self) -> None:
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def fileno(self) -> int:
        """Return the descriptor to poll; -1 once closed."""
        return self._fd

    def set(self, at: float | None) -> None:
        """Become readable at ``at`` on ``time.monotonic``'s clock; None for never.

        A time in the past means now. Nothing happens once closed.
        """
        if self._fd < 0:
            return
        spec = _TimerSpec()
        if at is not None:  # all zero would mean never
            nanoseconds = max(1, int(at * 1e9))
            spec.value = _TimeSpec(nanoseconds // 10**9, nanoseconds % 10**9)
        # This also makes it unreadable again, if it was.
        _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None)

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
