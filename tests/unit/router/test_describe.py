"""The control link against real instance endpoints."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from tests.unit.protocol.test_messages import FINGERPRINT
from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import ConfigError, PeerLostError, RemoteProtocolError
from vllm_pd.protocol.messages import PROTOCOL_VERSION, AnyMessage, InstanceInfo, Stats
from vllm_pd.router import describe
from vllm_pd.router.describe import ControlLink, fingerprint_key
from vllm_pd.session.channel import ControlContext
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.keys import write_cluster_key

INFO = InstanceInfo(
    protocol_version=PROTOCOL_VERSION,
    engine_id="p0",
    tp_size=1,
    workers=(),
    fingerprint=FINGERPRINT,
    num_leases=0,
    lease_s=30.0,
)


@pytest.fixture
def endpoint() -> Iterator[InstanceEndpoint]:
    endpoint = InstanceEndpoint(ConnectorConfig(), engine_id="p0", tp_size=1)
    endpoint.set_workers((), FINGERPRINT)
    yield endpoint
    endpoint.close()


@pytest.fixture
def link() -> Iterator[ControlLink]:
    link = ControlLink(None)
    yield link
    link.close()


@pytest.fixture
def answering() -> Iterator[Callable[[AnyMessage], tuple[str, int]]]:
    """Start servers that give the same answer to every question."""
    context = ControlContext(ConnectorConfig())
    threads = []
    stop = threading.Event()

    def serve(answer: AnyMessage, address: list[int], ready: threading.Event) -> None:
        server = context.server("127.0.0.1", 0)
        address.append(server.port)
        ready.set()
        while not stop.is_set():
            server.socket.poll(10)
            for identity, _ in server.receive_some():
                server.send(identity, answer)
        server.close()

    def start(answer: AnyMessage) -> tuple[str, int]:
        address: list[int] = []
        ready = threading.Event()
        threads.append(threading.Thread(target=serve, args=(answer, address, ready)))
        threads[-1].start()
        ready.wait()
        return "127.0.0.1", address[0]

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    context.close()


def address_of(endpoint: InstanceEndpoint) -> tuple[str, int]:
    return endpoint.host, endpoint.port


async def test_an_instance_describes_itself(endpoint: InstanceEndpoint, link: ControlLink) -> None:
    assert await link.describe(address_of(endpoint)) == INFO


async def test_an_instance_tells_what_it_keeps(
    endpoint: InstanceEndpoint, link: ControlLink
) -> None:
    endpoint.try_hold(7)
    outstanding = await link.outstanding(address_of(endpoint))

    assert (outstanding.num_leases, outstanding.num_blocks) == (1, 7)
    assert not outstanding.draining


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_many_questions_at_the_same_time_are_answered(
    endpoint: InstanceEndpoint, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def ask() -> list[InstanceInfo]:
        link = ControlLink(None)
        try:
            questions: list[Coroutine[Any, Any, InstanceInfo]] = [
                link.describe(address_of(endpoint)) for _ in range(20)
            ]
            return await asyncio.gather(*questions)
        finally:
            link.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(ask()) == [INFO] * 20


async def test_a_release_arrives_and_so_does_one_after_a_restart(link: ControlLink) -> None:
    first = InstanceEndpoint(ConnectorConfig(), engine_id="p0", tp_size=1)
    link.release(address_of(first), "t-1")
    while first.take_releases() != ["t-1"]:  # noqa: ASYNC110  # another thread
        await asyncio.sleep(0)
    first.close()

    second = InstanceEndpoint(
        ConnectorConfig(side_channel_port=first.port), engine_id="p1", tp_size=1
    )
    while not (got := second.take_releases()):  # until the loss has been noticed
        link.release(address_of(second), "t-2")
        await asyncio.sleep(0)
    assert set(got) == {"t-2"}
    second.close()


async def test_where_nobody_listens_nobody_answers(link: ControlLink) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken_port:
        port = taken_port.getsockname()[1]
    with pytest.raises(PeerLostError, match=f"127.0.0.1:{port}: "):
        await link.describe(("127.0.0.1", port))


async def test_who_does_not_answer_is_not_waited_for(
    link: ControlLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe, "ANSWER_TIMEOUT_S", 0.05)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        address = ("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(PeerLostError, match=r"no answer within 0\.05 s"):
            await link.describe(address)


async def test_an_answer_to_another_question_is_refused(
    link: ControlLink, answering: Callable[[AnyMessage], tuple[str, int]]
) -> None:
    with pytest.raises(RemoteProtocolError, match="Stats is no answer"):
        await link.describe(answering(Stats(counters={})))


async def test_without_a_key_other_hosts_are_not_spoken_to(link: ControlLink) -> None:
    with pytest.raises(PeerLostError, match="no cluster key"):
        await link.describe(("192.0.2.1", 5600))


async def test_with_the_key_of_the_instances_they_answer(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    endpoint = InstanceEndpoint(
        ConnectorConfig(cluster_key_file=str(path)), engine_id="p0", tp_size=1
    )
    link = ControlLink(str(path))
    assert (await link.describe(address_of(endpoint))).engine_id == "p0"
    link.close()
    endpoint.close()


def test_a_key_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        ControlLink(str(tmp_path / "nowhere"))


def test_equal_fingerprints_have_equal_keys_and_others_not() -> None:
    other_model = msgspec.structs.replace(FINGERPRINT, model="other")
    key = fingerprint_key(INFO)

    assert key == fingerprint_key(msgspec.structs.replace(INFO, engine_id="d0", tp_size=2))
    assert key != fingerprint_key(msgspec.structs.replace(INFO, fingerprint=other_model))
    assert key != fingerprint_key(msgspec.structs.replace(INFO, protocol_version=1))


def test_an_instance_that_knows_none_has_no_key() -> None:
    assert fingerprint_key(msgspec.structs.replace(INFO, fingerprint=None)) is None
