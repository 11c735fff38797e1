"""Private anonymous memory that stands in for a KV cache, with content that can be checked."""

from __future__ import annotations

import array
import ctypes
import mmap
import struct

from benchmarks.transfer.plan import Plan

MISALIGNED = 64
"""Bytes from the start of a page, as PyTorch's allocations are."""

_PAGE_LEN = 4096
_PATTERN_LEN = 1 << 20
_STAMP = struct.Struct("<Q")
_DIRTY = 0xA5

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Arena:
    """Memory of one process for one side of a plan; every page is touched.

    Args:
        num_bytes: at least as many as the plans need.
    """

    def __init__(self, num_bytes: int) -> None:
        length = num_bytes + MISALIGNED
        self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pin = (ctypes.c_char * length).from_buffer(self._map)
        self.addr = ctypes.addressof(self._pin) + MISALIGNED
        self.num_bytes = num_bytes
        self.spoil()

    def view(self) -> memoryview:
        """Return all of it as writable bytes."""
        return memoryview(self._map)[MISALIGNED:]

    def fill(self) -> None:
        """Write content of which no two pages are equal, the same for every plan."""
        pattern = _make_pattern()
        total = self.num_bytes
        for start in range(0, total, _PATTERN_LEN):
            ctypes.memmove(self.addr + start, pattern, min(_PATTERN_LEN, total - start))
        with self.view() as view:
            for start in range(0, total, _PAGE_LEN):
                _STAMP.pack_into(view, start, start)

    def find_wrong_block(self, plan: Plan) -> int | None:
        """Compare every byte with what the plan moves from a filled arena.

        Returns:
            The first wrong block, counted in the order in which the plan moves them.
        """
        pattern = _make_pattern() * 2
        block_len = plan.block_len
        expected = bytearray(block_len)
        expected_addr = ctypes.addressof((ctypes.c_char * block_len).from_buffer(expected))
        for index, (src, dst) in enumerate(zip(*plan.offsets(), strict=True)):
            for done in range(0, block_len, _PATTERN_LEN):
                first = (src + done) % _PATTERN_LEN
                length = min(_PATTERN_LEN, block_len - done)
                expected[done : done + length] = pattern[first : first + length]
            for start in range(-src % _PAGE_LEN, block_len, _PAGE_LEN):
                _STAMP.pack_into(expected, start, src + start)
            if _libc.memcmp(self.addr + dst, expected_addr, block_len):
                return index
        return None

    def spoil(self) -> None:
        """Overwrite everything, so that what is there afterwards must have arrived."""
        ctypes.memset(self.addr, _DIRTY, self.num_bytes)


def _make_pattern() -> bytes:
    return array.array("Q", range(_PATTERN_LEN // 8)).tobytes()
