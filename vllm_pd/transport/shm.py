"""KV blocks through shared memory, between workers on one host: one memcpy in all.

``register_regions`` replaces the pages under the KV cache by pages of memfds, in
place. A consumer connects over an abstract Unix socket, gets the descriptors,
maps the producer's pages read-only and copies runs of blocks into its own cache.
Nothing lies in a file system, so nothing is left behind after a kill. Where the
kernel refuses to share the pages, the consumer has it copy from the producer's
process instead (process_vm_readv), at about half the speed.

Per transfer::

    producer                    consumer
    Ready      ->               block ids, and the bytes outside shared pages
    Vouched    ->               digests, computed while the consumer copies
                <-  Copied      the copy is complete and matches the digests
    Confirmed  ->               the blocks were leased all the while: it counts

The last message is what makes a one-sided read safe: the producer cannot stop
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
from pathlib import Path

import msgspec

from vllm_pd.config import Digests
from vllm_pd.errors import (
    DigestMismatchError,
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
from vllm_pd.transport.chunks import Chunk, Piece, slice_len, spans_of_chunk
from vllm_pd.transport.copying import CopyJob, Part, Spans
from vllm_pd.transport.digests import choose_pieces
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.link import MAX_FDS
from vllm_pd.transport.links import Direction, Endpoint, LinkEvent, LinkPool
from vllm_pd.transport.shm_frames import (
    Abandoned,
    AnyFrame,
    Confirmed,
    Copied,
    Memory,
    Ready,
    RegionInfo,
    Vouched,
    check_pieces,
    check_ready,
    check_region,
    covers_all,
    decode,
)
from vllm_pd.transport.sources import MappedSource, ProcessSource, Source
from vllm_pd.transport.threads import name_this_thread
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UCRED = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


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
        self._ready: dict[tuple[str, int], Ready] = {}
        self._vouched: dict[tuple[str, int], Vouched] = {}
        self._copied: dict[tuple[str, int], CopyJob] = {}  # done; may wait for digests
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
            self._lock_spans()

    def _lock_spans(self) -> None:
        try:
            for span in self._spans:
                memory.lock_pages(span.addr, span.num_bytes)
        except OSError as exc:
            logger.info(
                "shm: the KV cache is not locked into memory: %s. Where the kernel reclaims idle "
                "memory, copies after a pause are slower; raise the limit with `ulimit -l` or, "
                "in a container, `--ulimit memlock=-1`",
                exc.strerror,
            )

    def _share(self, spans: Sequence[tuple[int, int]]) -> None:
        if not self._options.shares_pages:
            raise TransportUnavailableError("sharing pages is switched off")
        if len(spans) > MAX_FDS:
            raise TransportUnavailableError(
                f"the KV cache is in {len(spans)} places, and no more than {MAX_FDS} can be shared"
            )
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
        decoded = decode(frame)
        if event.direction is Direction.RECEIVING:
            self._handle_producer(event, decoded)
        else:
            self._handle_consumer(event, decoded)

    def _handle_producer(self, event: LinkEvent, frame: AnyFrame) -> None:
        """React to what a producer says."""
        peer_id = event.peer_id
        match frame:
            case Memory():
                self._open_source(peer_id, frame)
            case Ready():
                self._ready[peer_id, frame.transfer_id] = frame
                if posted := self._ledger.find(peer_id, event.direction, frame.transfer_id):
                    self._start_receiving(posted)
            case Vouched():
                key = peer_id, frame.transfer_id
                # Not for a transfer that has failed meanwhile: nobody would take it away.
                if key in self._ready or self._ledger.find(key[0], event.direction, key[1]):
                    self._vouched[key] = frame
                    self._settle(*key)
            case Confirmed():
                posted = self._find(event, frame.transfer_id)
                if not posted.is_copied:
                    raise RemoteProtocolError(f"transfer {posted.transfer_id} is not copied yet")
                self._ledger.end(posted)
            case _:
                raise RemoteProtocolError(f"{type(frame).__name__} from a producer")

    def _handle_consumer(self, event: LinkEvent, frame: AnyFrame) -> None:
        """React to what a consumer says."""
        match frame:
            case Copied():
                posted = self._find(event, frame.transfer_id)
                if posted.is_busy:
                    raise RemoteProtocolError(f"transfer {posted.transfer_id} is not vouched for")
                self._ledger.end(posted)
                self._send(posted, Confirmed(transfer_id=posted.transfer_id))
            case Abandoned():
                posted = self._find(event, frame.transfer_id)
                self._ledger.end(posted, TransferError(f"given up: {frame.reason}"))
            case _:
                raise RemoteProtocolError(f"{type(frame).__name__} from a consumer")

    def _find(self, event: LinkEvent, transfer_id: int) -> Posted:
        posted = self._ledger.find(event.peer_id, event.direction, transfer_id)
        if posted is None:
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
            posted.verify_s += job.verify_s
            if posted.error is not None:
                self._ledger.end(posted)
            elif posted.direction is Direction.SENDING:
                self._vouch(posted, job)
            else:
                self._copied[posted.peer_id, posted.transfer_id] = job
                self._settle(posted.peer_id, posted.transfer_id)
        self._close_gone_sources()

    # Producer's half

    def _handle_link_up(self, peer_id: str) -> None:
        frame = Memory(
            spans=tuple((span.addr, span.num_bytes) for span in self._spans),
            regions=tuple(
                RegionInfo(r.addr, r.num_blocks, r.block_len, r.num_rows, r.num_heads)
                for r in self._regions
            ),
        )
        fds = [span.fd for span in self._spans]
        self._links.send(peer_id, Direction.SENDING, msgspec.msgpack.encode(frame), fds=fds)

    def _start_sending(self, posted: Posted) -> None:
        lens = [slice_len(region, posted.heads) for region in self._regions]
        pieces = choose_pieces(posted.digests, lens, len(posted.block_ids))
        inline = []
        for index in range(len(self._regions)) if self._outside else ():
            for block_id in posted.block_ids:
                for addr, length in self._outside.get((index, block_id), ()):
                    inline.append((addr, bytes(memory.view(addr, length))))
        ready = Ready(
            transfer_id=posted.transfer_id,
            block_ids=tuple(posted.block_ids),
            heads=posted.heads,
            inline=tuple(inline),
            vouched=tuple((piece.region, piece.first, piece.num_blocks) for piece in pieces),
            is_complete=posted.digests is Digests.ALWAYS,
        )
        self._send(posted, ready)
        if not pieces:
            return
        job = CopyJob(posted, None, self._finish_job)
        job.parts.append(Part([], self._spans_of(posted, pieces)))
        if posted.digests is Digests.ALWAYS:
            self._start_job(job)
        else:  # too little to bother a thread with
            job.on_done = lambda job: self._vouch(posted, job)
            job.run()

    def _vouch(self, posted: Posted, job: CopyJob) -> None:
        """Send the digests that a job has computed."""
        if job.error is not None:
            self._lose(posted.peer_id, posted.direction, str(job.error))
            return
        digests = tuple(job.digests[i] for i in range(len(job.digests)))
        self._send(posted, Vouched(transfer_id=posted.transfer_id, digests=digests))

    def _spans_of(self, posted: Posted, pieces: Sequence[Piece]) -> dict[int, Spans]:
        """Return where the bytes of pieces are here, by their index."""
        return {
            i: spans_of_chunk(self._regions, Chunk((piece,), 0), posted.block_ids, posted.heads)
            for i, piece in enumerate(pieces)
        }

    # Consumer's half

    def _open_source(self, peer_id: str, frame: Memory) -> None:
        link = self._links.link(peer_id, Direction.RECEIVING)
        if link is None or peer_id in self._sources:
            raise RemoteProtocolError("memory announced twice")
        if len(link.received_fds) != len(frame.spans):
            raise RemoteProtocolError(f"{len(link.received_fds)} descriptors for {frame.spans}")
        regions = [check_region(*pair) for pair in zip(self._regions, frame.regions, strict=False)]
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
        key = posted.peer_id, posted.transfer_id
        ready = self._ready.pop(key, None)
        if ready is None:
            return
        source = self._sources.get(posted.peer_id)
        if source is None:
            raise RemoteProtocolError("blocks announced before the memory that holds them")
        if posted.is_busy or posted.is_copied or key in self._copied:
            raise RemoteProtocolError(f"transfer {posted.transfer_id} announced twice")
        check_ready(ready, posted, source, min(region.num_heads for region in self._regions))
        job = CopyJob(posted, source, self._finish_job, self._options.on_received)
        self._plan(job, ready)
        job.num_threads = max(1, min(self._options.num_copy_threads, len(job.parts)))
        self._start_job(job)

    def _plan(self, job: CopyJob, ready: Ready) -> None:
        """Turn blocks into address ranges; in parts for several threads or digests."""
        posted = job.posted
        assert job.source is not None
        pieces = [Piece(*piece) for piece in ready.vouched]
        check_pieces(pieces, len(self._regions), len(posted.block_ids))
        hashed = self._spans_of(posted, pieces)
        inline = dict(ready.inline)
        is_complete = ready.is_complete and covers_all(
            pieces, len(self._regions), len(posted.block_ids)
        )
        enough = {
            Digests.OFF: True,
            Digests.SAMPLED: bool(pieces),
            Digests.ALWAYS: is_complete,
        }
        if not enough[posted.digests]:
            raise RemoteProtocolError(f"the producer vouches for less than {posted.digests.value}")
        if is_complete:
            for i, piece in enumerate(pieces):  # hash while it is in the cache
                part = Part([], {i: hashed[i]})
                place = slice(piece.first, piece.first + piece.num_blocks)
                runs = merge_runs(ready.block_ids[place], posted.block_ids[place])
                self._plan_region(job, part, piece.region, runs, (ready.heads, inline))
                job.parts.append(part)
            return
        runs = merge_runs(ready.block_ids, posted.block_ids)
        stacked = None
        if posted.heads is None and ready.heads is None:
            stacked = job.source.plan_stack(self._regions, runs)
        if stacked is not None:
            moves, stack, runs = stacked
            job.parts += Part(moves, {}, stack).split(self._options.num_copy_threads)
        whole = Part([], {})
        for index in range(len(self._regions)) if runs else ():
            self._plan_region(job, whole, index, runs, (ready.heads, inline))
        job.parts += whole.split(self._options.num_copy_threads)
        job.hashed_last = hashed

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

    def _settle(self, peer_id: str, transfer_id: int) -> None:
        """Tell the producer of a copy, once the digests for it are here."""
        job = self._copied.get((peer_id, transfer_id))
        vouched = self._vouched.get((peer_id, transfer_id))
        if job is None or (vouched is None and job.digests and job.error is None):
            return
        del self._copied[peer_id, transfer_id]
        self._vouched.pop((peer_id, transfer_id), None)
        posted, error = job.posted, job.error
        theirs = vouched.digests if vouched is not None else ()
        if error is None and tuple(job.digests[i] for i in range(len(job.digests))) != theirs:
            error = DigestMismatchError(
                f"transfer {transfer_id}: the bytes copied are not those sent"
            )
        if error is not None:
            self._ledger.end(posted, error)
            self._send(posted, Abandoned(transfer_id=transfer_id, reason=str(error)))
            return
        posted.is_copied = True
        self._send(posted, Copied(transfer_id=transfer_id))

    def _forget(self, peer_id: str, direction: Direction) -> None:
        if direction is Direction.SENDING:
            return
        for job in self._jobs:
            if job.posted.peer_id == peer_id and job.posted.direction is direction:
                job.cancel()
        for table in (self._ready, self._vouched, self._copied):
            for key in [key for key in table if key[0] == peer_id]:
                del table[key]
        if source := self._sources.pop(peer_id, None):
            self._gone.append(source)
            self._close_gone_sources()

    def _close_gone_sources(self) -> None:
        """Unmap the memory of lost peers that no job reads any more."""
        in_use = {id(job.source) for job in self._jobs}
        for source in [source for source in self._gone if id(source) not in in_use]:
            self._gone.remove(source)
            source.close()


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
