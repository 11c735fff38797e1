from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from vllm_pd.config import RouterConfig
from vllm_pd.router.connection import BrokenAnswerError
from vllm_pd.router.upstream import ConnectTimeoutError, Upstream, has_reached, is_idle_timeout

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

MakeUpstream = Callable[..., Upstream]


@dataclass
class ScriptedInstance:
    """Answers the requests of each connection with the next bytes of its script.

    A connection whose script is over is closed at its next request, or, with
    ``hang``, never answered.
    """

    scripts: Sequence[Sequence[bytes]]
    hang: bool = False
    heads: list[bytes] = field(default_factory=list)
    num_connections: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = iter(self.scripts[self.num_connections])
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                self.asked.set()
                _, found, length = head.partition(b"Content-Length: ")
                await reader.readexactly(int(length.split(b"\r\n")[0]) if found else 0)
                if (answer := next(script, None)) is None:
                    break
                writer.write(answer)
            if self.hang:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        finally:
            self.lost.set()
            writer.close()


@asynccontextmanager
async def running(instance: ScriptedInstance) -> AsyncIterator[ScriptedInstance]:
    server = await asyncio.start_server(instance.serve, "127.0.0.1", 0)
    instance.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield instance


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(
        RouterConfig(decode_idle_timeout_s=5.0), ssl.create_default_context()
    ) as upstream:
        yield upstream


async def post(upstream: Upstream, instance: ScriptedInstance) -> bytes:
    answer = await upstream.decode("POST", f"{instance.url}/v1", {"X-A": "1"}, b"{}")
    answer.close()
    return answer.first


async def test_a_connection_is_kept_for_the_next_request(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[OK, OK]])) as instance:
        assert [await post(upstream, instance) for _ in range(2)] == [b"{}", b"{}"]
        assert instance.num_connections == 1

    port = instance.url.rpartition(":")[2]
    expected = f"POST /v1 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-A: 1\r\nContent-Length: 2\r\n\r\n"
    assert instance.heads == [expected.encode()] * 2


async def test_requests_at_the_same_time_have_connections_of_their_own(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[OK], [OK]])) as instance:
        await asyncio.gather(post(upstream, instance), post(upstream, instance))

        assert instance.num_connections == 2


async def test_a_connection_that_was_closed_meanwhile_is_no_failure(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[OK], [OK]])) as instance:
        await post(upstream, instance)  # its connection is closed in answer to the next

        assert await post(upstream, instance) == b"{}"


async def test_an_instance_that_is_gone_once_it_has_the_request_was_reached(
    upstream: Upstream,
) -> None:
    instance = ScriptedInstance([[OK]])
    async with running(instance):
        await post(upstream, instance)  # its connection is closed in answer to the next

    with pytest.raises(BrokenAnswerError) as caught:  # not that nobody listens there
        await post(upstream, instance)
    assert has_reached(caught.value)
    assert len(instance.heads) == 2


async def test_an_instance_that_cannot_be_connected_to_was_not_reached(upstream: Upstream) -> None:
    instance = ScriptedInstance([])
    async with running(instance):
        pass

    with pytest.raises(ConnectionRefusedError) as caught:
        await post(upstream, instance)
    assert not has_reached(caught.value)


async def test_a_request_is_repeated_only_once(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[OK], []])) as instance:
        await post(upstream, instance)

        with pytest.raises(BrokenAnswerError):
            await post(upstream, instance)
        assert instance.num_connections == 2


async def test_a_request_that_was_being_answered_is_not_repeated(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[OK, b"HTTP/1.1 200 OK\r\n\x00"], [OK]])) as instance:
        await post(upstream, instance)

        with pytest.raises(BrokenAnswerError):
            await post(upstream, instance)
        assert instance.num_connections == 1


async def test_a_stream_begins_with_its_first_bytes(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[STREAM + b"1\r\na\r\n0\r\n\r\n"]])) as instance:
        answer = await upstream.decode("POST", instance.url, {}, b"{}")

        assert (answer.streamed, answer.first) == (True, b"a")
        assert await answer.more() == b""
        answer.close()


async def test_a_stream_without_a_byte_is_broken(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[STREAM + b"0\r\n\r\n"]])) as instance:
        with pytest.raises(BrokenAnswerError, match="before its first byte"):
            await upstream.decode("POST", instance.url, {}, b"{}")


async def test_a_stream_that_is_given_up_ends_at_the_instance(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[STREAM + b"1\r\na\r\n"]])) as instance:
        answer = await upstream.decode("POST", instance.url, {}, b"{}")

        answer.close()

        await instance.lost.wait()


async def test_a_request_that_is_cancelled_ends_at_the_instance(upstream: Upstream) -> None:
    async with running(ScriptedInstance([[]], hang=True)) as instance:
        request = asyncio.create_task(upstream.decode("POST", instance.url, {}, b"{}"))
        await instance.asked.wait()

        request.cancel()

        await instance.lost.wait()


async def test_a_prefill_has_one_deadline_for_all_of_it() -> None:
    async with (
        Upstream(RouterConfig(prefill_timeout_s=0.02), ssl.create_default_context()) as upstream,
        running(ScriptedInstance([[]], hang=True)) as instance,
    ):
        with pytest.raises(TimeoutError):
            await upstream.prefill(instance.url, {}, b"{}")

        await instance.lost.wait()


def test_an_instance_that_cannot_be_reached_has_not_been_silent() -> None:
    assert is_idle_timeout(TimeoutError())
    assert not is_idle_timeout(ConnectTimeoutError())
    assert not is_idle_timeout(BrokenAnswerError())
