"""KV blocks over TCP, between any hosts, over one or several connections per peer.

A transfer is cut into chunks. The producer sends them over whichever connection
has room, each behind a ``Data`` frame; the consumer receives them in place and
answers ``Received`` when all are there, or ``Abandoned`` when a digest does not
match. A consumer that has not posted its half yet stops reading, and TCP holds the
producer back.

Host memory is sent and received where it is, without copies in between. Memory of
a device passes through pinned buffers, see ``staging``.
"""

from __future__ import annotations

import functools
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from vllm_pd.config import Digests
from vllm_pd.errors import (
    DigestMismatchError,
    PeerLostError,
    RemoteProtocolError,
    TransferError,
)
from vllm_pd.transport import inet
from vllm_pd.transport.base import KVRegion, TransferOutcome, TransportOptions
from vllm_pd.transport.chunks import Chunk, plan_chunks
from vllm_pd.transport.device import DeviceInterface
from vllm_pd.transport.digests import choose, digest_of
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.link import Outgoing
from vllm_pd.transport.links import Direction, Endpoint, LinkEvent, LinkPool
from vllm_pd.transport.payload import (
    DirectPayload,
    Landing,
    Payload,
    StagedPayload,
    device_of,
)
from vllm_pd.transport.tls import TlsContexts, TlsSocket, make_contexts
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

CHUNK_LEN = 4 * 1024 * 1024
"""Bytes per chunk; both sides must agree, so a change is one of the protocol."""


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    transfer_id: int


class _Data(_Frame, frozen=True, tag="data"):
    """Producer: the bytes of a chunk follow."""

    chunk: int
    num_bytes: int
    digest: bytes = b""  # of the chunk, if the producer vouches for it


class _Received(_Frame, frozen=True, tag="received"):
    """Consumer: the last byte is in place."""


class _Abandoned(_Frame, frozen=True, tag="abandoned"):
    """Consumer: what arrived is not what was sent."""

    reason: str


_AnyFrame = _Data | _Received | _Abandoned
_decoder: msgspec.msgpack.Decoder[_AnyFrame] = msgspec.msgpack.Decoder(_AnyFrame)


@dataclass(slots=True, eq=False)
class _Outbound:
    """A transfer that is being sent."""

    posted: Posted
    chunks: list[Chunk]
    vouched: frozenset[int]  # chunks that get a digest
    next_chunk: int = 0


@dataclass(slots=True, eq=False)
class _Inbound:
    """A transfer that is being received."""

    posted: Posted
    chunks: list[Chunk]
    missing: set[int]
    num_vouched: int = 0
    error: TransferError | None = None


@dataclass(slots=True)
class _Stream:
    """What one connection from a producer is at."""

    waiting: _Data | None = None  # announced, and not wanted yet
    landing: tuple[_Inbound, _Data, Landing] | None = None  # coming in


@dataclass(slots=True)
class _Traffic:
    """Transfers with one peer."""

    outbound: deque[_Outbound] = field(default_factory=deque)
    inbound: dict[int, _Inbound] = field(default_factory=dict)  # by transfer id
    streams: dict[int, _Stream] = field(default_factory=dict)


class TcpTransport(HostTransport):
    """See the module and ``Transport``.

    Args:
        options: see there.
        open_device: finds what holds a KV cache that is not in host memory.
    """

    name = "tcp"

    def __init__(
        self,
        options: TransportOptions,
        *,
        open_device: Callable[[Sequence[KVRegion]], DeviceInterface] = device_of,
    ) -> None:
        self._tls = _make_tls(options)
        listener = inet.listen(options.host)
        host, port = listener.getsockname()[:2]
        self._address = f"{host}|{port}|{'tls' if self._tls else 'plain'}"
        super().__init__(
            LinkPool(
                self.name,
                listener,
                _connect,
                check_peer=inet.send_at_once,
                secure=self._wrap if self._tls else None,
                num_streams=options.num_streams,
            )
        )
        self._options = options
        self._open_device = open_device
        self._wake = Wakeup()
        self._links.watch(self._wake.fileno())
        self._payload: Payload = DirectPayload(())
        self._traffic: dict[str, _Traffic] = {}

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        if all(region.device == "cpu" for region in regions):
            super().register_regions(regions)
            self._payload = DirectPayload(self._regions)
            return
        self._regions = tuple(regions)
        self._payload = StagedPayload(
            self._regions,
            self._open_device(self._regions),
            staging_len=self._options.staging_len,
            chunk_len=CHUNK_LEN,
            wake=self._wake.set,
        )

    @property
    def mode(self) -> tuple[str, str]:  # noqa: D102
        return f"{self._payload.name}{'+tls' if self._tls else ''}", ""

    def local_endpoint(self) -> bytes:  # noqa: D102
        return self._links.endpoint(self._address)

    def can_reach(self, endpoint: bytes) -> bool:  # noqa: D102
        address = self._links.parse_endpoint(endpoint).address
        is_encrypted = address.endswith("|tls")
        if is_encrypted != bool(self._tls):
            logger.warning(
                "tcp: the peer %s TLS and this worker %s: set tls on both sides or on none",
                *("wants", "does not") if is_encrypted else ("does not use", "does"),
            )
        return is_encrypted == bool(self._tls)

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:  # noqa: D102
        try:
            _parse_address(self._links.parse_endpoint(endpoint).address)
        except ValueError as exc:
            raise RemoteProtocolError(f"endpoint of the tcp transport: {exc}") from exc
        super().add_peer(peer_id, endpoint)
        self._traffic[peer_id] = _Traffic()

    def remove_peer(self, peer_id: str) -> None:  # noqa: D102
        super().remove_peer(peer_id)
        self._traffic.pop(peer_id, None)

    def poll(self) -> list[TransferOutcome]:  # noqa: D102
        outcomes = super().poll()
        self._collect_staged()
        return outcomes + self._ledger.drain()

    def close(self) -> None:  # noqa: D102
        super().close()
        for peer_id in self._traffic:
            for direction in Direction:
                self._forget(peer_id, direction)
        self._payload.close()
        self._collect_staged()
        self._ledger.fail_all(PeerLostError("the transport was closed"))  # busy until now
        self._wake.close()

    # Producer's half

    def _handle_link_up(self, peer_id: str) -> None:
        feed = functools.partial(self._next_chunk, peer_id)
        self._links.feed(peer_id, Direction.SENDING, feed)

    def _start_sending(self, posted: Posted) -> None:
        chunks = self._chunks(posted)
        outbound = _Outbound(posted, chunks, frozenset(choose(posted.digests, len(chunks))))
        self._traffic[posted.peer_id].outbound.append(outbound)
        self._payload.start_sending(posted, chunks)
        self._links.kick(posted.peer_id, Direction.SENDING)

    def _next_chunk(self, peer_id: str) -> Outgoing | None:
        """Return what a connection with room is to send next."""
        queue = self._traffic[peer_id].outbound
        while queue and queue[0].next_chunk == len(queue[0].chunks):
            queue.popleft()
        if not queue:
            return None
        outbound = queue[0]
        posted, index = outbound.posted, outbound.next_chunk
        taken = self._payload.take(posted, index, outbound.chunks[index])
        if taken is None:
            return None
        memory, on_sent = taken
        outbound.next_chunk += 1
        started = time.monotonic()
        vouched = digest_of(memory.views()) if index in outbound.vouched else b""
        posted.verify_s += time.monotonic() - started
        frame = _Data(
            transfer_id=posted.transfer_id,
            chunk=index,
            num_bytes=outbound.chunks[index].num_bytes,
            digest=vouched,
        )
        return Outgoing(msgspec.msgpack.encode(frame), memory, on_sent)

    # Consumer's half

    def _start_receiving(self, posted: Posted) -> None:
        traffic = self._traffic[posted.peer_id]
        chunks = self._chunks(posted)
        try:
            self._payload.start_receiving(posted)
        except TransferError as exc:
            raise RemoteProtocolError(f"transfer {posted.transfer_id}: {exc}") from exc
        traffic.inbound[posted.transfer_id] = _Inbound(posted, chunks, set(range(len(chunks))))
        self._resume(posted.peer_id)

    def _resume(self, peer_id: str) -> None:
        """Look again at what producers have announced and nobody wanted yet."""
        for number, stream in self._traffic[peer_id].streams.items():
            if data := stream.waiting:
                stream.waiting = None
                self._take_data(peer_id, number, data)

    def _take_data(self, peer_id: str, number: int, data: _Data) -> None:
        """Receive the chunk that follows, or stop reading until it is wanted."""
        link = self._links.link(peer_id, Direction.RECEIVING, number)
        if link is None:
            return
        traffic = self._traffic[peer_id]
        stream = traffic.streams.setdefault(number, _Stream())
        inbound = traffic.inbound.get(data.transfer_id)
        landing = None
        if inbound is not None:
            _check_data(data, inbound)
            landing = self._payload.land(inbound.posted, data.chunk, inbound.chunks[data.chunk])
        link.paused = landing is None
        self._links.update(link)
        if inbound is None or landing is None:
            stream.waiting = data
            return
        inbound.missing.remove(data.chunk)
        stream.landing = inbound, data, landing
        link.expect_payload(landing.memory)

    def _handle_payload_end(self, event: LinkEvent) -> None:
        stream = self._traffic[event.peer_id].streams[event.stream]
        assert stream.landing is not None
        (inbound, data, landing), stream.landing = stream.landing, None
        posted = inbound.posted
        if self._options.on_received is not None and data.chunk == 0:
            self._options.on_received(landing.memory.views()[0])
        if data.digest:
            started = time.monotonic()
            if digest_of(landing.memory.views()) != data.digest:
                inbound.error = DigestMismatchError(
                    f"transfer {posted.transfer_id}: the bytes received are not those sent"
                )
            inbound.num_vouched += 1
            posted.verify_s += time.monotonic() - started
        self._payload.landed(posted, data.chunk, inbound.chunks[data.chunk], landing)
        self._finish_if_complete(inbound)

    def _finish_if_complete(self, inbound: _Inbound) -> None:
        posted = inbound.posted
        traffic = self._traffic.get(posted.peer_id)
        if posted.is_over or posted.is_busy or inbound.missing or traffic is None:
            return
        if any(s.landing and s.landing[0] is inbound for s in traffic.streams.values()):
            return
        traffic.inbound.pop(posted.transfer_id, None)
        wanted = {Digests.OFF: 0, Digests.SAMPLED: 1, Digests.ALWAYS: len(inbound.chunks)}
        if inbound.num_vouched < wanted[posted.digests]:
            inbound.error = inbound.error or DigestMismatchError(
                f"transfer {posted.transfer_id}: the producer vouches for less than "
                f"{posted.digests.value}"
            )
        self._ledger.end(posted, inbound.error)
        if posted.error is None:
            self._send(posted, _Received(transfer_id=posted.transfer_id))
        else:
            reason = str(posted.error)
            self._send(posted, _Abandoned(transfer_id=posted.transfer_id, reason=reason))

    # Both

    def _handle_frame(self, event: LinkEvent, frame: bytes) -> None:
        match _decoder.decode(frame), event.direction:
            case _Data() as data, Direction.RECEIVING:
                self._take_data(event.peer_id, event.stream, data)
            case (_Received() | _Abandoned()) as end, Direction.SENDING:
                posted = self._ledger.find(event.peer_id, event.direction, end.transfer_id)
                if posted is None or not self._is_sent(posted):
                    raise RemoteProtocolError(f"receipt of transfer {end.transfer_id}")
                reason = end.reason if isinstance(end, _Abandoned) else None
                self._ledger.end(posted, TransferError(f"given up: {reason}") if reason else None)
            case other, _:
                raise RemoteProtocolError(f"{type(other).__name__} on a {event.direction} link")

    def _is_sent(self, posted: Posted) -> bool:
        queue = self._traffic[posted.peer_id].outbound
        return all(o.posted is not posted or o.next_chunk == len(o.chunks) for o in queue)

    def _collect_staged(self) -> None:
        """Go on with chunks that the device has copied, and with what waited for a buffer."""
        self._wake.clear()
        for posted, error in self._payload.collect():
            if error is not None and posted.error is None:
                self._lose(posted.peer_id, posted.direction, error)
            traffic = self._traffic.get(posted.peer_id)
            if posted.direction is Direction.SENDING:
                self._links.kick(posted.peer_id, Direction.SENDING)
            elif traffic and (inbound := traffic.inbound.get(posted.transfer_id)):
                self._finish_if_complete(inbound)
            if posted.error is not None:
                self._ledger.end(posted)
        if self._payload.takes_buffers:
            for peer_id in list(self._traffic):
                try:
                    self._resume(peer_id)
                except RemoteProtocolError as exc:
                    self._lose(peer_id, Direction.RECEIVING, str(exc))

    def _forget(self, peer_id: str, direction: Direction) -> None:
        if traffic := self._traffic.get(peer_id):
            if direction is Direction.SENDING:
                traffic.outbound.clear()
            else:
                for stream in traffic.streams.values():
                    if stream.landing:
                        self._payload.give_up(stream.landing[2])
                traffic.inbound.clear()
                traffic.streams.clear()
        self._payload.forget(peer_id, direction)

    def _chunks(self, posted: Posted) -> list[Chunk]:
        return plan_chunks(self._regions, posted.heads, len(posted.block_ids), max_len=CHUNK_LEN)

    def _wrap(self, sock: socket.socket, is_accepted: bool) -> TlsSocket:  # noqa: FBT001
        assert self._tls is not None
        context = self._tls.server if is_accepted else self._tls.client
        return TlsSocket(sock, context, server_side=is_accepted)


def _check_data(data: _Data, inbound: _Inbound) -> None:
    """Compare an announcement with what is wanted.

    Raises:
        RemoteProtocolError: they do not fit.
    """
    if data.chunk not in inbound.missing:
        raise RemoteProtocolError(f"chunk {data.chunk} of transfer {data.transfer_id}, again")
    wanted = inbound.chunks[data.chunk].num_bytes
    if data.num_bytes != wanted:
        raise RemoteProtocolError(f"{data.num_bytes} bytes announced, not {wanted}")


def _make_tls(options: TransportOptions) -> TlsContexts | None:
    if options.certificate is None or options.private_key is None:
        return None
    return make_contexts(options.certificate, options.private_key)


def _parse_address(address: str) -> tuple[str, int]:
    """Split ``HOST|PORT|KIND``.

    Raises:
        ValueError: it is something else.
    """
    host, port_text, _ = address.split("|")
    port = int(port_text)
    inet.check_address(host, port)
    return host, port


def _connect(endpoint: Endpoint) -> socket.socket:
    return inet.connect(*_parse_address(endpoint.address))
