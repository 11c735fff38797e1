"""TLS on data links: who is let in, and how near a TlsSocket is to a plain one."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from vllm_pd.errors import ConfigError, LocalProtocolError
from vllm_pd.session.keys import load_cluster_key, write_cluster_key
from vllm_pd.transport.tls import TlsContexts, TlsSocket, make_contexts

Pair = tuple[TlsSocket, TlsSocket]
TIMEOUT_S = 10


def make_pems(folder: Path) -> tuple[bytes, bytes]:
    path = folder / "key"
    write_cluster_key(path)
    key = load_cluster_key(path)
    assert key.certificate is not None
    assert key.private_key is not None
    return key.certificate, key.private_key


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return make_pems(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def foreign_pems(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return make_pems(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def contexts(pems: tuple[bytes, bytes]) -> TlsContexts:
    return make_contexts(*pems)


@pytest.fixture(scope="module")
def foreign_contexts(foreign_pems: tuple[bytes, bytes]) -> TlsContexts:
    return make_contexts(*foreign_pems)


@pytest.fixture
def raw_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return the accepted and the connecting end of a loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=TIMEOUT_S)
        server, _ = listener.accept()
    with server, client:
        for sock in (server, client):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # fills up soon
        yield server, client


@pytest.fixture
def pair(raw_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts) -> Pair:
    return wrap(raw_pair, contexts)


@pytest.fixture
def raw_instant_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return a pair where all that was sent is there at once."""
    server, client = socket.socketpair()
    with server, client:
        yield server, client


@pytest.fixture
def instant_pair(
    raw_instant_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts
) -> Pair:
    pair = wrap(raw_instant_pair, contexts)
    establish(pair)
    return pair


def wrap(raw_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts) -> Pair:
    server, client = raw_pair
    return (
        TlsSocket(server, contexts.server, server_side=True),
        TlsSocket(client, contexts.client, server_side=False),
    )


def wait(*waiting: tuple[TlsSocket, bool]) -> None:
    """Wait for sockets as a link's owner does; the flag says whether one wants to send."""
    readers = [sock for sock, _ in waiting]
    writers = [
        sock
        for sock, is_sending in waiting
        if sock.wants_write_to_receive or (is_sending and not sock.wants_read_to_send)
    ]
    assert any(select.select(readers, writers, [], TIMEOUT_S)), "nothing happens any more"


def receive(sock: TlsSocket, num_bytes: int = 1 << 16) -> bytes:
    """Wait for the next bytes, or for the error."""
    while True:
        try:
            return sock.recv(num_bytes)
        except BlockingIOError:
            wait((sock, False))


def transfer(sender: TlsSocket, receiver: TlsSocket, data: bytes, size: int = 1 << 16) -> bytes:
    """Send in parts of ``size`` bytes; receive as many bytes, into parts of another size."""
    received = bytearray(len(data))
    num_sent = num_received = 0
    while num_received < len(data):
        parts = cut(memoryview(data)[num_sent:], size)
        num_sent += (num_new := attempt(sender.sendmsg, parts) if parts else 0)
        spaces = cut(memoryview(received)[num_received:], size + 7)
        num_received += (num_read := attempt(lambda parts: receiver.recvmsg_into(parts)[0], spaces))
        if not num_new and not num_read:
            wait((sender, num_sent < len(data)), (receiver, False))
    return bytes(received)


def cut(view: memoryview, size: int) -> list[memoryview]:
    return [view[start : start + size] for start in range(0, len(view), size)][:512]


def attempt(action: Callable[[list[memoryview]], int], parts: list[memoryview]) -> int:
    try:
        return action(parts)
    except BlockingIOError:
        return 0


def establish(pair: Pair) -> None:
    """Finish the handshake on both ends."""
    server, client = pair
    assert transfer(client, server, b"hello") == b"hello"


def failures(server: TlsSocket, client: TlsSocket) -> tuple[OSError, OSError]:
    """Run a handshake that both ends are to refuse; return how they do."""
    found: dict[TlsSocket, OSError] = {}
    while len(found) < 2:
        for sock in (client, server):
            try:
                if sock not in found and sock.recv(1) == b"":
                    found[sock] = ConnectionResetError("closed")
            except BlockingIOError:
                continue
            except OSError as exc:
                found[sock] = exc
        if waiting := [(sock, False) for sock in (client, server) if sock not in found]:
            wait(*waiting)
    return found[server], found[client]


# The contexts.


def test_other_certificates_than_the_clusters_are_not_trusted(contexts: TlsContexts) -> None:
    for context in (contexts.server, contexts.client):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert len(context.get_ca_certs()) == 1
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3


def test_unreadable_certificate_is_refused(pems: tuple[bytes, bytes]) -> None:
    for certificate in (b"", b"garbage", b"\xff", pems[1]):
        with pytest.raises(ConfigError, match=r"certificate cannot be used.*keygen"):
            make_contexts(certificate, pems[1])


def test_private_key_of_another_certificate_is_refused(
    pems: tuple[bytes, bytes], foreign_pems: tuple[bytes, bytes]
) -> None:
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        make_contexts(pems[0], foreign_pems[1])


def test_private_key_with_a_password_is_refused_without_a_question(
    pems: tuple[bytes, bytes],
) -> None:
    key = serialization.load_pem_private_key(pems[1], password=None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(ConfigError, match="cannot be used"):
        make_contexts(pems[0], encrypted)


def test_contexts_are_made_without_memfd_and_leave_no_file(
    pems: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len(make_contexts(*pems).client.get_ca_certs()) == 1
    assert list(tmp_path.iterdir()) == []


# Bytes in both directions.


def test_bytes_travel_in_both_directions(pair: Pair) -> None:
    server, client = pair
    assert transfer(client, server, b"request") == b"request"
    assert transfer(server, client, b"response") == b"response"


def test_server_may_be_the_first_to_send(pair: Pair) -> None:
    server, client = pair
    with pytest.raises(BlockingIOError):
        client.recv(1)  # this starts the handshake
    assert transfer(server, client, b"welcome") == b"welcome"


@pytest.mark.parametrize("size", [1, 4_099, 262_145, 3_000_001])
def test_payload_in_odd_parts_arrives_unchanged(pair: Pair, size: int) -> None:
    data = os.urandom(min(size * 512, 5_000_011))
    server, client = pair
    assert transfer(client, server, data, size) == data
    assert transfer(server, client, data, size) == data


def test_empty_parts_are_passed_over(instant_pair: Pair) -> None:
    server, client = instant_pair
    assert client.sendmsg([memoryview(b""), memoryview(b"a"), memoryview(b"")]) == 1
    space = bytearray(1)
    parts = [memoryview(b""), memoryview(space)]
    assert server.recvmsg_into(parts) == (1, [], 0, None)
    assert space == b"a"


def test_what_is_sent_is_not_readable_on_the_wire(
    raw_instant_pair: tuple[socket.socket, socket.socket], instant_pair: Pair
) -> None:
    _, client = instant_pair
    secret = b"key and value " * 8
    client.sendmsg([memoryview(secret)])
    seen = raw_instant_pair[0].recv(4096, socket.MSG_PEEK)
    assert len(seen) > len(secret)
    assert secret[:14] not in seen


def test_sender_stops_while_the_peer_does_not_read(instant_pair: Pair) -> None:
    server, client = instant_pair
    data = os.urandom(3 << 20)
    num_sent = 0
    while num_new := attempt(client.sendmsg, [memoryview(data)[num_sent:]]):
        num_sent += num_new
    assert num_sent < len(data)
    assert client.wants_write_to_receive
    received = b""
    while len(received) < len(data):
        with contextlib.suppress(BlockingIOError):
            received += server.recv(1 << 20)
        num_sent += attempt(client.sendmsg, [memoryview(data)[num_sent:]])
    assert received == data


def test_bytes_that_were_not_taken_must_be_offered_again(instant_pair: Pair) -> None:
    server, client = instant_pair
    data = memoryview(bytes(3 << 20))
    while attempt(client.sendmsg, [data]):
        pass
    while client.wants_write_to_receive:
        receive(server)
        with contextlib.suppress(BlockingIOError):
            client.recv(1)
    with pytest.raises(LocalProtocolError, match="not offered again"):
        client.sendmsg([data[:1]])


# What polling does not show.


def test_sending_waits_for_reading_during_the_handshake(pair: Pair) -> None:
    server, client = pair
    with pytest.raises(BlockingIOError):
        client.sendmsg([memoryview(b"a")])
    assert client.wants_read_to_send
    assert not client.wants_write_to_receive
    assert transfer(client, server, b"a") == b"a"
    assert not client.wants_read_to_send


def test_sending_nothing_goes_on_with_the_handshake(
    raw_instant_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts
) -> None:
    server, client = wrap(raw_instant_pair, contexts)
    for sock in (client, server):
        with pytest.raises(BlockingIOError):
            sock.sendmsg([])
    assert client.sendmsg([]) == 0
    assert server.sendmsg([]) == 0
    assert not client.wants_read_to_send


def test_receiving_waits_for_writing_while_the_socket_is_full(
    raw_instant_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts
) -> None:
    far, near = raw_instant_pair
    client = TlsSocket(near, contexts.client, server_side=False)
    with contextlib.suppress(BlockingIOError):
        while near.send(bytes(1 << 16)):
            pass
    with pytest.raises(BlockingIOError):
        client.recv(1)
    assert client.wants_write_to_receive
    assert not client.wants_read_to_send
    far.recv(1 << 24)
    with pytest.raises(BlockingIOError):
        client.recv(1)
    assert not client.wants_write_to_receive


def test_bytes_that_polling_does_not_show_are_pending(instant_pair: Pair) -> None:
    server, client = instant_pair
    client.sendmsg([memoryview(b"abc")])
    assert receive(server, 1) == b"a"
    assert server.pending() > 0
    assert not select.select([server], [], [], 0)[0]
    assert server.recv(9) == b"bc"
    with pytest.raises(BlockingIOError):
        server.recv(9)
    assert server.pending() == 0


def test_part_of_a_record_is_not_pending(
    raw_instant_pair: tuple[socket.socket, socket.socket], instant_pair: Pair
) -> None:
    server, _ = instant_pair
    raw_instant_pair[1].send(b"\x17\x03\x03\x00")
    with pytest.raises(BlockingIOError):
        server.recv(1)
    assert server.pending() == 0


# Who is refused.


def test_another_cluster_is_refused_on_both_ends(
    raw_pair: tuple[socket.socket, socket.socket],
    contexts: TlsContexts,
    foreign_contexts: TlsContexts,
) -> None:
    server = TlsSocket(raw_pair[0], contexts.server, server_side=True)
    client = TlsSocket(raw_pair[1], foreign_contexts.client, server_side=False)
    at_server, at_client = failures(server, client)
    assert "the peer has another cluster certificate" in str(at_client)
    assert "the peer refuses our cluster certificate" in str(at_server)


def careless_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_client_that_trusts_everybody_is_still_refused(
    raw_pair: tuple[socket.socket, socket.socket],
    contexts: TlsContexts,
    foreign_pems: tuple[bytes, bytes],
    tmp_path: Path,
) -> None:
    context = careless_context()
    pem = tmp_path / "pem"
    pem.write_bytes(b"".join(foreign_pems))
    context.load_cert_chain(pem)
    server = TlsSocket(raw_pair[0], contexts.server, server_side=True)
    client = TlsSocket(raw_pair[1], context, server_side=False)
    at_server, at_client = failures(server, client)
    assert "the peer has another cluster certificate" in str(at_server)
    assert "the peer refuses our cluster certificate" in str(at_client)


def test_client_without_a_certificate_is_refused(
    raw_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts
) -> None:
    server = TlsSocket(raw_pair[0], contexts.server, server_side=True)
    client = TlsSocket(raw_pair[1], careless_context(), server_side=False)
    at_server, at_client = failures(server, client)
    assert "the peer shows no certificate" in str(at_server)
    assert "CERTIFICATE_REQUIRED" in str(at_client)


def test_older_tls_is_refused(
    raw_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts
) -> None:
    context = careless_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    server = TlsSocket(raw_pair[0], contexts.server, server_side=True)
    client = TlsSocket(raw_pair[1], context, server_side=False)
    at_server, at_client = failures(server, client)
    assert "not TLS 1.3" in str(at_server)
    assert "PROTOCOL_VERSION" in str(at_client)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\x00\x00\x00\x20greeting"]
)
@pytest.mark.parametrize("is_server", [True, False])
def test_plaintext_peer_is_refused(
    raw_pair: tuple[socket.socket, socket.socket],
    contexts: TlsContexts,
    data: bytes,
    is_server: bool,
) -> None:
    near, far = raw_pair if is_server else raw_pair[::-1]
    context = contexts.server if is_server else contexts.client
    sock = TlsSocket(near, context, server_side=is_server)
    far.sendall(data)
    with pytest.raises(ConnectionError, match=r"not TLS 1\.3"):
        receive(sock)


def test_record_that_was_changed_on_the_wire_ends_the_connection(
    raw_instant_pair: tuple[socket.socket, socket.socket], instant_pair: Pair
) -> None:
    server, client = instant_pair
    client.sendmsg([memoryview(b"good")])
    raw_instant_pair[1].send(struct.pack("!BHH", 23, 0x0303, 32) + bytes(32))
    space = bytearray(8)
    assert server.recvmsg_into([memoryview(space)])[0] == 4
    assert server.pending() > 0
    with pytest.raises(ConnectionError, match="BAD_RECORD_MAC"):
        server.recv(8)


# A peer that goes away.


def test_what_arrived_before_the_peer_closed_is_received(pair: Pair) -> None:
    server, client = pair
    establish(pair)
    client.sendmsg([memoryview(bytes(100_000))])
    client.close()
    num_received = 0
    while data := receive(server):
        num_received += len(data)
    assert num_received == 100_000
    assert server.recv(1) == b""
    assert server.recvmsg_into([memoryview(bytearray(1))])[0] == 0


def test_peer_that_closes_during_the_handshake_is_an_error(pair: Pair) -> None:
    server, client = pair
    with pytest.raises(BlockingIOError):
        client.sendmsg([])
    server.close()
    with pytest.raises(ConnectionError):
        receive(client)


def test_peer_that_only_looks_whether_we_are_there_is_an_error(pair: Pair) -> None:
    server, client = pair
    client.close()
    with pytest.raises(ConnectionResetError, match="closed by the peer during the TLS handshake"):
        receive(server)


def test_reset_by_the_peer_is_an_error(
    raw_pair: tuple[socket.socket, socket.socket], pair: Pair
) -> None:
    server, client = pair
    establish(pair)
    raw_pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(ConnectionResetError):
        receive(server)


def test_sending_to_a_peer_that_is_gone_is_an_error(pair: Pair) -> None:
    server, client = pair
    establish(pair)
    server.close()
    with pytest.raises(ConnectionError):
        send_for_ever(client)


def send_for_ever(sock: TlsSocket) -> None:
    while True:
        sock.sendmsg([memoryview(b"a")])


def test_connection_that_nobody_accepts_is_an_error(contexts: TlsContexts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    sock = socket.socket()
    sock.settimeout(0.0)
    sock.connect_ex(address)
    client = TlsSocket(sock, contexts.client, server_side=False)
    with contextlib.closing(client), pytest.raises(ConnectionRefusedError):
        receive(client)


def test_socket_that_still_connects_can_be_wrapped(contexts: TlsContexts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.socket()
        sock.settimeout(0.0)
        sock.connect_ex(listener.getsockname())
        client = TlsSocket(sock, contexts.client, server_side=False)
        with contextlib.closing(client):
            attempt(client.sendmsg, [memoryview(b"a")])
            server = TlsSocket(listener.accept()[0], contexts.server, server_side=True)
            with contextlib.closing(server):
                assert transfer(client, server, b"a") == b"a"


def test_ordinary_tls_client_is_understood_and_its_goodbye_too(
    raw_pair: tuple[socket.socket, socket.socket], contexts: TlsContexts
) -> None:
    server = TlsSocket(raw_pair[0], contexts.server, server_side=True)

    def talk() -> bytes:
        with contexts.client.wrap_socket(raw_pair[1]) as sock:
            sock.sendall(b"ping")
            answer = sock.recv(4)
            sock.settimeout(0.0)
            with contextlib.suppress(ssl.SSLWantReadError):
                sock.unwrap()
            return answer

    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(talk)
        assert receive(server) == b"ping"
        server.sendmsg([memoryview(b"pong")])
        assert answer.result(TIMEOUT_S) == b"pong"
    assert receive(server) == b""


# The likeness to a socket.


def test_closing_twice_does_no_harm(pair: Pair) -> None:
    server, _ = pair
    assert server.fileno() >= 0
    server.close()
    server.close()
    assert server.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        server.recv(1)


def test_only_non_blocking_use_is_possible(pair: Pair) -> None:
    server, _ = pair
    server.settimeout(0.0)
    with pytest.raises(ValueError, match="never blocks"):
        server.settimeout(1.0)


def test_options_of_the_socket_can_be_read(pair: Pair) -> None:
    server, _ = pair
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
