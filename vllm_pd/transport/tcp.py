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

from vllm_pd.errors import RemoteProtocolError, TransportUnavailableError
from vllm_pd.transport.base import TransportOptions
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction, Endpoint, LinkPool
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


class TcpTransport(HostTransport):
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
        super().__init__(LinkPool(self.name, listener, _connect))
        self._receiving: dict[str, Posted] = {}  # peer -> the transfer whose bytes come in
        self._announced: dict[str, _Data] = {}  # peer -> data that waits for recv_blocks

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
        super().add_peer(peer_id, endpoint)

    def _start_sending(self, posted: Posted) -> None:
        frame = _Data(transfer_id=posted.transfer_id, num_bytes=posted.num_bytes)
        payload = self._views(posted.block_ids)
        self._links.send(
            posted.peer_id, Direction.SENDING, msgspec.msgpack.encode(frame), payload=payload
        )

    def _start_receiving(self, posted: Posted) -> None:
        if data := self._announced.pop(posted.peer_id, None):
            self._take_data(posted.peer_id, data)

    def _handle_frame(self, peer_id: str, direction: Direction, frame: bytes) -> None:
        match _decoder.decode(frame), direction:
            case _Data() as data, Direction.RECEIVING:
                self._take_data(peer_id, data)
            case _Received() as receipt, Direction.SENDING:
                posted = self._ledger.find(peer_id, direction, receipt.transfer_id)
                if posted is None:
                    raise RemoteProtocolError(f"receipt of unknown transfer {receipt.transfer_id}")
                self._ledger.end(posted)
            case other, _:
                raise RemoteProtocolError(f"{type(other).__name__} on a {direction} link")

    def _handle_payload_end(self, peer_id: str) -> None:
        posted = self._receiving.pop(peer_id)
        self._ledger.end(posted)
        self._send(posted, _Received(transfer_id=posted.transfer_id))

    def _forget(self, peer_id: str) -> None:
        self._receiving.pop(peer_id, None)
        self._announced.pop(peer_id, None)

    def _take_data(self, peer_id: str, data: _Data) -> None:
        """Receive the bytes that follow, or stop reading until they are wanted."""
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
