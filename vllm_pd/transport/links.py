"""The data links of one transport: who may connect, and what happens on them.

A LinkPool owns the listening socket, an epoll instance and the links to all
peers. The consumer connects, once or several times; the first frame of each
connection says who it is and shows the secret that the producer gave it in the
handshake.
"""

from __future__ import annotations

import enum
import hmac
import logging
import secrets
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from vllm_pd.errors import LocalProtocolError, RemoteProtocolError
from vllm_pd.transport.link import Link, Mark, Outgoing
from vllm_pd.transport.listener import Listener
from vllm_pd.transport.tls import TlsSocket
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

MAX_FRAME_LEN = 64 * 1024 * 1024
MAX_GREETING_LEN = 256
MAX_UNGREETED = 64
MAX_STREAMS = 64


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
    """First frame of a connection, from the consumer.

    Attributes:
        peer_id: of the session that both sides know.
        token: the producer's secret.
        stream: which of the consumer's connections this is.
        num_streams: how many there will be.
    """

    peer_id: str
    token: bytes
    stream: int = 0
    num_streams: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.stream < self.num_streams <= MAX_STREAMS:
            raise ValueError(f"stream {self.stream} of {self.num_streams}")


class Direction(enum.Enum):
    """Which half of transfers a link carries, seen from this worker."""

    SENDING = enum.auto()  # the peer connected to us
    RECEIVING = enum.auto()  # we connected to the peer


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A frame arrived from a peer, or something else happened on a link to it."""

    peer_id: str
    direction: Direction
    item: bytes | Mark
    stream: int = 0
    reason: str = ""


@dataclass(slots=True)
class _Peer:
    endpoint: Endpoint
    num_streams: dict[Direction, int]
    links: dict[tuple[Direction, int], Link] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    """A link and whose it is; None until it has greeted."""

    link: Link
    peer_id: str | None
    direction: Direction
    stream: int = 0
    events: int = select.EPOLLIN  # what epoll watches for


class LinkPool:
    """All links of one transport, behind one pollable descriptor.

    Args:
        scheme: name of the transport.
        listener: bound and listening socket; the pool owns it.
        connect: opens a non-blocking socket to an endpoint.
        check_peer: raises OSError when a fresh socket's other end is not trusted.
        secure: turns a socket into an encrypted one; the second argument tells
            whether it was accepted.
        num_streams: connections to make to each peer.
        takes_fds: whether links carry descriptors (Unix sockets).
    """

    def __init__(  # noqa: PLR0913 - each is another decision of a transport
        self,
        scheme: str,
        listener: socket.socket,
        connect: Callable[[Endpoint], socket.socket],
        *,
        check_peer: Callable[[socket.socket], None] = lambda _: None,
        secure: Callable[[socket.socket, bool], TlsSocket] | None = None,
        num_streams: int = 1,
        takes_fds: bool = False,
    ) -> None:
        self._scheme = scheme
        self._connect = connect
        self._check_peer = check_peer
        self._secure = secure
        self._num_streams = num_streams
        self._takes_fds = takes_fds
        self._token = secrets.token_bytes(32)
        self._peers: dict[str, _Peer] = {}
        self._entries: dict[int, _Entry] = {}
        self._eager: set[int] = set()  # descriptors of links with bytes that epoll does not show
        self._again = Wakeup()  # shows that there are some, or that links were lost
        self._lost: list[LinkEvent] = []
        self._epoll = select.epoll()
        self._listener = Listener(listener, self._epoll, scheme)
        self._epoll.register(self._again.fileno(), select.EPOLLIN)

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
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise RemoteProtocolError(f"endpoint of the {self._scheme} transport: {exc}") from exc
        if parsed.scheme != self._scheme:
            raise RemoteProtocolError(f"{parsed.scheme!r} endpoint given to {self._scheme!r}")
        return parsed

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:
        """Let a peer connect, and be connected to."""
        if peer_id in self._peers:
            raise LocalProtocolError(f"peer {peer_id} is there already")
        streams = {Direction.SENDING: 1, Direction.RECEIVING: self._num_streams}
        self._peers[peer_id] = _Peer(self.parse_endpoint(endpoint), streams)

    def has_peer(self, peer_id: str) -> bool:
        """Return whether ``add_peer`` was called and ``remove_peer`` was not."""
        return peer_id in self._peers

    def remove_peer(self, peer_id: str) -> None:
        """Close the links to a peer. Unknown ids are ignored."""
        if peer := self._peers.pop(peer_id, None):
            for link in peer.links.values():
                self._drop(link)

    def drop_links(self, peer_id: str, direction: Direction) -> None:
        """Close the links of one direction; the peer stays known."""
        for link in self.links(peer_id, direction):
            self._drop(link)
        if peer := self._peers.get(peer_id):
            peer.links = {key: link for key, link in peer.links.items() if key[0] is not direction}

    def link(self, peer_id: str, direction: Direction, stream: int = 0) -> Link | None:
        """Return a link if it is there."""
        peer = self._peers.get(peer_id)
        return peer.links.get((direction, stream)) if peer else None

    def links(self, peer_id: str, direction: Direction) -> list[Link]:
        """Return the links of one direction that are there."""
        peer = self._peers.get(peer_id)
        return [link for key, link in peer.links.items() if key[0] is direction] if peer else []

    def is_up(self, peer_id: str, direction: Direction) -> bool:
        """Return whether all links of one direction are there."""
        peer = self._peers.get(peer_id)
        return peer is not None and (
            len(self.links(peer_id, direction)) == peer.num_streams[direction]
        )

    def open_links(self, peer_id: str) -> None:
        """Connect to a peer unless that is done; failure shows up as a lost link."""
        if self.links(peer_id, Direction.RECEIVING):
            return
        peer = self._peers[peer_id]
        for stream in range(self._num_streams):
            try:
                sock = self._connect(peer.endpoint)
            except OSError as exc:
                self._lose(peer_id, Direction.RECEIVING, str(exc))
                return
            self._open_link(peer_id, peer, stream, sock)

    def _open_link(self, peer_id: str, peer: _Peer, stream: int, sock: socket.socket) -> None:
        secured = self._secure(sock, False) if self._secure else sock  # noqa: FBT003
        link = Link(secured, max_frame_len=MAX_FRAME_LEN, takes_fds=self._takes_fds)
        peer.links[Direction.RECEIVING, stream] = link
        self._register(_Entry(link, peer_id, Direction.RECEIVING, stream))
        greeting = Greeting(
            peer_id=peer_id,
            token=peer.endpoint.token,
            stream=stream,
            num_streams=self._num_streams,
        )
        self.send(peer_id, Direction.RECEIVING, msgspec.msgpack.encode(greeting), stream=stream)

    def send(
        self,
        peer_id: str,
        direction: Direction,
        frame: bytes,
        *,
        stream: int = 0,
        fds: Sequence[int] = (),
    ) -> None:
        """Queue a frame on a link that is there; failure shows up as a lost link."""
        link = self.link(peer_id, direction, stream)
        if link is None:
            return
        try:
            if fds:
                link.send_frame_with_fds(frame, fds)
            else:
                link.send_frame(frame)
        except OSError as exc:
            self._lose(peer_id, direction, str(exc))
        else:
            self.update(link)

    def feed(self, peer_id: str, direction: Direction, feed: Callable[[], Outgoing | None]) -> None:
        """Let links take what they send from a function, whenever they have nothing else."""
        for link in self.links(peer_id, direction):
            link.feed = feed

    def kick(self, peer_id: str, direction: Direction) -> None:
        """Tell links that the feed has something; failure shows up as a lost link."""
        for link in self.links(peer_id, direction):
            try:
                link.flush()
            except OSError as exc:
                self._lose(peer_id, direction, str(exc))
                return
            self.update(link)

    def update(self, link: Link) -> None:
        """Tell epoll what a link waits for, after sending, pausing or resuming."""
        fd = link.fileno()
        if entry := self._entries.get(fd):
            events = 0 if link.paused else select.EPOLLIN
            events |= select.EPOLLOUT if link.waits_to_write else 0
            if events != entry.events:
                self._epoll.modify(fd, events)
                entry.events = events
            if link.has_pending and not link.paused:
                self._eager.add(fd)
                self._again.set()

    def fileno(self) -> int:
        """Return a descriptor that is readable while ``poll`` has something to do."""
        return self._epoll.fileno()

    def poll(self) -> Iterator[LinkEvent]:
        """Make progress on all links without blocking; yield what arrived.

        The caller may send, pause and remove while it iterates.
        """
        yield from self._take_lost()
        ready = {} if self._epoll.closed else dict(self._epoll.poll(0))
        if self._eager:
            self._again.clear()
            for fd in self._eager:
                ready.setdefault(fd, select.EPOLLIN)
            self._eager = set()
        for fd, events in ready.items():
            if self._listener.owns(fd):
                self._accept()
            elif fd in self._entries:
                yield from self._serve(self._entries[fd], events)
        yield from self._take_lost()

    def close(self) -> None:
        """Close everything; idempotent."""
        for entry in list(self._entries.values()):
            self._drop(entry.link)
        self._peers.clear()
        if not self._epoll.closed:
            self._epoll.close()
        self._again.close()
        self._listener.close()

    def _take_lost(self) -> list[LinkEvent]:
        lost, self._lost = self._lost, []
        if lost and not self._eager:
            self._again.clear()
        return lost

    def _serve(self, entry: _Entry, events: int) -> Iterator[LinkEvent]:
        link = entry.link
        try:
            if link.paused and events & (select.EPOLLHUP | select.EPOLLERR):
                raise ConnectionResetError("closed by the peer")
            if events != select.EPOLLOUT or link.is_encrypted:
                for item in link.receive():
                    if entry.peer_id is not None:
                        yield LinkEvent(entry.peer_id, entry.direction, item, entry.stream)
                    elif peer_id := self._greet(entry, item):
                        yield LinkEvent(peer_id, entry.direction, Mark.UP)
            # After receiving: TLS may have waited for bytes before it could send.
            link.flush()
            self.update(link)
        except (OSError, RemoteProtocolError) as exc:
            if entry.peer_id is None:
                # A peer that only looks whether we are there closes at once.
                level = logging.DEBUG if isinstance(exc, OSError) else logging.WARNING
                logger.log(level, "%s: dropped a connection: %s", self._scheme, exc)
                self._drop(link)
            elif self.link(entry.peer_id, entry.direction, entry.stream) is link:
                self._lose(entry.peer_id, entry.direction, str(exc))

    def _accept(self) -> None:
        sock = self._listener.accept()
        if sock is None:
            return
        try:
            self._check_peer(sock)
        except OSError as exc:
            logger.warning("%s: refused a connection: %s", self._scheme, exc)
            sock.close()
            return
        ungreeted = [entry.link for entry in self._entries.values() if entry.peer_id is None]
        if len(ungreeted) >= MAX_UNGREETED:
            self._drop(ungreeted[0])
        secured = self._secure(sock, True) if self._secure else sock  # noqa: FBT003
        link = Link(secured, max_frame_len=MAX_GREETING_LEN)
        self._register(_Entry(link, None, Direction.SENDING))

    def _greet(self, entry: _Entry, item: bytes | Mark) -> str | None:
        """Check the first frame of a connection; return the peer if all of its are there."""
        try:
            greeting = msgspec.msgpack.decode(
                item if isinstance(item, bytes) else b"", type=Greeting
            )
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise RemoteProtocolError(f"greeting: {exc}") from exc
        if not hmac.compare_digest(greeting.token, self._token):
            raise RemoteProtocolError("greeting with a wrong token")
        peer = self._peers.get(greeting.peer_id)
        if peer is None or (Direction.SENDING, greeting.stream) in peer.links:
            raise RemoteProtocolError("greeting of an unknown or connected peer")
        others = self.links(greeting.peer_id, Direction.SENDING)
        if others and greeting.num_streams != peer.num_streams[Direction.SENDING]:
            raise RemoteProtocolError("greeting with another number of streams than before")
        peer.links[Direction.SENDING, greeting.stream] = entry.link
        peer.num_streams[Direction.SENDING] = greeting.num_streams
        entry.peer_id, entry.stream = greeting.peer_id, greeting.stream
        entry.link.max_frame_len = MAX_FRAME_LEN
        return entry.peer_id if self.is_up(entry.peer_id, Direction.SENDING) else None

    def _register(self, entry: _Entry) -> None:
        self._entries[entry.link.fileno()] = entry
        self._epoll.register(entry.link.fileno(), select.EPOLLIN)

    def _lose(self, peer_id: str, direction: Direction, reason: str) -> None:
        self.drop_links(peer_id, direction)
        self._lost.append(LinkEvent(peer_id, direction, Mark.LOST, reason=reason))
        self._again.set()

    def _drop(self, link: Link) -> None:
        self._eager.discard(link.fileno())
        if self._entries.pop(link.fileno(), None) and not self._epoll.closed:
            self._epoll.unregister(link.fileno())
        link.close()
        self._listener.resume()
