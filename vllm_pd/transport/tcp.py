"""KV blocks over TCP, from and into host memory without copies in between.

Per transfer the producer sends a ``Data`` frame and the blocks, region by
region; the consumer receives them in place and answers ``Received``. A consumer
that has not posted its half yet stops reading, and TCP holds the producer back.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Sequence

import msgspec

from vllm_pd.errors import (
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    TransportUnavailableError,
)
from vllm_pd.transport.base import (
    KVRegion,
    TransferOutcome,
    Transport,
    TransportOptions,
    check_block_ids,
)
from vllm_pd.transport.ledger import Ledger, Posted
from vllm_pd.transport.links import Direction, Endpoint, LinkEvent, LinkPool, Mark
from vllm_pd.transport.memory import view

logger = logging.getLogger(__name__)


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    transfer_id: int


class _Data(_Frame, frozen=True, tag="data"):
    """Producer: the bytes of a transfer follow."""

    num_bytes: int


class _Received(_Frame, frozen=True, tag="received"):
    """Consumer: the last byte is in place."""


_decoder: msgspec.msgpack.Decoder[_Data | _Received] = msgspec.msgpack.Decoder(_Data | _Received)


class TcpTransport(Transport):
    """See the module and ``Transport``."""

    name = "tcp"

    def __init__(self, options: TransportOptions) -> None:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((options.host, 0))
            listener.listen(64)
        except OSError as exc:
            listener.close()
            raise TransportUnavailableError(f"cannot listen on {options.host}: {exc}") from exc
        host, port = listener.getsockname()[:2]
        self._address = f"{host}|{port}"
        self._links = LinkPool(self.name, listener, _connect)
        self._ledger = Ledger()
        self._regions: Sequence[KVRegion] = ()
        self._receiving: dict[str, Posted] = {}  # peer -> the transfer whose bytes come in
        self._announced: dict[str, _Data] = {}  # peer -> data that waits for recv_blocks

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        if devices := {region.device for region in regions} - {"cpu"}:
            raise TransportUnavailableError(
                f"the tcp transport reads host memory, not {', '.join(sorted(devices))} memory"
            )
        self._regions = tuple(regions)

    def local_endpoint(self) -> bytes:  # noqa: D102
        return self._links.endpoint(self._address)

    def can_reach(self, endpoint: bytes) -> bool:  # noqa: D102
        self._links.parse_endpoint(endpoint)
        return True

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:  # noqa: D102
        try:
            _parse_address(self._links.parse_endpoint(endpoint).address)
        except ValueError as exc:
            raise RemoteProtocolError(f"endpoint of the tcp transport: {exc}") from exc
        self._links.add_peer(peer_id, endpoint)

    def remove_peer(self, peer_id: str) -> None:  # noqa: D102
        self._links.remove_peer(peer_id)
        self._fail(peer_id, f"peer {peer_id} was removed")

    def send_blocks(  # noqa: D102
        self, peer_id: str, transfer_id: int, block_ids: Sequence[int]
    ) -> None:
        posted = self._post(peer_id, Direction.SENDING, transfer_id, block_ids)
        if self._links.link(peer_id, Direction.SENDING):
            self._send(posted)

    def recv_blocks(  # noqa: D102
        self, peer_id: str, transfer_id: int, block_ids: Sequence[int]
    ) -> None:
        self._post(peer_id, Direction.RECEIVING, transfer_id, block_ids)
        self._links.open_link(peer_id)
        if data := self._announced.pop(peer_id, None):
            try:
                self._start_receiving(peer_id, data)
            except RemoteProtocolError as exc:
                self._lose(peer_id, Direction.RECEIVING, str(exc))

    def fileno(self) -> int:  # noqa: D102
        return self._links.fileno()

    def poll(self) -> list[TransferOutcome]:  # noqa: D102
        for event in self._links.poll():
            try:
                self._handle(event)
            except (RemoteProtocolError, msgspec.DecodeError) as exc:
                self._lose(event.peer_id, event.direction, str(exc))
        return self._ledger.drain()

    def close(self) -> None:  # noqa: D102
        self._links.close()
        self._ledger.fail_all(PeerLostError("the transport was closed"))

    def _post(
        self, peer_id: str, direction: Direction, transfer_id: int, block_ids: Sequence[int]
    ) -> Posted:
        if not self._links.has_peer(peer_id):
            raise LocalProtocolError(f"unknown peer {peer_id}")
        check_block_ids(self._regions, block_ids)
        num_bytes = len(block_ids) * sum(region.block_len for region in self._regions)
        posted = Posted(peer_id, direction, transfer_id, tuple(block_ids), num_bytes)
        self._ledger.post(posted)
        return posted

    def _handle(self, event: LinkEvent) -> None:
        match event.item:
            case Mark.UP:
                for posted in self._ledger.posted(event.peer_id, event.direction):
                    self._send(posted)
            case Mark.PAYLOAD_END:
                self._end_receiving(event.peer_id)
            case Mark.LOST:
                self._fail(event.peer_id, event.reason, event.direction)
            case bytes() as frame:
                self._handle_frame(event, _decoder.decode(frame))

    def _handle_frame(self, event: LinkEvent, frame: _Data | _Received) -> None:
        match frame, event.direction:
            case _Data(), Direction.RECEIVING:
                self._start_receiving(event.peer_id, frame)
            case _Received(), Direction.SENDING:
                posted = self._ledger.find(event.peer_id, event.direction, frame.transfer_id)
                if posted is None:
                    raise RemoteProtocolError(f"receipt of unknown transfer {frame.transfer_id}")
                self._ledger.end(posted)
            case _:
                raise RemoteProtocolError(f"{type(frame).__name__} on a {event.direction} link")

    def _send(self, posted: Posted) -> None:
        frame = _Data(transfer_id=posted.transfer_id, num_bytes=posted.num_bytes)
        payload = self._views(posted.block_ids)
        self._links.send(
            posted.peer_id, Direction.SENDING, msgspec.msgpack.encode(frame), payload=payload
        )

    def _start_receiving(self, peer_id: str, data: _Data) -> None:
        link = self._links.link(peer_id, Direction.RECEIVING)
        if link is None:
            return
        posted = self._ledger.find(peer_id, Direction.RECEIVING, data.transfer_id)
        link.paused = posted is None
        self._links.update(link)
        if posted is None:
            self._announced[peer_id] = data
            return
        if data.num_bytes != posted.num_bytes:
            raise RemoteProtocolError(f"{data.num_bytes} bytes announced, not {posted.num_bytes}")
        self._receiving[peer_id] = posted
        link.expect_payload(self._views(posted.block_ids))

    def _end_receiving(self, peer_id: str) -> None:
        posted = self._receiving.pop(peer_id)
        self._ledger.end(posted)
        receipt = msgspec.msgpack.encode(_Received(transfer_id=posted.transfer_id))
        self._links.send(peer_id, Direction.RECEIVING, receipt)

    def _lose(self, peer_id: str, direction: Direction, reason: str) -> None:
        self._links.drop_link(peer_id, direction)
        self._fail(peer_id, reason, direction)

    def _fail(self, peer_id: str, reason: str, direction: Direction | None = None) -> None:
        if direction is not Direction.SENDING:
            self._receiving.pop(peer_id, None)
            self._announced.pop(peer_id, None)
        self._ledger.fail_peer(peer_id, PeerLostError(f"tcp: {reason}"), direction)

    def _views(self, block_ids: Sequence[int]) -> list[memoryview]:
        """Return the blocks' memory in transfer order, adjacent blocks merged."""
        views = []
        for region in self._regions:
            first = length = 0
            for block_id in block_ids:
                addr = region.addr + block_id * region.block_len
                if length and addr == first + length:
                    length += region.block_len
                    continue
                if length:
                    views.append(view(first, length))
                first, length = addr, region.block_len
            if length:
                views.append(view(first, length))
        return views


def _parse_address(address: str) -> tuple[str, int, socket.AddressFamily]:
    """Split ``HOST|PORT``; the host is an IP address, so that no name is looked up.

    Raises:
        ValueError: it is something else.
    """
    host, _, port_text = address.rpartition("|")
    version, port = ipaddress.ip_address(host).version, int(port_text)
    if not 0 < port < 65536:
        raise ValueError(f"{port} is not a port")
    return host, port, socket.AF_INET6 if version == 6 else socket.AF_INET


def _connect(endpoint: Endpoint) -> socket.socket:
    host, port, family = _parse_address(endpoint.address)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((host, port))
    except BlockingIOError:
        pass  # in progress; the first write or a hang-up tells
    except OSError as exc:
        sock.close()
        raise OSError(exc.errno, f"connect to {host} port {port}: {exc.strerror}") from exc
    return sock
