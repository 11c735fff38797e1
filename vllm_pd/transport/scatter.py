"""Memory in many places, sent and received by one system call each.

A chunk of small blocks has hundreds of places. Kept as the array of ``struct iovec`` that
the kernel takes, a place costs no Python object, and hardly more than its bytes do.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vllm_pd.transport.memory import view

IoVec: TypeAlias = npt.NDArray[np.int64]
"""Rows of address and number of bytes, as in ``struct iovec`` where both have 64 bits."""

_ROW = struct.Struct("@qq")  # numpy would take ten times as long for one row
_IOV_MAX = 1024  # the kernel takes no more at once

_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.readv, _libc.writev):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    _call.restype = ctypes.c_ssize_t


@dataclass(frozen=True, slots=True, eq=False)
class Scatter:
    """Places in memory, in order.

    Attributes:
        iov: the places; none is empty.
        owner: what keeps the memory alive; None if something else does.
    """

    iov: IoVec
    owner: object = None

    @staticmethod
    def of(*parts: memoryview | bytes) -> Scatter:
        """Return the memory of buffers, and keep them alive."""
        arrays = [np.frombuffer(part, np.uint8) for part in parts if memoryview(part).nbytes]
        rows = [(_address_of(array), array.nbytes) for array in arrays]
        return Scatter(np.array(rows, np.int64).reshape(-1, 2), arrays)

    @staticmethod
    def at(spans: Sequence[tuple[int, int]]) -> Scatter:
        """Return ``(addr, num_bytes)`` spans, none of them empty; the caller keeps them alive."""
        return Scatter(np.array(spans, np.int64))

    def views(self) -> list[memoryview]:
        """Return the places, for code that takes buffers."""
        return [view(addr, num_bytes) for addr, num_bytes in self.iov.tolist()]


class ScatterQueue:
    """Memory to send or to fill; what is done is cut off at the front."""

    def __init__(self) -> None:
        self._iov: IoVec = np.empty((0, 2), np.int64)
        self._base = 0  # address of ``_iov``
        self._ends: list[int] = []  # of the places, in bytes from the first
        self._owners: list[object] = []
        self._next = 0
        self._done = 0  # bytes

    def __bool__(self) -> bool:
        return self._next < len(self._ends)

    def append(self, scatter: Scatter) -> None:
        """Add memory at the end."""
        if self:
            self._owners.append(scatter.owner)
            self._iov = np.concatenate([self._iov[self._next :], scatter.iov])
        else:
            self._owners = [scatter.owner]
            self._iov = scatter.iov.copy()  # as ``consume`` changes it
        self._base = _address_of(self._iov)
        self._ends = np.cumsum(self._iov[:, 1]).tolist()
        self._next = self._done = 0

    def first(self, num_bytes: int) -> list[memoryview]:
        """Return about so many bytes, of which the first are in one place at least."""
        last = bisect.bisect_left(self._ends, self._done + num_bytes, self._next)
        return Scatter(self._iov[self._next : last + 1]).views()

    def send(self, fd: int) -> None:
        """Send what a socket takes at once.

        Raises:
            BlockingIOError: it takes nothing.
            OSError: it is broken.
        """
        self.consume(_checked(_libc.writev(fd, *self._rest())))

    def receive(self, fd: int) -> int:
        """Fill memory with what has arrived; return the bytes, 0 at the end of the stream.

        Raises:
            BlockingIOError: nothing has.
            OSError: the socket is broken.
        """
        num_bytes = _checked(_libc.readv(fd, *self._rest()))
        self.consume(num_bytes)
        return num_bytes

    def consume(self, num_bytes: int) -> None:
        """Cut bytes off at the front."""
        self._done += num_bytes
        self._next = bisect.bisect_right(self._ends, self._done, self._next)
        if not self:
            self.clear()
        elif rest := self._ends[self._next] - self._done:
            place = self._next * _ROW.size
            addr, length = _ROW.unpack_from(self._iov.data, place)
            _ROW.pack_into(self._iov.data, place, addr + length - rest, rest)

    def clear(self) -> None:
        """Forget everything."""
        self._iov = self._iov[:0]
        self._ends, self._owners = [], []
        self._next = self._done = 0

    def _rest(self) -> tuple[int, int]:
        """Return address and number of what is left, as readv and writev take it."""
        return self._base + self._next * _ROW.size, min(len(self._ends) - self._next, _IOV_MAX)


def _address_of(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # far cheaper than ``array.ctypes``
    return address


def _checked(num_bytes: int) -> int:
    """Return what a system call returned, unless that is an error.

    Raises:
        OSError: it is; of the subclass that belongs to it.
    """
    if num_bytes < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return num_bytes
