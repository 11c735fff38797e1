"""Control sockets: who gets in, what is dropped, and what is counted of it."""

from __future__ import annotations

import multiprocessing
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import zmq

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import ConfigError, PeerLostError
from vllm_pd.protocol.messages import MAX_FRAME_LEN, Describe, Goodbye
from vllm_pd.session.channel import ControlClient, ControlContext, ControlServer, Newcomers
from vllm_pd.session.keys import load_cluster_key, write_cluster_key

MakeContext = Callable[[str | None], ControlContext]


@pytest.fixture
def make_context(tmp_path: Path) -> Iterator[MakeContext]:
    """Return a function that makes a context with the named cluster key, or none."""
    made: list[ControlContext] = []

    def make(key: str | None) -> ControlContext:
        path = tmp_path / f"{key}.key"
        if key is not None and not path.exists():
            write_cluster_key(path)
        config = ConnectorConfig(cluster_key_file=str(path) if key is not None else None)
        made.append(ControlContext(config))
        return made[-1]

    yield make
    for context in made:
        context.close()


@pytest.fixture(params=[None, "ours"], ids=["plain", "curve"])
def context(request: pytest.FixtureRequest, make_context: MakeContext) -> ControlContext:
    return make_context(request.param)


@pytest.fixture
def server(context: ControlContext) -> Iterator[ControlServer]:
    server = context.server("127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture
def client(context: ControlContext, server: ControlServer) -> Iterator[ControlClient]:
    client = context.client("127.0.0.1", server.port)
    yield client
    client.close()


def wait_dropped(server: ControlServer, count: int) -> dict[str, int]:
    """Serve, as a session does, until so much was dropped; messages are fine."""
    poller = zmq.Poller()
    poller.register(server.socket, zmq.POLLIN)
    poller.register(server.monitor, zmq.POLLIN)
    deadline = time.monotonic() + 10.0
    while server.num_dropped.total() < count:
        assert time.monotonic() < deadline, server.num_dropped
        poller.poll(100)
        for _ in server.receive_some():
            pass
    return dict(server.num_dropped)


def wait_message(server: ControlServer) -> object:
    deadline = time.monotonic() + 10.0
    while not (received := next(server.receive_some(), None)):
        assert time.monotonic() < deadline, server.num_dropped
        server.socket.poll(100)
    return received[1]


def wait_lost(client: ControlClient) -> None:
    assert client.monitor.poll(10_000)
    client.check()


def test_message_of_a_peer_with_our_key_arrives_and_nothing_is_dropped(
    server: ControlServer, client: ControlClient
) -> None:
    client.send(Describe())
    assert wait_message(server) == Describe()
    assert not server.num_dropped


def test_peer_with_another_key_is_refused_and_counted(make_context: MakeContext) -> None:
    server = make_context("ours").server("127.0.0.1", 0)
    client = make_context("theirs").client("127.0.0.1", server.port)
    client.send(Describe())
    assert list(wait_dropped(server, 1)) == ["wrong_key"]  # again and again, as ZeroMQ retries
    assert server.num_denied == server.num_dropped["wrong_key"]
    client.close()
    server.close()


def test_peer_that_knows_only_our_public_key_is_refused_and_counted(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context("ours")
    server = context.server("127.0.0.1", 0)
    public, secret = zmq.curve_keypair()
    with zmq.Context() as theirs, theirs.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.curve_serverkey = load_cluster_key(tmp_path / "ours.key").public
        sock.curve_publickey, sock.curve_secretkey = public, secret
        sock.connect(f"tcp://127.0.0.1:{server.port}")
        assert list(wait_dropped(server, 1)) == ["wrong_key"]
    server.close()


def test_plaintext_peer_is_refused_and_counted(make_context: MakeContext) -> None:
    server = make_context("ours").server("127.0.0.1", 0)
    client = make_context(None).client("127.0.0.1", server.port)
    client.send(Describe())
    assert list(wait_dropped(server, 1)) == ["handshake"]
    client.close()
    server.close()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff\0\0\0\0\0\0\0\1\x7f\3"],
    ids=["nothing", "HTTP", "half a greeting"],
)
def test_connection_that_never_greets_is_counted_once_it_ends(
    server: ControlServer, sent: bytes
) -> None:
    for count in range(1, 4):
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.sendall(sent)
        assert wait_dropped(server, count) == {"handshake": count}


def test_peers_that_come_and_go_in_order_are_not_counted(
    context: ControlContext, server: ControlServer
) -> None:
    for _ in range(3):
        client = context.client("127.0.0.1", server.port)
        client.send(Describe())
        assert wait_message(server) == Describe()
        client.close(linger_s=1.0)
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.sendall(b"?" * 64)
    assert wait_dropped(server, 1) == {"handshake": 1}


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"\xc1"], "malformed"),
        ([b"x" * (MAX_FRAME_LEN + 1)], "oversized"),
        ([b"one", b"two"], "frame_count"),
    ],
    ids=["malformed", "oversized", "two frames"],
)
def test_frame_that_is_no_message_is_dropped_and_its_peer_served_on(
    server: ControlServer, client: ControlClient, frames: list[bytes], reason: str
) -> None:
    client.socket.send_multipart(frames)
    assert wait_dropped(server, 1) == {reason: 1}
    client.send(Describe())
    assert wait_message(server) == Describe()


def test_peer_of_a_far_too_long_frame_is_cut_off_and_others_are_served(
    context: ControlContext, server: ControlServer, client: ControlClient
) -> None:
    client.socket.send(b"x" * (4 * MAX_FRAME_LEN))
    with pytest.raises(PeerLostError, match="disconnected"):
        wait_lost(client)
    other = context.client("127.0.0.1", server.port)
    other.send(Describe())
    assert wait_message(server) == Describe()
    other.close()


def test_answer_to_a_peer_that_is_gone_is_counted(server: ControlServer) -> None:
    server.socket.router_mandatory = True
    server.send(b"nobody", Goodbye())
    assert dict(server.num_dropped) == {"unsent": 1}


def test_refused_peers_in_thousands_do_not_stop_the_service(
    make_context: MakeContext,
) -> None:
    """Only the server is read, as by a loop that does not poll the monitor."""
    context = make_context("ours")
    server = context.server("127.0.0.1", 0)
    for count in range(1, 31):
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", server.port)) as stranger:
                stranger.sendall(b"?" * 64)
        while server.num_dropped.total() < 100 * count:
            list(server.receive_some())
    client = context.client("127.0.0.1", server.port)
    client.send(Describe())
    assert wait_message(server) == Describe()
    assert dict(server.num_dropped) == {"handshake": 3000}
    client.close()
    server.close()


def test_server_is_read_in_turns_and_the_rest_needs_no_new_event(
    server: ControlServer, client: ControlClient
) -> None:
    for _ in range(600):
        client.send(Describe())
    client.socket.send(b"\xc1")
    poller = zmq.Poller()
    poller.register(server.socket, zmq.POLLIN)
    poller.register(server.monitor, zmq.POLLIN)
    turns: list[int] = []
    while not server.num_dropped:
        assert poller.poll(10_000), "what is left is not announced"
        turns.append(len(list(server.receive_some())))
    assert sum(turns) == 600
    assert max(turns) <= 256


def test_frames_that_are_no_messages_do_not_prolong_a_turn(
    server: ControlServer, client: ControlClient
) -> None:
    for _ in range(600):
        client.socket.send(b"\xc1")
    known = 0
    while known < 600:
        assert server.socket.poll(10_000)
        assert list(server.receive_some()) == []
        assert server.num_dropped.total() - known <= 256
        known = server.num_dropped.total()


def test_without_descriptors_a_server_is_refused_in_one_line_and_a_client_is_lost() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        executor.submit(run_out_of_descriptors).result(timeout=60)


def run_out_of_descriptors() -> None:
    context = ControlContext(ConnectorConfig())
    server = context.server("127.0.0.1", 0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    with pytest.raises(PeerLostError, match="Too many open files"):
        context.client("127.0.0.1", server.port)
    with pytest.raises(ConfigError, match="Too many open files"):
        context.server("127.0.0.1", 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    client = context.client("127.0.0.1", server.port)
    client.send(Describe())
    assert wait_message(server) == Describe()
    client.close()
    server.close()
    context.close()


def test_port_in_use_is_named(context: ControlContext, server: ControlServer) -> None:
    with pytest.raises(ConfigError, match=f"port {server.port}"):
        context.server("127.0.0.1", server.port)


def test_closing_twice_is_closing_once(context: ControlContext) -> None:
    server = context.server("127.0.0.1", 0)
    server.close()
    server.close()
    assert server.socket.closed
    assert server.monitor.closed


class TestNewcomers:
    """Events as a server's monitor reports them; numbers are descriptors."""

    def test_a_peer_that_greets_and_leaves_is_none(self) -> None:
        assert reasons((ACCEPTED, 5), (GREETED, 0), (LEFT, 5)) == []

    def test_one_that_leaves_without_a_greeting_is_a_failed_handshake(self) -> None:
        assert reasons((ACCEPTED, 5), (LEFT, 5)) == ["handshake"]

    def test_a_refusal_is_counted_once_though_its_connection_leaves_later(self) -> None:
        assert reasons((ACCEPTED, 5), (DENIED, 400), (LEFT, 5)) == ["wrong_key"]
        assert reasons((ACCEPTED, 5), (BROKEN, 0x11000001), (LEFT, 5)) == ["wrong_key"]
        assert reasons((ACCEPTED, 5), (BROKEN, 0x11000002), (LEFT, 5)) == ["handshake"]
        assert reasons((ACCEPTED, 5), (GAVE_UP, 104), (LEFT, 5)) == ["handshake"]

    def test_a_stranger_beside_a_peer_is_told_from_it(self) -> None:
        events = ((ACCEPTED, 5), (GREETED, 0), (ACCEPTED, 6), (LEFT, 6), (LEFT, 5))
        assert reasons(*events) == ["handshake"]

    def test_a_stranger_that_comes_together_with_peers_is_counted_once(self) -> None:
        events = [(ACCEPTED, 5), (ACCEPTED, 6), (ACCEPTED, 7), (GREETED, 0), (GREETED, 0)]
        assert reasons(*events, (LEFT, 5), (LEFT, 6), (LEFT, 7)) == ["handshake"]

    def test_a_refused_peer_does_not_hide_a_stranger_who_comes_later(self) -> None:
        events = [(ACCEPTED, 5), (ACCEPTED, 6), (DENIED, 400), (GREETED, 0), (LEFT, 5)]
        assert reasons(*events, (ACCEPTED, 7), (LEFT, 7)) == ["wrong_key", "handshake"]


ACCEPTED, GREETED, LEFT = (
    zmq.Event.ACCEPTED,
    zmq.Event.HANDSHAKE_SUCCEEDED,
    zmq.Event.DISCONNECTED,
)
DENIED, BROKEN, GAVE_UP = (
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
)


def reasons(*events: tuple[zmq.Event, int]) -> list[str]:
    newcomers = Newcomers()
    found = [newcomers.refusal(event, value) for event, value in events]
    return [reason for reason in found if reason]
