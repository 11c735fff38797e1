"""Control sockets: one frame is one message, CURVE-encrypted where there is a key.

A ``ControlServer`` answers many peers; a ``ControlClient`` speaks to one and
learns at once when it is gone. Peers that do not get in, and frames that are too
long or no messages, are counted and dropped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from vllm_pd.config import ConnectorConfig, is_loopback
from vllm_pd.errors import ConfigError, PeerLostError, RemoteProtocolError
from vllm_pd.protocol.messages import MAX_FRAME_LEN, AnyMessage, decode, encode
from vllm_pd.session.keys import ClusterKey, load_cluster_key
from vllm_pd.transport.threads import name_thread

logger = logging.getLogger(__name__)

_HIGH_WATER_MARK = 10_000
_SERVER_HIGH_WATER_MARK = 1_000  # a flooding peer's frames beyond it stay in its own memory
_HEARTBEAT_MS = 5_000
_FRAMES_PER_TURN = 256  # then whoever polls the server attends to everything else
_EVENTS_PER_TURN = 1_000
_RECEIVED_LEN = 2 * MAX_FRAME_LEN
"""Longest frame in bytes that a server reads, only to count it as too long.

Of a longer one ZeroMQ reads the header and closes the connection. It tells nobody
why: what a monitor then sees is a peer that left.
"""
_LOST_EVENTS = {
    zmq.EVENT_DISCONNECTED: "disconnected",
    zmq.EVENT_CLOSED: "closed",
    zmq.EVENT_CONNECT_RETRIED: "nobody listens",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it refuses our key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it does not use the cluster key",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed",
}
_SERVER_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_WRONG_SERVER_KEY = 0x11000001
"""ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: the peer encrypts for another cluster."""


class ControlContext:
    """ZeroMQ context, key and authenticator of one connector half.

    Raises:
        ConfigError: the key file of ``config`` cannot be used.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        self._key: ClusterKey | None = None
        if config.cluster_key_file is not None:
            self._key = load_cluster_key(Path(config.cluster_key_file))
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        if self._key is not None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            name_thread(self._authenticator.thread, "auth")
            self._authenticator.configure_curve_callback(
                credentials_provider=_OnlyThisKey(self._key.public)
            )

    def may_connect(self, host: str) -> bool:
        """Return whether a host named by a request may be spoken to.

        Without a cluster key nobody proves who they are, so only this host is.
        """
        return self._key is not None or is_loopback(host)

    def server(self, host: str, port: int) -> ControlServer:
        """Bind a server; port 0 picks a free one.

        Raises:
            ConfigError: the address is in use or not ours, or there are no
                descriptors left.
        """
        sock: zmq.Socket[bytes] | None = None
        monitor: zmq.Socket[bytes] | None = None
        try:
            sock = self._socket(zmq.ROUTER, host)
            if self._key is not None:
                sock.curve_server = True
                sock.curve_publickey, sock.curve_secretkey = self._key.public, self._key.secret
            sock.maxmsgsize = _RECEIVED_LEN
            sock.rcvhwm = _SERVER_HIGH_WATER_MARK
            monitor = sock.get_monitor_socket(_SERVER_EVENTS)
            sock.bind(f"tcp://{_bracketed(host)}:{port or '*'}")
        except zmq.ZMQError as exc:
            if sock is not None:
                _close_monitored(sock, monitor, linger_s=0.0)
            raise ConfigError(f"side channel {host} port {port}: {exc.strerror}") from exc
        return ControlServer(sock, monitor, host)

    def client(self, host: str, port: int, *, identity: bytes | None = None) -> ControlClient:
        """Open a client; connecting goes on in the background.

        Args:
            host: where the server is.
            port: its port.
            identity: how the server sees us; None lets it choose.

        Raises:
            PeerLostError: that is no address, or there are no descriptors left.
        """
        try:
            sock = self._socket(zmq.DEALER, host)
        except zmq.ZMQError as exc:
            raise PeerLostError(f"{host} port {port}: {exc.strerror}") from exc
        try:
            if identity is not None:
                sock.routing_id = identity
            if self._key is not None:
                sock.curve_serverkey = self._key.public
                sock.curve_publickey, sock.curve_secretkey = self._key.public, self._key.secret
            return ControlClient(sock, f"tcp://{_bracketed(host)}:{port}")
        except zmq.ZMQError as exc:
            sock.close(linger=0)
            raise PeerLostError(f"{host} port {port}: {exc.strerror}") from exc

    def close(self) -> None:
        """Stop the authenticator and the context; sockets must be closed before."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.destroy(linger=0)

    def _socket(self, kind: int, host: str) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = self._context.socket(kind)
        sock.linger = 0
        sock.maxmsgsize = MAX_FRAME_LEN
        sock.set_hwm(_HIGH_WATER_MARK)
        sock.heartbeat_ivl = _HEARTBEAT_MS
        sock.ipv6 = ":" in host
        return sock


class _OnlyThisKey:
    """Lets clients in that hold the cluster key; called by the authenticator."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002
        return key == self._public


class ControlServer:
    """Receives messages from any peer and answers by peer identity.

    Both ``socket`` and ``monitor`` must be polled, and ``receive_some`` be called when
    either is readable: a monitor whose events nobody reads stops ZeroMQ's I/O thread
    after some thousand refused peers.

    Attributes:
        socket: readable when a message may be there.
        monitor: readable when a peer came, left or was refused.
        host: the address that the server listens on.
        port: its port.
        num_dropped: what was ignored, by reason. Of peers: ``wrong_key`` has another
            cluster key, ``handshake`` none, or does not speak the protocol. Of frames:
            ``oversized``, ``frame_count``, ``malformed``; ``unexpected``, which
            the caller counts; and answers that are ``unsent``, their peer being gone.
    """

    def __init__(self, sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes], host: str) -> None:
        self.socket = sock
        self.monitor = monitor
        self.host = host
        self.num_dropped: Counter[str] = Counter()
        self._newcomers = Newcomers()
        endpoint = sock.get_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rsplit(":", 1)[1])

    @property
    def num_denied(self) -> int:
        """Peers that did not get in."""
        return self.num_dropped["wrong_key"] + self.num_dropped["handshake"]

    def is_ready(self, ready: Container[object]) -> bool:
        """Return whether ``receive_some`` is to be called, given what a poller found readable."""
        return self.socket in ready or self.monitor in ready

    def receive_some(self) -> Iterator[tuple[bytes, AnyMessage]]:
        """Yield messages and their senders, as many as are served in one turn.

        What is left keeps ``socket`` or ``monitor`` readable for zmq's poller. Frames
        that are no message are dropped and counted, as are peers that were refused
        meanwhile.
        """
        self._check()
        for _ in range(_FRAMES_PER_TURN):
            if not _is_readable(self.socket):
                return
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            if message := self._decode(frames):
                yield frames[0], message

    def _decode(self, frames: list[bytes]) -> AnyMessage | None:
        if len(frames) != 2:
            self._drop("frame_count")
        elif len(frames[1]) > MAX_FRAME_LEN:
            self._drop("oversized")
        else:
            try:
                return decode(frames[1])
            except RemoteProtocolError as exc:
                logger.debug("dropped a frame: %s", exc)
                self._drop("malformed")
        return None

    def _check(self) -> None:
        """Count the peers that were refused since the last turn."""
        for _ in range(_EVENTS_PER_TURN):
            if not _is_readable(self.monitor):
                return
            event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            if reason := self._newcomers.refusal(zmq.Event(event["event"]), int(event["value"])):
                self._drop(reason)

    def send(self, identity: bytes, message: AnyMessage) -> None:
        """Answer a peer; one that is gone or too slow gets nothing."""
        try:
            self.socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            self._drop("unsent")
            logger.debug("answer not sent: %s", exc)

    def close(self) -> None:
        """Close the socket; idempotent."""
        _close_monitored(self.socket, self.monitor, linger_s=0.0)

    def _drop(self, reason: str) -> None:
        self.num_dropped[reason] += 1
        if self.num_dropped[reason] == 1:
            what = "refused a peer" if reason in ("wrong_key", "handshake") else "dropped a frame"
            logger.warning("control channel on port %d: %s (%s)", self.port, what, reason)


class Newcomers:
    """Tells from a server's events which connections never became peers.

    ZeroMQ reports most refusals. Of one that did not even send its greeting it
    reports only that the connection came and went, and it does not say which
    connection a success or a refusal is about. With several at the same time one
    may be taken for another, but each is counted once.
    """

    def __init__(self) -> None:
        self._open: set[int] = set()  # descriptors of which the outcome is not known
        self._num_greeted = 0  # of those
        self._num_refused = 0  # of those

    def refusal(self, event: zmq.Event, value: int) -> str | None:
        """Take one event; return why a connection was refused, if it was.

        Args:
            event: one that ``ControlServer`` listens to.
            value: what came with it: a descriptor or the detail of a failure.
        """
        reason = None
        match event:
            case zmq.Event.ACCEPTED:
                self._open.add(value)
            case zmq.Event.HANDSHAKE_SUCCEEDED:
                self._num_greeted += 1
            case zmq.Event.DISCONNECTED if value in self._open:
                reason = self._leave(value)
            case zmq.Event.DISCONNECTED:
                pass
            case _:
                self._num_refused += 1
                is_key = event is zmq.Event.HANDSHAKE_FAILED_AUTH or value == _WRONG_SERVER_KEY
                reason = "wrong_key" if is_key else "handshake"
        if self._num_greeted >= len(self._open):  # so all of them are peers
            self._open.clear()
            self._num_greeted = self._num_refused = 0
        return reason

    def _leave(self, descriptor: int) -> str | None:
        """Take note that a connection of unknown outcome is over."""
        self._open.remove(descriptor)
        if self._num_refused:
            self._num_refused -= 1
        elif self._num_greeted:
            self._num_greeted -= 1
        else:
            return "handshake"
        return None


class ControlClient:
    """Speaks to one server, without reconnecting: a lost peer stays lost."""

    def __init__(self, sock: zmq.Socket[bytes], address: str) -> None:
        self.socket = sock
        self.address = address
        events = 0
        for event in _LOST_EVENTS:
            events |= event
        self.monitor: zmq.Socket[bytes] = sock.get_monitor_socket(events)
        sock.connect(address)

    def send(self, message: AnyMessage) -> None:
        """Queue a message.

        Raises:
            PeerLostError: the queue is full, so nobody has read for long.
        """
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            raise PeerLostError(f"{self.address}: {exc.strerror}") from exc

    def is_ready(self, ready: Container[object]) -> bool:
        """Return whether there is something, given what a poller found readable."""
        return self.socket in ready or self.monitor in ready

    def receive(self) -> AnyMessage | None:
        """Return the next message; None when there is none.

        Raises:
            RemoteProtocolError: the server sent something that is not a message.
        """
        if not _is_readable(self.socket):
            return None
        return decode(self.socket.recv_multipart(zmq.NOBLOCK)[-1])

    def check(self) -> None:
        """Look whether the peer is still there.

        Raises:
            PeerLostError: it is gone, never was there, or does not accept us.
        """
        while _is_readable(self.monitor):
            event = zmq.Event(recv_monitor_message(self.monitor, zmq.NOBLOCK)["event"])
            if event in _LOST_EVENTS:
                raise PeerLostError(f"{self.address}: {_LOST_EVENTS[event]}")

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close the socket, after trying to deliver for ``linger_s``; idempotent."""
        _close_monitored(self.socket, self.monitor, linger_s=linger_s)


def _is_readable(sock: zmq.Socket[bytes]) -> bool:
    """Look for messages; far cheaper than a poll, or than to receive none."""
    return bool(int(sock.get(zmq.EVENTS)) & zmq.POLLIN)


def _close_monitored(
    sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes] | None, *, linger_s: float
) -> None:
    if not sock.closed:
        if monitor is not None:
            sock.disable_monitor()
            monitor.close(linger=0)
        sock.close(linger=int(linger_s * 1000))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
