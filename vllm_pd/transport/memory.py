"""Raw host memory: views, copies, and pages that another process can map.

Nothing here knows of transfers. Addresses are plain integers of this process.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_pd.errors import TransportUnavailableError

logger = logging.getLogger(__name__)

PAGE_LEN = mmap.PAGESIZE
_MAP_FIXED = 0x10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_IOV_MAX = 1024
_BATCH_LEN = 1 << 30  # the kernel stops after 2 GiB
_MAP_FAILED = ctypes.c_void_p(-1).value
_PROBE_LEN = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_libc.prctl.argtypes = [
    ctypes.c_int,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value


_Anything = ctypes.c_char * (1 << 46)  # as a type for each length would cost much more


def view(addr: int, num_bytes: int) -> memoryview:
    """Return a writable view of this process's memory; the caller keeps it alive."""
    return memoryview(_Anything.from_address(addr)).cast("B")[:num_bytes]


def address_of(data: bytearray) -> int:
    """Return where a buffer is; the caller keeps it alive and does not resize it."""
    return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data))


def copy_all(moves: Iterable[tuple[int, int, int]]) -> None:
    """Copy all ``(dst, src, num_bytes)``; the GIL is released during each (by ctypes)."""
    move = ctypes.memmove
    for dst, src, num_bytes in moves:
        move(dst, src, num_bytes)


def copy_rows(dst: int, src: int, num_bytes: int, num_rows: int, strides: tuple[int, int]) -> None:
    """Copy equally spaced rows of memory in one call; the GIL is released meanwhile.

    Args:
        dst: where the first row goes.
        src: where it comes from.
        num_bytes: of each row.
        num_rows: number of rows.
        strides: bytes from row to row, of ``dst`` and of ``src``.
    """
    # numpy takes and gives back the GIL once; a memmove for each row would wait for it
    # as often, which is long beside an engine thread that spins.
    np.copyto(
        _rows(dst, num_bytes, num_rows, strides[0]), _rows(src, num_bytes, num_rows, strides[1])
    )


def _rows(addr: int, num_bytes: int, num_rows: int, stride: int) -> npt.NDArray[np.uint8]:
    span = view(addr, (num_rows - 1) * stride + num_bytes)
    return np.ndarray((num_rows, num_bytes), np.uint8, span, 0, (stride, 1))


def allow_reading() -> None:
    """Let processes of this user read this process's memory.

    Where the Yama security module restricts that to ancestors, a process can lift
    it for itself; elsewhere the call fails and nothing is needed.
    """
    _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def read_process(pid: int, moves: Sequence[tuple[int, int, int]]) -> None:
    """Copy from another process's memory into ours; the GIL is released meanwhile.

    Args:
        pid: the process, as this process's pid namespace numbers it.
        moves: ``(dst, src, num_bytes)``, ``src`` being an address over there.

    Raises:
        OSError: the kernel refused, the process is gone, or an address is not mapped.
    """
    for batch in _batches(moves):
        count = len(batch)
        local = (_IoVec * count)(*[_IoVec(dst, length) for dst, _, length in batch])
        remote = (_IoVec * count)(*[_IoVec(src, length) for _, src, length in batch])
        wanted = sum(length for _, _, length in batch)
        num_read = _libc.process_vm_readv(pid, local, count, remote, count, 0)
        if num_read != wanted:
            code = ctypes.get_errno() if num_read < 0 else 0
            raise OSError(code, os.strerror(code) if code else f"{num_read} bytes of {wanted}")


def _batches(moves: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Split moves so that the kernel takes each batch in one call."""
    batch: list[tuple[int, int, int]] = []
    batch_len = 0
    for move in moves:
        if batch and (len(batch) == _IOV_MAX or batch_len + move[2] > _BATCH_LEN):
            yield batch
            batch, batch_len = [], 0
        batch.append(move)
        batch_len += move[2]
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class SharedSpan:
    """Pages of this process that a peer can map through ``fd``.

    ``fd`` holds exactly the bytes from ``addr`` to ``addr + num_bytes``.
    """

    addr: int
    num_bytes: int
    fd: int


@dataclass(frozen=True, slots=True)
class MappedSpan:
    """A peer's SharedSpan, mapped read-only here.

    Attributes:
        remote_addr: where the bytes are in the peer's process.
        num_bytes: length of the span.
        addr: where they are in this process.
    """

    remote_addr: int
    num_bytes: int
    addr: int


def join_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge ``(addr, num_bytes)`` spans that touch or overlap."""
    joined: list[tuple[int, int]] = []
    for addr, num_bytes in sorted(spans):
        if joined and addr <= joined[-1][0] + joined[-1][1]:
            first, length = joined[-1]
            joined[-1] = (first, max(length, addr + num_bytes - first))
        else:
            joined.append((addr, num_bytes))
    return joined


def page_interior(addr: int, num_bytes: int) -> tuple[int, int]:
    """Return the whole pages inside a span as ``(addr, num_bytes)``; may be empty.

    The partial pages at both ends may hold other objects of the allocator, so
    they are never remapped.
    """
    first = -(-addr // PAGE_LEN) * PAGE_LEN
    last = (addr + num_bytes) // PAGE_LEN * PAGE_LEN
    return first, max(last - first, 0)


def share_pages(addr: int, num_bytes: int) -> SharedSpan:
    """Replace private anonymous pages by pages of a memfd, in place.

    Content and address stay; whoever holds a pointer notices nothing. No other
    thread may write to the range meanwhile. The fd is closed on exec.

    Args:
        addr: page-aligned address.
        num_bytes: multiple of the page size.

    Raises:
        TransportUnavailableError: the kernel refused; the memory is as it was.
    """
    try:
        fd = os.memfd_create("vllm-pd-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as exc:
        raise TransportUnavailableError(f"memfd_create: {exc.strerror}") from exc
    try:
        os.ftruncate(fd, num_bytes)
        # A reader of a file that shrinks is killed by the kernel: rule it out.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        staging = _map(0, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)
        try:
            _copy_nonzero(staging, addr, num_bytes)
        finally:
            _libc.munmap(staging, num_bytes)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _map(addr, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd)
        # Where the kernel has huge pages for shared memory on request; else it does nothing.
        _libc.madvise(addr, num_bytes, _MADV_HUGEPAGE)
        # As vLLM had it: or every block's first use would wait for the kernel, page by page.
        _libc.madvise(addr, num_bytes, _MADV_POPULATE_WRITE)
    except OSError as exc:
        os.close(fd)
        raise TransportUnavailableError(f"cannot remap the KV cache: {exc.strerror}") from exc
    return SharedSpan(addr, num_bytes, fd)


def lock_pages(addr: int, num_bytes: int) -> None:
    """Keep pages from being reclaimed, so that the first copy after a pause is fast.

    Measured where the kernel reclaims idle memory (``DAMON``) and has no swap: after 100 s
    without use, a copy of 24 MB took 8.9 ms of CPU time, and 4.0 ms with locked pages (one run
    of each).

    Raises:
        OSError: the limit of locked memory (``RLIMIT_MEMLOCK``) is too low.
    """
    if _libc.mlock(addr, num_bytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def map_span(remote_addr: int, num_bytes: int, fd: int) -> MappedSpan:
    """Map a peer's SharedSpan read-only; the fd may be closed afterwards.

    Raises:
        OSError: the kernel refused, or the file is shorter than ``num_bytes`` or may
            become so.
    """
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:  # raises if no memfd
        raise OSError("the peer could shrink its memory file")
    if os.fstat(fd).st_size < num_bytes:
        raise OSError("the peer's memory file is shorter than announced")
    return MappedSpan(
        remote_addr, num_bytes, _map(0, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd)
    )


def unmap_span(span: MappedSpan) -> None:
    """Undo ``map_span``. Nobody may read the span any more."""
    _libc.munmap(span.addr, span.num_bytes)


def _map(addr: int, num_bytes: int, prot: int, flags: int, fd: int) -> int:
    mapped: int | None = _libc.mmap(addr, num_bytes, prot, flags, fd, 0)
    if mapped is None or mapped == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return mapped


def _copy_nonzero(dst: int, src: int, num_bytes: int) -> None:
    """Copy to fresh zero pages, leaving those untouched that would stay zero.

    A KV cache is mostly zero when it is registered; touching its pages would
    commit all of its memory at once.
    """
    zeros = ctypes.create_string_buffer(_PROBE_LEN)
    for offset in range(0, num_bytes, _PROBE_LEN):
        length = min(_PROBE_LEN, num_bytes - offset)
        if _libc.memcmp(src + offset, zeros, length):
            ctypes.memmove(dst + offset, src + offset, length)
