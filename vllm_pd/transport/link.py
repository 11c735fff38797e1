"""One data link: a non-blocking stream socket that carries frames and KV blocks.

Frames are length-prefixed; raw payload follows a frame where both sides know it
does, straight from or into registered memory.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vllm_pd.errors import LocalProtocolError, RemoteProtocolError
from vllm_pd.transport.scatter import Scatter, ScatterQueue
from vllm_pd.transport.tls import TlsSocket

MAX_FDS = 253
"""Most descriptors that the kernel lets travel with one message."""

_TLS_LEN = 512 * 1024  # about as much as TLS encrypts or decrypts in one call
_READ_BUDGET = 64 * 1024 * 1024  # bytes per poll and link, so that no peer starves the others
_HEADER = struct.Struct("!I")


class Mark(enum.Enum):
    """What can happen on a link besides the arrival of a frame."""

    UP = enum.auto()  # the peer has connected and shown who it is
    PAYLOAD_END = enum.auto()  # the expected payload has arrived
    LOST = enum.auto()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame and the payload that follows it.

    Attributes:
        frame: the frame.
        payload: memory to send after it, read when it is sent.
        on_sent: called when the payload is not read any more: the socket has taken it,
            or the link is closed.
    """

    frame: bytes
    payload: Scatter | None = None
    on_sent: Callable[[], None] | None = None


class Link:
    """One connected stream socket.

    Every method is called by one thread and never blocks. OSError means that
    the link is lost.

    Args:
        sock: the socket; the link owns it.
        max_frame_len: longest frame to accept, in bytes.
        takes_fds: whether the first frame may come with descriptors.
    """

    def __init__(
        self, sock: socket.socket | TlsSocket, *, max_frame_len: int, takes_fds: bool = False
    ) -> None:
        sock.settimeout(0.0)
        self._sock = sock
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self._takes_fds = takes_fds
        self.max_frame_len = max_frame_len
        self.paused = False
        self.received_fds: list[int] = []
        self.feed: Callable[[], Outgoing | None] | None = None
        self._out = ScatterQueue()
        self._on_sent: Callable[[], None] | None = None
        self._in = bytearray()
        self._wanted = _HEADER.size
        self._in_header = True
        self._payload = ScatterQueue()
        self._payload_ended = False

    @property
    def raw(self) -> socket.socket | TlsSocket:
        """The socket, to ask who is at its other end."""
        return self._sock

    def fileno(self) -> int:
        """Return the socket's descriptor; -1 once closed."""
        return self._sock.fileno()

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS may have to receive in order to send, and the reverse."""
        return self._tls is not None

    @property
    def waits_to_write(self) -> bool:
        """Whether to call ``flush`` when the socket is writable."""
        if self._tls is None:
            return bool(self._out)
        wants = bool(self._out) and not self._tls.wants_read_to_send
        return wants or self._tls.wants_write_to_receive

    @property
    def has_pending(self) -> bool:
        """Whether bytes wait here that polling the socket does not show."""
        return self._tls is not None and self._tls.pending() > 0

    def send_frame(self, frame: bytes) -> None:
        """Queue a frame."""
        self._queue_frame(frame)
        self.flush()

    def _queue_frame(self, frame: bytes) -> None:
        data = _HEADER.pack(len(frame)) + frame
        if isinstance(self._sock, socket.socket) and not self._out:
            with contextlib.suppress(BlockingIOError):  # mostly all of it goes at once
                data = data[self._sock.send(data) :]
        if data:
            self._out.append(Scatter.of(data))

    def send_frame_with_fds(self, frame: bytes, fds: Sequence[int]) -> None:
        """Send the first frame of a Unix link together with descriptors."""
        if self._out or not isinstance(self._sock, socket.socket):
            raise LocalProtocolError("descriptors must travel with the first frame")
        data = _HEADER.pack(len(frame)) + frame
        sent = socket.send_fds(self._sock, [data], list(fds)) if fds else 0
        if sent < len(data):
            self._out.append(Scatter.of(data[sent:]))
            self.flush()

    def flush(self) -> None:
        """Send as much as the socket takes now, first what is queued, then from the feed."""
        while self._out or self._take_from_feed():
            try:
                if self._tls is None:
                    self._out.send(self._sock.fileno())
                else:
                    self._out.consume(self._tls.sendmsg(self._out.first(_TLS_LEN)))
            except (BlockingIOError, InterruptedError):
                return
            if not self._out:
                self._end_payload()

    def _end_payload(self) -> None:
        """Tell the feed that the memory it gave is not read any more."""
        on_sent, self._on_sent = self._on_sent, None
        if on_sent is not None:
            on_sent()

    def _take_from_feed(self) -> bool:
        outgoing = self.feed() if self.feed is not None else None
        if outgoing is None:
            return False
        self._on_sent = outgoing.on_sent
        self._queue_frame(outgoing.frame)
        if outgoing.payload is not None:
            self._out.append(outgoing.payload)
        return True

    def expect_payload(self, payload: Scatter) -> None:
        """Receive the bytes that follow the current frame into ``payload``."""
        self._payload.append(payload)

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
                self._takes_fds = False  # they travel with the first frame, and cost every call
                yield frame
            elif self._payload_ended:
                self._payload_ended = False
                yield Mark.PAYLOAD_END

    def _read_payload(self) -> int:
        if self._tls is None:
            num_read = self._payload.receive(self._sock.fileno())
        else:
            num_read = self._tls.recvmsg_into(self._payload.first(_TLS_LEN))[0]
            self._payload.consume(num_read)
        self._payload_ended = not self._payload
        return num_read

    def _read_frame_part(self) -> int:
        num_wanted = min(self._wanted - len(self._in), 1 << 20)
        if self._takes_fds and isinstance(self._sock, socket.socket):
            data, fds, _, _ = socket.recv_fds(
                self._sock, num_wanted, MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
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
        self.feed = None
        self.close_received_fds()
        self._sock.close()
        self._end_payload()
