"""Data links: non-blocking stream sockets between the workers of one transport.

A Link carries length-prefixed frames and, between them, raw payload straight
from or into registered memory. A LinkPool owns the listening socket, an epoll
instance and the links to all peers. The consumer connects; its first frame says
who it is and shows the secret that the producer gave it in the handshake.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hmac
import logging
import os
import secrets
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from vllm_pd.errors import LocalProtocolError, RemoteProtocolError

logger = logging.getLogger(__name__)

MAX_FRAME_LEN = 64 * 1024 * 1024
MAX_GREETING_LEN = 256
MAX_UNGREETED = 64
_MAX_IOV = 512
_READ_BUDGET = 64 * 1024 * 1024  # bytes per poll and link, so that no peer starves the others
_HEADER = struct.Struct("!I")


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a worker's LinkPool; travels in the handshake.

    Attributes:
        scheme: name of the transport.
        token: secret that a connecting peer must show.
        address: what the transport's ``connect`` takes.
        scope: where ``address`` means anything, e.g. a boot id; ``""`` for anywhere.
    """

    scheme: str
    token: bytes
    address: str
    scope: str = ""


class Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """First frame of a connection, from the consumer."""

    peer_id: str
    token: bytes


class Mark(enum.Enum):
    """What can happen on a link besides the arrival of a frame."""

    UP = enum.auto()  # the peer has connected and shown who it is
    PAYLOAD_END = enum.auto()  # the expected payload has arrived
    LOST = enum.auto()


class Link:
    """One connected stream socket.

    Every method is called by one thread and never blocks. OSError means that
    the link is lost.
    """

    def __init__(self, sock: socket.socket, *, max_frame_len: int, takes_fds: bool = False) -> None:
        sock.settimeout(0.0)
        self._sock = sock
        self._takes_fds = takes_fds
        self.max_frame_len = max_frame_len
        self.paused = False
        self.received_fds: list[int] = []
        self._out: deque[memoryview] = deque()
        self._in = bytearray()
        self._wanted = _HEADER.size
        self._in_header = True
        self._payload: deque[memoryview] = deque()
        self._payload_ended = False

    def fileno(self) -> int:
        """Return the socket's descriptor; -1 once closed."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether bytes wait for the socket to take them."""
        return bool(self._out)

    def send_frame(self, frame: bytes, payload: Sequence[memoryview] = ()) -> None:
        """Queue a frame and the payload that follows it; memory is read when sent."""
        self._out.append(memoryview(_HEADER.pack(len(frame)) + frame))
        self._out.extend(part for part in payload if part.nbytes)
        self.flush()

    def send_frame_with_fds(self, frame: bytes, fds: Sequence[int]) -> None:
        """Send the first frame of a Unix link together with descriptors."""
        if self._out:
            raise LocalProtocolError("descriptors must travel with the first frame")
        data = _HEADER.pack(len(frame)) + frame
        sent = socket.send_fds(self._sock, [data], list(fds)) if fds else 0
        if sent < len(data):
            self._out.append(memoryview(data)[sent:])
            self.flush()

    def flush(self) -> None:
        """Send as much as the socket takes now."""
        while self._out:
            parts = [self._out[i] for i in range(min(len(self._out), _MAX_IOV))]
            try:
                sent = self._sock.sendmsg(parts)
            except (BlockingIOError, InterruptedError):
                return
            _consume(self._out, sent)

    def expect_payload(self, parts: Sequence[memoryview]) -> None:
        """Receive the bytes that follow the current frame into ``parts``."""
        self._payload.extend(part for part in parts if part.nbytes)

    def receive(self) -> Iterator[bytes | Mark]:
        """Yield what has arrived, until the socket is empty, the link paused or the budget spent.

        Raises:
            OSError: the link is lost.
            RemoteProtocolError: the peer sent a frame that is too long.
        """
        budget = _READ_BUDGET
        while budget > 0 and not self.paused and self.fileno() >= 0:
            try:
                num_read = self._read_payload() if self._payload else self._read_frame_part()
            except (BlockingIOError, InterruptedError):
                return
            if num_read == 0:
                raise ConnectionResetError("closed by the peer")
            budget -= num_read
            if not self._in_header and self._wanted == len(self._in):
                frame, self._in = bytes(self._in), bytearray()
                self._in_header, self._wanted = True, _HEADER.size
                yield frame
            elif self._payload_ended:
                self._payload_ended = False
                yield Mark.PAYLOAD_END

    def _read_payload(self) -> int:
        parts = [self._payload[i] for i in range(min(len(self._payload), _MAX_IOV))]
        num_read = self._sock.recvmsg_into(parts)[0]
        _consume(self._payload, num_read)
        self._payload_ended = not self._payload
        return num_read

    def _read_frame_part(self) -> int:
        num_wanted = min(self._wanted - len(self._in), 1 << 20)
        if self._takes_fds:
            data, fds, _, _ = socket.recv_fds(self._sock, num_wanted, 64, socket.MSG_CMSG_CLOEXEC)
            self.received_fds += fds
        else:
            data = self._sock.recv(num_wanted)
        self._in += data
        if self._in_header and len(self._in) == _HEADER.size:
            (length,) = _HEADER.unpack(self._in)
            if not 0 < length <= self.max_frame_len:
                raise RemoteProtocolError(f"frame of {length} bytes")
            self._in, self._in_header, self._wanted = bytearray(), False, length
        return len(data)

    def close_received_fds(self) -> None:
        """Close the descriptors that came with frames."""
        for fd in self.received_fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.received_fds = []

    def close(self) -> None:
        """Close the socket and descriptors nobody took; idempotent."""
        self._out.clear()
        self._payload.clear()
        self.close_received_fds()
        self._sock.close()


def _consume(parts: deque[memoryview], num_bytes: int) -> None:
    while num_bytes:
        if parts[0].nbytes > num_bytes:
            parts[0] = parts[0][num_bytes:]
            return
        num_bytes -= parts.popleft().nbytes


class Direction(enum.Enum):
    """Which half of transfers a link carries, seen from this worker."""

    SENDING = enum.auto()  # the peer connected to us
    RECEIVING = enum.auto()  # we connected to the peer


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A frame arrived from a peer, or something else happened on the link to it."""

    peer_id: str
    direction: Direction
    item: bytes | Mark
    reason: str = ""


@dataclass(slots=True)
class _Peer:
    endpoint: Endpoint
    links: dict[Direction, Link] = field(default_factory=dict)


class LinkPool:
    """All links of one transport, behind one pollable descriptor.

    Args:
        scheme: name of the transport.
        listener: bound and listening socket; the pool owns it.
        connect: opens a non-blocking socket to an endpoint.
        check_peer: raises OSError when a fresh socket's other end is not trusted.
        takes_fds: whether links carry descriptors (Unix sockets).
    """

    def __init__(
        self,
        scheme: str,
        listener: socket.socket,
        connect: Callable[[Endpoint], socket.socket],
        *,
        check_peer: Callable[[socket.socket], None] = lambda _: None,
        takes_fds: bool = False,
    ) -> None:
        listener.settimeout(0.0)
        self._scheme = scheme
        self._listener = listener
        self._connect = connect
        self._check_peer = check_peer
        self._takes_fds = takes_fds
        self._token = secrets.token_bytes(32)
        self._peers: dict[str, _Peer] = {}
        self._links: dict[int, tuple[Link, str | None, Direction]] = {}
        self._lost: list[LinkEvent] = []
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def watch(self, fd: int) -> None:
        """Make ``fileno`` readable when ``fd`` is; the caller reads it."""
        self._epoll.register(fd, select.EPOLLIN)

    def endpoint(self, address: str, scope: str = "") -> bytes:
        """Return this pool's endpoint, as peers need it."""
        return msgspec.msgpack.encode(
            Endpoint(scheme=self._scheme, token=self._token, address=address, scope=scope)
        )

    def parse_endpoint(self, endpoint: bytes) -> Endpoint:
        """Decode a peer's endpoint.

        Raises:
            RemoteProtocolError: it is not one of this transport's.
        """
        try:
            parsed = msgspec.msgpack.decode(endpoint, type=Endpoint)
        except msgspec.DecodeError as exc:
            raise RemoteProtocolError(f"endpoint of the {self._scheme} transport: {exc}") from exc
        if parsed.scheme != self._scheme:
            raise RemoteProtocolError(f"{parsed.scheme!r} endpoint given to {self._scheme!r}")
        return parsed

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:
        """Let a peer connect, and be connected to."""
        if peer_id in self._peers:
            raise LocalProtocolError(f"peer {peer_id} is there already")
        self._peers[peer_id] = _Peer(self.parse_endpoint(endpoint))

    def has_peer(self, peer_id: str) -> bool:
        """Return whether ``add_peer`` was called and ``remove_peer`` was not."""
        return peer_id in self._peers

    def remove_peer(self, peer_id: str) -> None:
        """Close the links to a peer. Unknown ids are ignored."""
        if peer := self._peers.pop(peer_id, None):
            for link in peer.links.values():
                self._drop(link)

    def drop_link(self, peer_id: str, direction: Direction) -> None:
        """Close one link to a peer because it broke the rules; the peer stays known."""
        if (peer := self._peers.get(peer_id)) and (link := peer.links.pop(direction, None)):
            self._drop(link)

    def link(self, peer_id: str, direction: Direction) -> Link | None:
        """Return the link if it is up."""
        return self._peers[peer_id].links.get(direction) if peer_id in self._peers else None

    def open_link(self, peer_id: str) -> None:
        """Connect to a peer unless that is done; failure shows up as a lost link."""
        peer = self._peers[peer_id]
        if Direction.RECEIVING in peer.links:
            return
        try:
            sock = self._connect(peer.endpoint)
        except OSError as exc:
            self._lost.append(LinkEvent(peer_id, Direction.RECEIVING, Mark.LOST, str(exc)))
            return
        link = Link(sock, max_frame_len=MAX_FRAME_LEN, takes_fds=self._takes_fds)
        peer.links[Direction.RECEIVING] = link
        self._register(link, peer_id, Direction.RECEIVING)
        greeting = Greeting(peer_id=peer_id, token=peer.endpoint.token)
        self.send(peer_id, Direction.RECEIVING, msgspec.msgpack.encode(greeting))

    def send(
        self,
        peer_id: str,
        direction: Direction,
        frame: bytes,
        *,
        payload: Sequence[memoryview] = (),
        fds: Sequence[int] = (),
    ) -> None:
        """Queue a frame on a link that is up; failure shows up as a lost link."""
        link = self.link(peer_id, direction)
        if link is None:
            return
        try:
            if fds:
                link.send_frame_with_fds(frame, fds)
            else:
                link.send_frame(frame, payload)
        except OSError as exc:
            self._lose(peer_id, direction, str(exc))
        else:
            self.update(link)

    def update(self, link: Link) -> None:
        """Tell epoll what a link waits for, after sending, pausing or resuming."""
        if link.fileno() in self._links:
            events = 0 if link.paused else select.EPOLLIN
            events |= select.EPOLLOUT if link.wants_write else 0
            self._epoll.modify(link.fileno(), events)

    def fileno(self) -> int:
        """Return a descriptor that is readable while ``poll`` has something to do."""
        return self._epoll.fileno()

    def poll(self) -> Iterator[LinkEvent]:
        """Make progress on all links without blocking; yield what arrived.

        A link lost while sending shows up here without ``fileno`` being
        readable: call this once after sending. The caller may send, pause and
        remove while it iterates.
        """
        lost, self._lost = self._lost, []
        yield from lost
        for fd, events in [] if self._epoll.closed else self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._links:
                yield from self._serve(fd, events)
        lost, self._lost = self._lost, []
        yield from lost

    def close(self) -> None:
        """Close everything; idempotent."""
        for link, _, _ in list(self._links.values()):
            self._drop(link)
        self._peers.clear()
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._spare_fd)
        self._listener.close()

    def _serve(self, fd: int, events: int) -> Iterator[LinkEvent]:
        link, peer_id, direction = self._links[fd]
        try:
            if events & select.EPOLLOUT:
                link.flush()
                self.update(link)
            if link.paused and events & (select.EPOLLHUP | select.EPOLLERR):
                raise ConnectionResetError("closed by the peer")
            if events & ~select.EPOLLOUT:
                for item in link.receive():
                    if peer_id is None:
                        peer_id = self._greet(link, item)
                        yield LinkEvent(peer_id, direction, Mark.UP)
                    else:
                        yield LinkEvent(peer_id, direction, item)
        except (OSError, RemoteProtocolError) as exc:
            if peer_id is None:
                # A peer that only looks whether we are there closes at once.
                level = logging.DEBUG if isinstance(exc, OSError) else logging.WARNING
                logger.log(level, "%s: dropped a connection: %s", self._scheme, exc)
                self._drop(link)
            elif self.link(peer_id, direction) is link:
                self._lose(peer_id, direction, str(exc))

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # or the peer is gone already
        try:
            self._check_peer(sock)
        except OSError as exc:
            logger.warning("%s: refused a connection: %s", self._scheme, exc)
            sock.close()
            return
        ungreeted = [link for link, peer_id, _ in self._links.values() if peer_id is None]
        if len(ungreeted) >= MAX_UNGREETED:
            self._drop(ungreeted[0])
        link = Link(sock, max_frame_len=MAX_GREETING_LEN)
        self._register(link, None, Direction.SENDING)

    def _turn_away(self) -> None:
        """Accept and close a connection although descriptors have run out.

        Left alone, it would keep the listener readable and this thread busy.
        """
        logger.warning("%s: out of descriptors, turned a peer away", self._scheme)
        os.close(self._spare_fd)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _greet(self, link: Link, item: bytes | Mark) -> str:
        """Check the first frame of an accepted connection; return whose it is."""
        try:
            greeting = msgspec.msgpack.decode(
                item if isinstance(item, bytes) else b"", type=Greeting
            )
        except msgspec.DecodeError as exc:
            raise RemoteProtocolError(f"greeting: {exc}") from exc
        if not hmac.compare_digest(greeting.token, self._token):
            raise RemoteProtocolError("greeting with a wrong token")
        peer = self._peers.get(greeting.peer_id)
        if peer is None or Direction.SENDING in peer.links:
            raise RemoteProtocolError("greeting of an unknown or connected peer")
        peer.links[Direction.SENDING] = link
        self._links[link.fileno()] = (link, greeting.peer_id, Direction.SENDING)
        link.max_frame_len = MAX_FRAME_LEN
        return greeting.peer_id

    def _register(self, link: Link, peer_id: str | None, direction: Direction) -> None:
        self._links[link.fileno()] = (link, peer_id, direction)
        self._epoll.register(link.fileno(), select.EPOLLIN)

    def _lose(self, peer_id: str, direction: Direction, reason: str) -> None:
        self.drop_link(peer_id, direction)
        self._lost.append(LinkEvent(peer_id, direction, Mark.LOST, reason))

    def _drop(self, link: Link) -> None:
        if self._links.pop(link.fileno(), None) and not self._epoll.closed:
            self._epoll.unregister(link.fileno())
        link.close()
