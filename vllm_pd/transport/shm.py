"""KV blocks through shared memory, between workers on one host: one memcpy in all.

``register_regions`` replaces the pages under the KV cache by pages of memfds, in
place. A consumer connects over an abstract Unix socket, gets the descriptors,
maps the producer's pages read-only and copies runs of blocks into its own cache.
Nothing lies in a file system, so nothing is left behind after a kill.

Per transfer::

    producer                    consumer
    Ready      ->               block ids, and the bytes outside shared pages
                <-  Copied      the copy is complete
    Confirmed  ->               the blocks were leased all the while: it counts

The third message is what makes a one-sided read safe: the producer cannot stop
the consumer's copy, but a copy that it does not confirm is a failed transfer.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vllm_pd.errors import RemoteProtocolError, TransferError, TransportUnavailableError
from vllm_pd.transport import memory
from vllm_pd.transport.base import KVRegion, TransferOutcome, TransportOptions, merge_runs
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction, Endpoint, LinkPool
from vllm_pd.transport.threads import name_this_thread
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UCRED = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


class _RegionInfo(msgspec.Struct, frozen=True):
    addr: int
    num_blocks: int
    block_len: int


class _Memory(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="memory"):
    """Producer, once per link, with one descriptor per span."""

    spans: tuple[tuple[int, int], ...]  # (addr, num_bytes) in the producer's process
    regions: tuple[_RegionInfo, ...]


class _Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ready"):
    """Producer: these blocks may be read."""

    transfer_id: int
    block_ids: tuple[int, ...]
    inline: tuple[tuple[int, bytes], ...]  # (producer address, bytes outside the spans)


class _Copied(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="copied"):
    """Consumer: the copy is complete."""

    transfer_id: int


class _Confirmed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="confirmed"):
    """Producer: the blocks were held until Copied arrived."""

    transfer_id: int


_AnyFrame = _Memory | _Ready | _Copied | _Confirmed
_decoder: msgspec.msgpack.Decoder[_AnyFrame] = msgspec.msgpack.Decoder(_AnyFrame)


@dataclass(slots=True, eq=False)
class _Source:
    """A producer's memory, mapped here while its peer is known or a copy runs."""

    spans: list[memory.MappedSpan]
    regions: tuple[_RegionInfo, ...]
    num_copies: int = 0
    is_gone: bool = False

    def locate(self, addr: int, num_bytes: int) -> tuple[int, int, int] | None:
        """Return ``(local addr, offset, length)`` of the part that lies in a span."""
        for span in self.spans:
            first = max(addr, span.remote_addr)
            last = min(addr + num_bytes, span.remote_addr + span.num_bytes)
            if first < last:
                return span.addr + first - span.remote_addr, first - addr, last - first
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _CopyJob:
    posted: Posted
    source: _Source
    copies: list[tuple[int, int, int]]  # (dst, src, num_bytes)
    inline: list[tuple[int, bytes]]  # (dst, bytes)
    cancelled: threading.Event = field(default_factory=threading.Event)


class ShmTransport(HostTransport):
    """See the module and ``Transport``."""

    name = "shm"

    def __init__(self, options: TransportOptions) -> None:
        self._address = f"vllm-pd-{secrets.token_hex(16)}"
        try:
            self._scope = f"{_BOOT_ID.read_text().strip()}:{os.getuid()}"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0{self._address}")
            listener.listen(64)
        except OSError as exc:
            raise TransportUnavailableError(f"abstract Unix sockets: {exc}") from exc
        super().__init__(
            LinkPool(self.name, listener, _connect, check_peer=_check_same_user, takes_fds=True)
        )
        self._spans: list[memory.SharedSpan] = []
        self._outside: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._sources: dict[str, _Source] = {}
        self._ready: dict[tuple[str, int], _Ready] = {}
        self._jobs: list[_CopyJob] = []
        self._copied: queue.SimpleQueue[tuple[_CopyJob, str | None]] = queue.SimpleQueue()
        self._wake = Wakeup()
        self._links.watch(self._wake.fileno())
        self._copiers = ThreadPoolExecutor(
            options.num_copy_threads, initializer=name_this_thread, initargs=("copy",)
        )
        self._is_closed = False

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        super().register_regions(regions)
        spans = memory.join_spans((r.addr, r.num_blocks * r.block_len) for r in regions)
        for addr, num_bytes in (memory.page_interior(*span) for span in spans):
            if num_bytes:
                self._spans.append(memory.share_pages(addr, num_bytes))
        self._outside = _find_outside(self._regions, self._spans)

    def local_endpoint(self) -> bytes:  # noqa: D102
        return self._links.endpoint(self._address, self._scope)

    def can_reach(self, endpoint: bytes) -> bool:  # noqa: D102
        parsed = self._links.parse_endpoint(endpoint)
        if parsed.scope != self._scope:
            return False
        # Same kernel and user; another network namespace has other abstract sockets.
        try:
            _connect(parsed).close()
        except OSError:
            return False
        return True

    def poll(self) -> list[TransferOutcome]:  # noqa: D102
        outcomes = super().poll()
        self._collect_copies()
        return outcomes + self._ledger.drain()

    def close(self) -> None:  # noqa: D102
        if self._is_closed:
            return
        self._is_closed = True
        super().close()
        for job in self._jobs:
            job.cancelled.set()
        self._copiers.shutdown(wait=True)
        self._collect_copies()
        for peer_id in list(self._sources):
            self._forget_source(peer_id)
        for span in self._spans:
            os.close(span.fd)
        self._wake.close()

    def _handle_frame(self, peer_id: str, direction: Direction, frame: bytes) -> None:
        match _decoder.decode(frame), direction:
            case _Memory() as announced, Direction.RECEIVING:
                self._map_source(peer_id, announced)
            case _Ready() as ready, Direction.RECEIVING:
                self._ready[peer_id, ready.transfer_id] = ready
                if posted := self._ledger.find(peer_id, direction, ready.transfer_id):
                    self._start_receiving(posted)
            case _Confirmed() as confirmed, Direction.RECEIVING:
                self._end(peer_id, direction, confirmed.transfer_id)
            case _Copied() as copied, Direction.SENDING:
                posted = self._end(peer_id, direction, copied.transfer_id)
                self._send(posted, _Confirmed(transfer_id=posted.transfer_id))
            case other, _:
                raise RemoteProtocolError(f"{type(other).__name__} on a {direction} link")

    def _end(self, peer_id: str, direction: Direction, transfer_id: int) -> Posted:
        posted = self._ledger.find(peer_id, direction, transfer_id)
        is_early = direction is Direction.RECEIVING and posted and not posted.is_copied
        if posted is None or is_early:
            raise RemoteProtocolError(f"end of transfer {transfer_id}, which is not under way")
        self._ledger.end(posted)
        return posted

    # Producer's half

    def _handle_link_up(self, peer_id: str) -> None:
        frame = _Memory(
            spans=tuple((span.addr, span.num_bytes) for span in self._spans),
            regions=tuple(_RegionInfo(r.addr, r.num_blocks, r.block_len) for r in self._regions),
        )
        fds = [span.fd for span in self._spans]
        self._links.send(peer_id, Direction.SENDING, msgspec.msgpack.encode(frame), fds=fds)

    def _start_sending(self, posted: Posted) -> None:
        inline = []
        for index in range(len(self._regions)):
            for block_id in posted.block_ids:
                for addr, length in self._outside.get((index, block_id), ()):
                    inline.append((addr, bytes(memory.view(addr, length))))
        ready = _Ready(
            transfer_id=posted.transfer_id, block_ids=tuple(posted.block_ids), inline=tuple(inline)
        )
        self._send(posted, ready)

    # Consumer's half

    def _map_source(self, peer_id: str, frame: _Memory) -> None:
        link = self._links.link(peer_id, Direction.RECEIVING)
        if link is None or peer_id in self._sources:
            raise RemoteProtocolError("memory announced twice")
        if len(link.received_fds) != len(frame.spans):
            raise RemoteProtocolError(f"{len(link.received_fds)} descriptors for {frame.spans}")
        ours = [region.block_len for region in self._regions]
        if ours != [region.block_len for region in frame.regions]:
            raise RemoteProtocolError("the peer's regions differ from ours")
        source = _Source([], frame.regions)
        self._sources[peer_id] = source
        try:
            for (addr, num_bytes), fd in zip(frame.spans, link.received_fds, strict=True):
                source.spans.append(memory.map_span(addr, num_bytes, fd))
        finally:
            link.close_received_fds()

    def _start_receiving(self, posted: Posted) -> None:
        ready = self._ready.pop((posted.peer_id, posted.transfer_id), None)
        if ready is None:
            return
        source = self._sources.get(posted.peer_id)
        if source is None:
            raise RemoteProtocolError("blocks announced before the memory that holds them")
        if posted.is_busy or posted.is_copied:
            raise RemoteProtocolError(f"transfer {posted.transfer_id} announced twice")
        if len(ready.block_ids) != len(posted.block_ids):
            raise RemoteProtocolError(
                f"{len(ready.block_ids)} blocks announced, not {len(posted.block_ids)}"
            )
        job = self._plan_copy(posted, source, ready)
        posted.is_busy = True
        source.num_copies += 1
        self._jobs.append(job)
        self._copiers.submit(self._run_copy, job)

    def _plan_copy(self, posted: Posted, source: _Source, ready: _Ready) -> _CopyJob:
        """Turn blocks into address ranges, clipped to what is mapped."""
        runs = merge_runs(ready.block_ids, posted.block_ids)
        inline = dict(ready.inline)
        job = _CopyJob(posted, source, [], [])
        num_planned = 0
        for ours, theirs in zip(self._regions, source.regions, strict=True):
            if min(ready.block_ids) < 0 or max(ready.block_ids) >= theirs.num_blocks:
                raise RemoteProtocolError("block ids beyond the peer's regions")
            for src_block, dst_block, num_blocks in runs:
                src = theirs.addr + src_block * theirs.block_len
                dst = ours.addr + dst_block * ours.block_len
                num_bytes = num_blocks * ours.block_len
                offset = length = 0
                if part := source.locate(src, num_bytes):
                    local, offset, length = part
                    job.copies.append((dst + offset, local, length))
                    num_planned += length
                for start, end in ((0, offset), (offset + length, num_bytes)):
                    pieces = _take_inline(inline, src + start, end - start)
                    job.inline.extend((dst + addr - src, data) for addr, data in pieces)
                    num_planned += sum(len(data) for _, data in pieces)
        if num_planned != posted.num_bytes:
            raise RemoteProtocolError(f"{num_planned} bytes are readable, not {posted.num_bytes}")
        return job

    def _run_copy(self, job: _CopyJob) -> None:
        """Copy on a copier thread; only memory and the result queue are touched."""
        problem: str | None = None
        try:
            for dst, src, num_bytes in job.copies:
                if job.cancelled.is_set():
                    problem = "cancelled"
                    break
                memory.copy(dst, src, num_bytes)
            else:
                for dst, data in job.inline:
                    memory.view(dst, len(data))[:] = data
        except Exception as exc:  # noqa: BLE001 - the job must end, whatever happens
            problem = repr(exc)
        self._copied.put((job, problem))
        self._wake.set()

    def _collect_copies(self) -> None:
        self._wake.clear()
        while not self._copied.empty():
            job, problem = self._copied.get()
            self._jobs.remove(job)
            posted = job.posted
            posted.is_busy = False
            job.source.num_copies -= 1
            _unmap_if_unused(job.source)
            if posted.error is not None or problem is not None:
                self._ledger.end(posted, TransferError(f"shm copy: {problem}"))
            else:
                posted.is_copied = True
                self._send(posted, _Copied(transfer_id=posted.transfer_id))

    def _forget(self, peer_id: str) -> None:
        for job in self._jobs:
            if job.posted.peer_id == peer_id:
                job.cancelled.set()
        for key in [key for key in self._ready if key[0] == peer_id]:
            del self._ready[key]
        self._forget_source(peer_id)

    def _forget_source(self, peer_id: str) -> None:
        if source := self._sources.pop(peer_id, None):
            source.is_gone = True
            _unmap_if_unused(source)


def _unmap_if_unused(source: _Source) -> None:
    if source.is_gone and not source.num_copies:
        for span in source.spans:
            memory.unmap_span(span)
        source.spans.clear()


def _find_outside(
    regions: Sequence[KVRegion], spans: Sequence[memory.SharedSpan]
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return the parts of blocks that no span covers, by region index and block id.

    Spans cover whole pages, so this is at most a page at each end of a span, or
    everything where the regions are smaller than a page.
    """
    outside: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index, region in enumerate(regions):
        end = region.addr + region.num_blocks * region.block_len
        for first, last in _gaps(region.addr, end, spans):
            for block_id in range(
                (first - region.addr) // region.block_len,
                (last - 1 - region.addr) // region.block_len + 1,
            ):
                start = region.addr + block_id * region.block_len
                lo, hi = max(first, start), min(last, start + region.block_len)
                outside.setdefault((index, block_id), []).append((lo, hi - lo))
    return outside


def _gaps(first: int, last: int, spans: Sequence[memory.SharedSpan]) -> list[tuple[int, int]]:
    gaps = []
    for span in sorted(spans, key=lambda s: s.addr):
        if span.addr + span.num_bytes <= first or span.addr >= last:
            continue
        if span.addr > first:
            gaps.append((first, span.addr))
        first = max(first, span.addr + span.num_bytes)
    if first < last:
        gaps.append((first, last))
    return gaps


def _take_inline(inline: dict[int, bytes], addr: int, num_bytes: int) -> list[tuple[int, bytes]]:
    """Return the pieces that fill ``addr`` to ``addr + num_bytes``, as far as there are any."""
    pieces = []
    end = addr + num_bytes
    while addr < end and (data := inline.get(addr)) is not None and addr + len(data) <= end:
        pieces.append((addr, data))
        addr += len(data)
    return pieces


def _connect(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(f"\0{endpoint.address}")
        _check_same_user(sock)
    except OSError:
        sock.close()
        raise
    return sock


def _check_same_user(sock: socket.socket) -> None:
    """Refuse the other end of a Unix socket if another user runs it.

    Raises:
        PermissionError: it is another user's.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    if uid != os.getuid():
        raise PermissionError(f"the other end belongs to user id {uid}")
