"""TLS for data links: contexts from the cluster certificate, and a socket adapter.

Both ends show the cluster certificate and trust nothing else, so whoever holds
the cluster key may connect and nobody else. TlsSocket looks like the plain
non-blocking socket that a link expects.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from vllm_pd.errors import ConfigError, LocalProtocolError

_BATCH_LEN = 256 * 1024  # bytes per system call: few calls, and still in the cache
_CALL_LEN = 4 * 1024 * 1024  # bytes per sendmsg or recvmsg_into, so that callers get a turn
_MAX_RECORD_LEN = 16 * 1024  # no more can be decrypted at once

_NO_CERTIFICATE = {"PEER_DID_NOT_RETURN_A_CERTIFICATE"}
_NO_TLS = {
    "BAD_RECORD_TYPE",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "UNEXPECTED_MESSAGE",
    "UNSUPPORTED_PROTOCOL",
    "WRONG_VERSION_NUMBER",
}
_REFUSED = {
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    "TLSV1_ALERT_DECRYPT_ERROR",
    "TLSV1_ALERT_UNKNOWN_CA",
}


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """What accepting and connecting sockets are wrapped with."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def make_contexts(certificate: bytes, private_key: bytes) -> TlsContexts:
    """Make contexts for TLS 1.3 between holders of one certificate.

    Args:
        certificate: the cluster certificate, PEM.
        private_key: its private key, PEM without a password.

    Raises:
        ConfigError: they cannot be read, or do not belong together.
    """
    try:
        return TlsContexts(
            server=_make_context(ssl.PROTOCOL_TLS_SERVER, certificate, private_key),
            client=_make_context(ssl.PROTOCOL_TLS_CLIENT, certificate, private_key),
        )
    except (OSError, ValueError) as exc:  # SSLError is an OSError
        reason = getattr(exc, "reason", None) if isinstance(exc, ssl.SSLError) else None
        raise ConfigError(
            f"the cluster certificate cannot be used: {reason or exc}",
            hint="make a new cluster key: vllm-pd keygen",
        ) from exc


def _make_context(protocol: int, certificate: bytes, private_key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # every host has the same certificate
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate.decode("ascii"))
    # A password, so that an encrypted key is an error and not a question on the terminal.
    with _as_file(certificate + b"\n" + private_key) as path:
        context.load_cert_chain(path, password="")
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # sessions are not resumed
    return context


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Give a secret a path, as OpenSSL wants one: in memory where that can be done."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.memfd_create("vllm-pd-tls", os.MFD_CLOEXEC)
            file = stack.enter_context(os.fdopen(fd, "wb"))
            path = f"/proc/self/fd/{fd}"
            os.stat(path)  # is there a /proc?
        except (AttributeError, OSError):
            named = stack.enter_context(tempfile.NamedTemporaryFile(prefix="vllm-pd-"))  # 0600
            named.write(data)
            named.flush()
            yield named.name
        else:
            file.write(data)
            file.flush()
            yield path


class TlsSocket:
    """A stream socket with TLS, used like a non-blocking ``socket.socket``.

    The handshake happens inside the first calls that send or receive; until it
    is done they raise BlockingIOError. Other errors of TLS are ConnectionError.
    A client's handshake ends before the server has checked the client's
    certificate: a refusal shows up when the client receives.

    What differs from a plain socket for somebody who polls the descriptor:

    - Poll for reading, not for writing, to go on sending while
      ``wants_read_to_send``; poll for writing as well while
      ``wants_write_to_receive``, and then receive again. Both may change with
      every call that sends or receives.
    - Bytes may have been taken from the socket already, which polling does not
      show. Receive until BlockingIOError, or come back while ``pending()``,
      also after sending.
    - After a send that took fewer bytes than given, the next one must start with
      the first byte not taken: it may have been encrypted already.

    Closing does not tell the peer by TLS. A connection that ends early looks like one
    that was closed; the frames on it say how long they are.

    Every method is called by one thread and never blocks.

    Args:
        sock: connected, or connecting; the TlsSocket owns it.
        context: of ``TlsContexts``, the one for this side.
        server_side: whether this side accepted the connection.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        sock.settimeout(0.0)
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._established = False
        self._awaits_handshake = False
        self._buffer = memoryview(bytearray(_BATCH_LEN))
        self._is_drained = True  # nothing in _incoming or _tls but part of a record
        self._unsent = memoryview(b"")  # encrypted, from _outgoing
        self._num_owed = 0  # plain bytes in _unsent, for the next sendmsg to report
        self._failure: OSError | None = None  # found after bytes that were received first

    @property
    def wants_read_to_send(self) -> bool:
        """Whether sending waits for the peer's part of the handshake."""
        return self._awaits_handshake

    @property
    def wants_write_to_receive(self) -> bool:
        """Whether encrypted bytes, of the handshake for example, wait for the socket."""
        return bool(self._unsent or self._outgoing.pending)

    def pending(self) -> int:
        """Return 0, or a number of bytes that need no reading from the socket.

        They may turn out to be no more than a part of a record: the next call
        that receives finds out, and then this is 0.
        """
        if self._failure is not None:
            return 1
        return 0 if self._is_drained else self._tls.pending() + self._incoming.pending

    def fileno(self) -> int:
        """Return the descriptor; -1 once closed."""
        return self._sock.fileno()

    def settimeout(self, timeout: float) -> None:
        """Accept that the socket is non-blocking.

        Raises:
            ValueError: ``timeout`` is not 0.0.
        """
        if timeout != 0.0:
            raise ValueError(f"a TlsSocket never blocks: timeout {timeout}")

    def getsockopt(self, level: int, option: int) -> int:
        """See ``socket.socket``."""
        return self._sock.getsockopt(level, option)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._sock.close()
        self._unsent = memoryview(b"")

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """Send bytes of ``parts``, in their order; return how many the socket took.

        Without parts this only goes on with the handshake.

        Raises:
            BlockingIOError: it took none.
            OSError: the connection is lost.
            LocalProtocolError: these are not the parts that were not taken before.
        """
        self._push()
        self._do_handshake()
        num_sent, self._num_owed = self._num_owed, 0
        batch_len = 0
        for piece in _cut(parts, num_sent):
            self._encrypt(piece)
            batch_len += piece.nbytes
            if batch_len >= _BATCH_LEN:
                if not self._try_push() or num_sent + batch_len >= _CALL_LEN:
                    break
                num_sent += batch_len
                batch_len = 0
        if self._try_push():
            num_sent += batch_len
            batch_len = 0
        self._num_owed = batch_len
        if batch_len and not num_sent:
            raise BlockingIOError
        return num_sent

    def recv(self, num_bytes: int) -> bytes:
        """Receive at most ``num_bytes``; ``b""`` when the peer has closed.

        Raises:
            BlockingIOError: nothing has arrived.
            OSError: the connection is lost.
        """
        data = bytearray(min(num_bytes, _MAX_RECORD_LEN))
        with memoryview(data) as view:
            num_read = self.recvmsg_into([view])[0]
        return bytes(data[:num_read])

    def recvmsg_into(self, parts: Sequence[memoryview]) -> tuple[int, list[object], int, None]:
        """Receive into ``parts``, in their order; the first value is the number of bytes.

        It is 0 when the peer has closed. The others are there for the likeness to
        ``socket.socket``.

        Raises:
            BlockingIOError: nothing has arrived.
            OSError: the connection is lost.
        """
        if self._failure is not None:
            raise self._failure
        self._prepare_to_receive()
        num_read = 0
        try:
            for part in parts:
                offset = 0
                while offset < part.nbytes and num_read < _CALL_LEN:
                    length = self._decrypt(part[offset:] if offset else part)
                    if length == 0:
                        return num_read, [], 0, None
                    offset += length
                    num_read += length
        except BlockingIOError:
            if not num_read:
                raise
        except OSError as exc:
            if not num_read:
                raise
            self._failure = exc
        return num_read, [], 0, None

    def _prepare_to_receive(self) -> None:
        if not self._established:
            self._push()
            self._do_handshake()
        if self.wants_write_to_receive:
            # What has arrived is worth having even if nothing can be sent any more.
            with contextlib.suppress(OSError):
                self._push()

    def _do_handshake(self) -> None:
        while not self._established:
            try:
                self._tls.do_handshake()
                self._established = True
            except ssl.SSLWantReadError:
                self._is_drained = True
                self._push()
                self._awaits_handshake = True
                if not self._feed():
                    raise ConnectionResetError(
                        "closed by the peer during the TLS handshake"
                    ) from None
            except ssl.SSLError as exc:
                with contextlib.suppress(OSError):
                    self._push()  # tells the peer why
                raise _explain(exc) from exc
            self._awaits_handshake = False

    def _encrypt(self, piece: memoryview) -> None:
        try:
            self._tls.write(piece)  # to memory: takes all
        except ssl.SSLError as exc:
            raise _explain(exc) from exc

    def _decrypt(self, space: memoryview) -> int:
        """Return the number of bytes received, 0 at the end."""
        while True:
            try:
                # Given a buffer, it returns a length, whatever its declaration says.
                return cast(int, self._tls.read(space.nbytes, space))
            except ssl.SSLWantReadError:
                self._is_drained = True
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as exc:
                with contextlib.suppress(OSError):
                    self._push()
                raise _explain(exc) from exc
            if not self._feed():
                return 0

    def _feed(self) -> bool:
        """Read from the socket; return False when the peer has closed.

        Raises:
            OSError: as a plain socket would.
        """
        num_read = self._sock.recv_into(self._buffer)
        self._incoming.write(self._buffer[:num_read])
        self._is_drained &= num_read == 0
        return num_read > 0

    def _push(self) -> None:
        """Write what has been encrypted.

        Raises:
            BlockingIOError: the socket did not take all.
            OSError: as a plain socket would.
        """
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def _try_push(self) -> bool:
        """Write what has been encrypted; return whether the socket took all."""
        try:
            self._push()
        except BlockingIOError:
            return False
        return True


def _cut(parts: Sequence[memoryview], num_skipped: int) -> Iterator[memoryview]:
    """Yield the parts behind the first ``num_skipped`` bytes, in pieces of bounded length."""
    for part in parts:
        start = min(num_skipped, part.nbytes)
        num_skipped -= start
        for first in range(start, part.nbytes, _BATCH_LEN):
            yield part[first : first + _BATCH_LEN]
    if num_skipped:
        raise LocalProtocolError("bytes that were to be sent are not offered again")


def _explain(exc: ssl.SSLError) -> ConnectionError:
    """Say in words of the cluster what is wrong with a connection."""
    reason = exc.reason or str(exc)
    if isinstance(exc, ssl.SSLCertVerificationError):
        what = f"the peer has another cluster certificate ({exc.verify_message})"
    elif reason in _NO_CERTIFICATE:
        what = "the peer shows no certificate"
    elif reason in _REFUSED:
        what = f"the peer refuses our cluster certificate ({reason})"
    elif reason in _NO_TLS:
        what = f"the peer sent something that is not TLS 1.3 ({reason})"
    else:
        what = reason
    return ConnectionError(f"TLS failed: {what}")
