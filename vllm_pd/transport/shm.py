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
import queue
import socket
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from vllm_pd.config import Digests
from vllm_pd.errors import DigestMismatchError, RemoteProtocolError, TransferError
from vllm_pd.transport import unix
from vllm_pd.transport.base import KVRegion, TransferOutcome, TransportOptions
from vllm_pd.transport.chunks import slice_len
from vllm_pd.transport.copying import CopyJob, Part
from vllm_pd.transport.digests import choose_pieces
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction, Endpoint, LinkEvent, LinkPool
from vllm_pd.transport.shm_frames import (
    Abandoned,
    AnyFrame,
    Confirmed,
    Copied,
    Memory,
    Ready,
    Vouched,
    check_ready,
    decode,
)
from vllm_pd.transport.shm_memory import OfferedMemory, open_source
from vllm_pd.transport.shm_plan import plan_copy, spans_of_pieces
from vllm_pd.transport.sources import Source
from vllm_pd.transport.threads import name_this_thread
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)


class ShmTransport(HostTransport):
    """See the module and ``Transport``."""

    name = "shm"

    def __init__(self, options: TransportOptions) -> None:
        self._scope = unix.scope()
        listener, self._address = unix.listen()
        super().__init__(
            LinkPool(self.name, listener, _connect, check_peer=unix.check_same_user, takes_fds=True)
        )
        self._options = options
        self._memory: OfferedMemory | None = None
        self._sources: dict[str, Source] = {}
        self._gone: list[Source] = []  # of lost peers, while a copy may read them
        self._ready: dict[tuple[str, int], Ready] = {}
        self._vouched: dict[tuple[str, int], Vouched] = {}
        self._copied: dict[tuple[str, int], CopyJob] = {}  # done; may wait for digests
        self._jobs: list[CopyJob] = []
        self._samples: deque[CopyJob] = deque()  # digests to be computed here, soon
        self._done: queue.SimpleQueue[CopyJob] = queue.SimpleQueue()
        self._wake = Wakeup()
        self._links.watch(self._wake.fileno())
        self._copiers = ThreadPoolExecutor(
            options.num_copy_threads, initializer=name_this_thread, initargs=("copy",)
        )
        self._is_closed = False

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        super().register_regions(regions)
        self._memory = OfferedMemory(self._regions, shares_pages=self._options.shares_pages)

    @property
    def mode(self) -> tuple[str, str]:  # noqa: D102
        return ("process_vm_readv", self._refusal) if self._refusal else ("memfd", "")

    @property
    def _refusal(self) -> str:
        return self._memory.refusal if self._memory is not None else ""

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
                    unix.check_readable(unix.pid_of_peer(sock), addr)
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
        if self._memory is not None:
            self._memory.close()
        self._wake.close()

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
        while self._samples:
            job = self._samples.popleft()
            if not job.posted.is_over:  # else its blocks may hold something else now
                job.run()
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
        assert self._memory is not None
        frame, fds = self._memory.announcement()
        self._links.send(peer_id, Direction.SENDING, msgspec.msgpack.encode(frame), fds=fds)

    def _start_sending(self, posted: Posted) -> None:
        lens = [slice_len(region, posted.heads) for region in self._regions]
        pieces = choose_pieces(posted.digests, lens, len(posted.block_ids))
        assert self._memory is not None
        ready = Ready(
            transfer_id=posted.transfer_id,
            block_ids=tuple(posted.block_ids),
            heads=posted.heads,
            inline=self._memory.inline(posted.block_ids),
            vouched=tuple((piece.region, piece.first, piece.num_blocks) for piece in pieces),
            is_complete=posted.digests is Digests.ALWAYS,
        )
        self._send(posted, ready)
        if not pieces:
            return
        part = Part([], spans_of_pieces(pieces, self._regions, posted))
        if posted.digests is Digests.ALWAYS:
            self._start_job(CopyJob(posted, None, self._finish_job, parts=[part]))
        else:  # too little to bother a thread with, and the consumer may begin meanwhile
            vouch = partial(self._vouch, posted)
            self._samples.append(CopyJob(posted, None, vouch, parts=[part]))
            self._wake.set()

    def _vouch(self, posted: Posted, job: CopyJob) -> None:
        """Send the digests that a job has computed."""
        if job.error is not None:
            self._lose(posted.peer_id, posted.direction, str(job.error))
            return
        digests = tuple(job.digests[i] for i in range(len(job.digests)))
        self._send(posted, Vouched(transfer_id=posted.transfer_id, digests=digests))

    # Consumer's half

    def _open_source(self, peer_id: str, frame: Memory) -> None:
        link = self._links.link(peer_id, Direction.RECEIVING)
        if link is None or peer_id in self._sources:
            raise RemoteProtocolError("memory announced twice")
        assert isinstance(link.raw, socket.socket)
        try:
            self._sources[peer_id] = open_source(
                self._regions, frame, link.received_fds, unix.pid_of_peer(link.raw)
            )
        finally:
            link.close_received_fds()

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
        num_threads = self._options.num_copy_threads
        plan = plan_copy(posted, ready, source, self._regions, num_threads=num_threads)
        job = CopyJob(
            posted,
            source,
            self._finish_job,
            self._options.on_received,
            parts=plan.parts,
            hashed_last=plan.hashed_last,
            keep=plan.keep,
            num_threads=max(1, min(num_threads, len(plan.parts))),
        )
        self._start_job(job)

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


def _connect(endpoint: Endpoint) -> socket.socket:
    return unix.connect(_split_address(endpoint.address)[0])


def _split_address(address: str) -> tuple[str, int | None]:
    """Split ``NAME`` or ``NAME|ADDR``: the socket, and what is to be read by the kernel."""
    name, _, addr = address.partition("|")
    return name, int(addr, 16) if addr else None
