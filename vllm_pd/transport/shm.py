"""KV blocks through shared memory, between workers on one host: one memcpy in all.

``register_regions`` replaces the pages under the KV cache by pages of memfds, in
place. A consumer connects over an abstract Unix socket, gets the descriptors,
maps the producer's pages read-only and copies runs of blocks into its own cache.
Nothing lies in a file system, so nothing is left behind after a kill. Where the
kernel refuses to share the pages, the consumer has it copy from the producer's
process instead (process_vm_readv), at about half the speed.

Per transfer::

    producer                    consumer
    Ready      ->               block ids, digests, and the bytes outside shared pages
                <-  Copied      the copy is complete and matches the digests
    Confirmed  ->               the blocks were leased all the while: it counts

The third message is what makes a one-sided read safe: the producer cannot stop
the consumer's copy, but a copy that it does not confirm is a failed transfer.
Instead of Copied the consumer may answer Abandoned.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from vllm_pd.config import Digests
from vllm_pd.errors import (
    RemoteProtocolError,
    TransferError,
    TransportUnavailableError,
)
from vllm_pd.transport import memory
from vllm_pd.transport.base import (
    Heads,
    KVRegion,
    TransferOutcome,
    TransportOptions,
    merge_runs,
)
from vllm_pd.transport.chunks import Chunk, plan_chunks, spans_of_chunk
from vllm_pd.transport.copying import Check, CopyJob, Part
from vllm_pd.transport.digests import choose, digest
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction, Endpoint, LinkEvent, LinkPool
from vllm_pd.transport.sources import MappedSource, ProcessSource, Source
from vllm_pd.transport.threads import name_this_thread
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

CHUNK_LEN = 256 * 1024
"""Bytes per digest; small, so that what was just copied is hashed from the cache."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UCRED = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


class _RegionInfo(msgspec.Struct, frozen=True):
    addr: int
    num_blocks: int
    block_len: int
    num_rows: int
    num_heads: int


class _Memory(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="memory"):
    """Producer, once per link, with one descriptor per span; without any, read the process."""

    spans: tuple[tuple[int, int], ...]  # (addr, num_bytes) in the producer's process
    regions: tuple[_RegionInfo, ...]


class _Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ready"):
    """Producer: these blocks may be read."""

    transfer_id: int
    block_ids: tuple[int, ...]
    heads: Heads | None
    inline: tuple[tuple[int, bytes], ...]  # (producer address, bytes outside the spans)
    digests: tuple[tuple[int, bytes], ...]  # (index of a chunk, its digest)
    is_complete: bool  # every chunk has a digest


class _Copied(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="copied"):
    """Consumer: the copy is complete."""

    transfer_id: int


class _Abandoned(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="abandoned"):
    """Consumer: the copy failed, or is not what was sent."""

    transfer_id: int
    reason: str


class _Confirmed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="confirmed"):
    """Producer: the blocks were held until Copied arrived."""

    transfer_id: int


_AnyFrame = _Memory | _Ready | _Copied | _Abandoned | _Confirmed
_decoder: msgspec.msgpack.Decoder[_AnyFrame] = msgspec.msgpack.Decoder(_AnyFrame)


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
        self._options = options
        self._refusal = ""  # why the pages are not shared
        self._spans: list[memory.SharedSpan] = []
        self._outside: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._sources: dict[str, Source] = {}
        self._gone: list[Source] = []  # of lost peers, while a copy may read them
        self._ready: dict[tuple[str, int], _Ready] = {}
        self._jobs: list[CopyJob] = []
        self._done: queue.SimpleQueue[CopyJob] = queue.SimpleQueue()
        self._wake = Wakeup()
        self._links.watch(self._wake.fileno())
        self._copiers = ThreadPoolExecutor(
            options.num_copy_threads, initializer=name_this_thread, initargs=("copy",)
        )
        self._is_closed = False

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        super().register_regions(regions)
        spans = memory.join_spans((r.addr, r.num_blocks * r.block_len) for r in regions)
        try:
            self._share([memory.page_interior(*span) for span in spans])
        except TransportUnavailableError as exc:
            self._refusal = str(exc)
            logger.warning("shm: peers read this process instead of shared pages: %s", exc)
            self._close_spans()
            memory.allow_reading()
        else:
            self._outside = _find_outside(self._regions, self._spans)

    def _share(self, spans: Sequence[tuple[int, int]]) -> None:
        if not self._options.shares_pages:
            raise TransportUnavailableError("sharing pages is switched off")
        for addr, num_bytes in spans:
            if num_bytes:
                self._spans.append(memory.share_pages(addr, num_bytes))

    @property
    def mode(self) -> tuple[str, str]:  # noqa: D102
        return ("process_vm_readv", self._refusal) if self._refusal else ("memfd", "")

    def local_endpoint(self) -> bytes:  # noqa: D102
        address = f"{self._address}|{self._regions[0].addr:x}" if self._refusal else self._address
        return self._links.endpoint(address, self._scope)

    def can_reach(self, endpoint: bytes) -> bool:  # noqa: D102
        parsed = self._links.parse_endpoint(endpoint)
        if parsed.scope != self._scope:
            return False
        # Same kernel and user; another network namespace has other abstract sockets.
        try:
            addr = _split_address(parsed.address)[1]
            with _connect(parsed) as sock:
                if addr is not None:
                    _probe(_credentials(sock)[0], addr)
        except (OSError, ValueError) as exc:
            logger.info("shm: cannot reach the peer: %s", exc)
            return False
        return True

    def poll(self) -> list[TransferOutcome]:  # noqa: D102
        outcomes = super().poll()
        self._collect()
        return outcomes + self._ledger.drain()

    def close(self) -> None:  # noqa: D102
        if self._is_closed:
            return
        self._is_closed = True
        super().close()
        for job in self._jobs:
            job.cancel()
        self._copiers.shutdown(wait=True)
        self._collect()
        for peer_id in list(self._sources):
            self._forget(peer_id, Direction.RECEIVING)
        self._close_spans()
        self._wake.close()

    def _close_spans(self) -> None:
        for span in self._spans:
            os.close(span.fd)
        self._spans.clear()

    def _handle_frame(self, event: LinkEvent, frame: bytes) -> None:
        peer_id = event.peer_id
        match _decoder.decode(frame), event.direction:
            case _Memory() as announced, Direction.RECEIVING:
                self._open_source(peer_id, announced)
            case _Ready() as ready, Direction.RECEIVING:
                self._ready[peer_id, ready.transfer_id] = ready
                if posted := self._ledger.find(peer_id, event.direction, ready.transfer_id):
                    self._start_receiving(posted)
            case _Confirmed() as confirmed, Direction.RECEIVING:
                posted = self._find(event, confirmed.transfer_id)
                if not posted.is_copied:
                    raise RemoteProtocolError(f"transfer {posted.transfer_id} is not copied yet")
                self._ledger.end(posted)
            case _Copied() as copied, Direction.SENDING:
                posted = self._find(event, copied.transfer_id)
                self._ledger.end(posted)
                self._send(posted, _Confirmed(transfer_id=posted.transfer_id))
            case _Abandoned() as abandoned, Direction.SENDING:
                posted = self._find(event, abandoned.transfer_id)
                self._ledger.end(posted, TransferError(f"given up: {abandoned.reason}"))
            case other, _:
                raise RemoteProtocolError(f"{type(other).__name__} on a {event.direction} link")

    def _find(self, event: LinkEvent, transfer_id: int) -> Posted:
        posted = self._ledger.find(event.peer_id, event.direction, transfer_id)
        if posted is None or posted.is_busy:
            raise RemoteProtocolError(f"end of transfer {transfer_id}, which is not under way")
        return posted

    def _start_job(self, job: CopyJob) -> None:
        """Run a job on the copier threads; its transfer does not end before it does."""
        job.posted.is_busy = True
        self._jobs.append(job)
        for _ in range(job.num_threads):
            self._copiers.submit(job.run)

    def _finish_job(self, job: CopyJob) -> None:
        """Called by the last thread of a job."""
        self._done.put(job)
        self._wake.set()

    def _collect(self) -> None:
        """Go on with the transfers whose job is done."""
        self._wake.clear()
        while not self._done.empty():
            job = self._done.get()
            self._jobs.remove(job)
            posted = job.posted
            posted.is_busy = False
            posted.verify_s = job.verify_s
            if posted.error is not None:
                self._ledger.end(posted)
            elif job.error is not None:
                self._ledger.end(posted, job.error)
                reason = str(job.error)
                self._send(posted, _Abandoned(transfer_id=posted.transfer_id, reason=reason))
            else:
                job.then()
        self._close_gone_sources()

    # Producer's half

    def _handle_link_up(self, peer_id: str) -> None:
        frame = _Memory(
            spans=tuple((span.addr, span.num_bytes) for span in self._spans),
            regions=tuple(
                _RegionInfo(r.addr, r.num_blocks, r.block_len, r.num_rows, r.num_heads)
                for r in self._regions
            ),
        )
        fds = [span.fd for span in self._spans]
        self._links.send(peer_id, Direction.SENDING, msgspec.msgpack.encode(frame), fds=fds)

    def _start_sending(self, posted: Posted) -> None:
        chosen: list[int] = []
        spans: list[list[tuple[int, int]]] = []
        if posted.digests is not Digests.OFF:
            chunks = self._chunks(posted)
            chosen = choose(posted.digests, len(chunks))
            spans = [
                spans_of_chunk(self._regions, chunks[i], posted.block_ids, posted.heads)
                for i in chosen
            ]
        if posted.digests is not Digests.ALWAYS:  # too little to bother a thread with
            self._announce(posted, list(zip(chosen, map(digest, spans), strict=True)))
            return
        digests: list[tuple[int, bytes]] = []

        def compute() -> None:
            digests.extend((i, digest(span)) for i, span in zip(chosen, spans, strict=True))

        then = partial(self._announce, posted, digests)
        self._start_job(CopyJob.of_one(posted, compute, then, self._finish_job))

    def _announce(self, posted: Posted, digests: list[tuple[int, bytes]]) -> None:
        inline = []
        for index in range(len(self._regions)) if self._outside else ():
            for block_id in posted.block_ids:
                for addr, length in self._outside.get((index, block_id), ()):
                    inline.append((addr, bytes(memory.view(addr, length))))
        ready = _Ready(
            transfer_id=posted.transfer_id,
            block_ids=tuple(posted.block_ids),
            heads=posted.heads,
            inline=tuple(inline),
            digests=tuple(digests),
            is_complete=posted.digests is Digests.ALWAYS,
        )
        self._send(posted, ready)

    # Consumer's half

    def _open_source(self, peer_id: str, frame: _Memory) -> None:
        link = self._links.link(peer_id, Direction.RECEIVING)
        if link is None or peer_id in self._sources:
            raise RemoteProtocolError("memory announced twice")
        if len(link.received_fds) != len(frame.spans):
            raise RemoteProtocolError(f"{len(link.received_fds)} descriptors for {frame.spans}")
        regions = [_check_region(*pair) for pair in zip(self._regions, frame.regions, strict=False)]
        if len(regions) != len(self._regions) or len(regions) != len(frame.regions):
            raise RemoteProtocolError(f"the peer has {len(frame.regions)} regions")
        spans = []
        try:
            for (addr, num_bytes), fd in zip(frame.spans, link.received_fds, strict=True):
                spans.append(memory.map_span(addr, num_bytes, fd))
        except OSError as exc:
            logger.warning("shm: reading the peer's process, not its shared pages: %s", exc)
            for span in spans:
                memory.unmap_span(span)
            spans = []
        finally:
            link.close_received_fds()
        if spans:
            self._sources[peer_id] = MappedSource(regions, spans)
        else:
            assert isinstance(link.raw, socket.socket)
            pid = _credentials(link.raw)[0]
            _probe(pid, regions[0].addr)
            self._sources[peer_id] = ProcessSource(regions, pid)

    def _start_receiving(self, posted: Posted) -> None:
        ready = self._ready.pop((posted.peer_id, posted.transfer_id), None)
        if ready is None:
            return
        source = self._sources.get(posted.peer_id)
        if source is None:
            raise RemoteProtocolError("blocks announced before the memory that holds them")
        if posted.is_busy or posted.is_copied:
            raise RemoteProtocolError(f"transfer {posted.transfer_id} announced twice")
        _check_ready(ready, posted, source)
        then = partial(self._report_copied, posted)
        job = CopyJob(posted, source, then, self._finish_job, self._options.on_received)
        self._plan(job, ready)
        job.num_threads = max(1, min(self._options.num_copy_threads, len(job.parts)))
        self._start_job(job)

    def _plan(self, job: CopyJob, ready: _Ready) -> None:
        """Turn blocks into address ranges; in parts for several threads or digests."""
        posted = job.posted
        digests = dict(ready.digests)
        chunks = self._chunks(posted) if digests else []
        if any(not 0 <= index < len(chunks) for index in digests):
            raise RemoteProtocolError("a digest of a chunk that is not")
        checks = {
            i: Check(spans_of_chunk(self._regions, chunks[i], posted.block_ids, posted.heads), d)
            for i, d in digests.items()
        }
        inline = dict(ready.inline)
        if ready.is_complete and len(checks) == len(chunks):  # verify while it is in the cache
            for i, chunk in enumerate(chunks):
                part = Part([], [checks[i]])
                for piece in chunk.pieces:
                    place = slice(piece.first, piece.first + piece.num_blocks)
                    runs = merge_runs(ready.block_ids[place], posted.block_ids[place])
                    self._plan_region(job, part, piece.region, runs, (ready.heads, inline))
                job.parts.append(part)
            return
        runs = merge_runs(ready.block_ids, posted.block_ids)
        whole = Part([], [])
        for index in range(len(self._regions)):
            self._plan_region(job, whole, index, runs, (ready.heads, inline))
        job.parts += whole.split(self._options.num_copy_threads)
        job.checks += checks.values()

    def _plan_region(
        self,
        job: CopyJob,
        part: Part,
        index: int,
        runs: Sequence[tuple[int, int, int]],
        theirs: tuple[Heads | None, dict[int, bytes]],
    ) -> None:
        assert job.source is not None
        heads, inline = theirs
        moves, keep = job.source.plan(
            index, self._regions[index], runs, (job.posted.heads, heads), inline
        )
        part.moves.extend(moves)
        job.keep += keep

    def _report_copied(self, posted: Posted) -> None:
        posted.is_copied = True
        self._send(posted, _Copied(transfer_id=posted.transfer_id))

    def _chunks(self, posted: Posted) -> list[Chunk]:
        return plan_chunks(self._regions, posted.heads, len(posted.block_ids), max_len=CHUNK_LEN)

    def _forget(self, peer_id: str, direction: Direction) -> None:
        if direction is Direction.SENDING:
            return
        for job in self._jobs:
            if job.posted.peer_id == peer_id and job.posted.direction is direction:
                job.cancel()
        for key in [key for key in self._ready if key[0] == peer_id]:
            del self._ready[key]
        if source := self._sources.pop(peer_id, None):
            self._gone.append(source)
            self._close_gone_sources()

    def _close_gone_sources(self) -> None:
        """Unmap the memory of lost peers that no job reads any more."""
        in_use = {id(job.source) for job in self._jobs}
        for source in [source for source in self._gone if id(source) not in in_use]:
            self._gone.remove(source)
            source.close()


def _check_region(ours: KVRegion, theirs: _RegionInfo) -> KVRegion:
    """Return the peer's region if its heads are like ours.

    Raises:
        RemoteProtocolError: they are not.
    """
    if (
        theirs.num_rows != ours.num_rows
        or theirs.num_heads < 1
        or theirs.num_blocks < 1
        or theirs.block_len != theirs.num_rows * theirs.num_heads * ours.head_len
    ):
        raise RemoteProtocolError(f"the peer's region {theirs} does not fit {ours.name}")
    return KVRegion(
        ours.name,
        theirs.addr,
        theirs.num_blocks,
        theirs.block_len,
        num_rows=theirs.num_rows,
        num_heads=theirs.num_heads,
    )


def _check_ready(ready: _Ready, posted: Posted, source: Source) -> None:
    """Compare what the producer offers with what was asked for.

    Raises:
        RemoteProtocolError: they differ.
    """
    theirs = source.regions
    if len(ready.block_ids) != len(posted.block_ids):
        raise RemoteProtocolError(
            f"{len(ready.block_ids)} blocks announced, not {len(posted.block_ids)}"
        )
    num_blocks = min(region.num_blocks for region in theirs)
    if min(ready.block_ids) < 0 or max(ready.block_ids) >= num_blocks:
        raise RemoteProtocolError("block ids beyond the peer's regions")
    num_heads = min(region.num_heads for region in theirs)
    first, count = ready.heads if ready.heads is not None else (0, num_heads)
    if first < 0 or count < 1 or first + count > num_heads:
        raise RemoteProtocolError(f"{count} heads from {first}, of {num_heads}")


def _probe(pid: int, addr: int) -> None:
    """Try to read one byte of a process.

    Raises:
        OSError: the kernel refuses, or does not know the process.
    """
    byte = bytearray(1)
    memory.read_process(pid, [(memory.address_of(byte), addr, 1)])


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


def _connect(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(f"\0{_split_address(endpoint.address)[0]}")
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
    if (uid := _credentials(sock)[1]) != os.getuid():
        raise PermissionError(f"the other end belongs to user id {uid}")


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of whoever runs the other end, as the kernel knows them."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(credentials)
    return pid, uid, gid


def _split_address(address: str) -> tuple[str, int | None]:
    """Split ``NAME`` or ``NAME|ADDR``: the socket, and what is to be read by the kernel."""
    name, _, addr = address.partition("|")
    return name, int(addr, 16) if addr else None
