"""Clients that speak HTTP badly, over real sockets: a clear error, and the next request works."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.test_utils import unused_port

from tests.unit.router.fakes import FakeInstance, Streams, config_for
from vllm_pd.router.decode import Opened
from vllm_pd.router.serving import serve

BODY = json.dumps({"model": "m", "prompt": "a", "max_tokens": 4}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\n"
WHOLE = POST + b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(BODY), BODY)


@pytest.fixture
async def port(prefill: FakeInstance, decode: FakeInstance) -> AsyncIterator[int]:
    async for port in served([prefill], [decode]):
        yield port


async def served(
    prefill: list[FakeInstance], decode: list[FakeInstance], **options: float
) -> AsyncIterator[int]:
    port, stop = unused_port(), asyncio.Event()
    serving = asyncio.create_task(serve(config_for(prefill, decode, port=port, **options), stop))
    async with aiohttp.ClientSession() as session:
        while True:  # bounded by the test's timeout
            try:
                async with session.get(f"http://127.0.0.1:{port}/ready") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0)
    yield port
    stop.set()
    await serving


async def send(port: int, *pieces: bytes, end: bool = False) -> bytes:
    """Send bytes as they are; return what comes back until the router closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if end:
            writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def check_that_the_next_request_works(port: int) -> None:
    assert status_of(await send(port, WHOLE)) == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\nHost: r\r\n\r\n",
        POST + b"X-Long: " + b"x" * 70_000 + b"\r\n\r\n",
        POST + b"Content-Length: ten\r\nConnection: close\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost r\r\n\r\n",
    ],
    ids=["tls", "half-line", "version", "long-header", "length", "two-framings", "no-colon"],
)
async def test_what_is_no_http_is_refused(port: int, request_: bytes) -> None:
    assert status_of(await send(port, request_)) == 400
    await check_that_the_next_request_works(port)


async def test_a_broken_chunk_is_refused(port: int, prefill: FakeInstance) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"

    answer = await send(port, head + b"5\r\n{", b"zzz\r\n\r\n")

    assert status_of(answer) == 400
    assert prefill.received == []
    await check_that_the_next_request_works(port)


async def test_a_chunked_body_is_served(port: int) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    pieces = [b"%x\r\n%b\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY))]

    assert status_of(await send(port, head, *pieces, b"0\r\n\r\n")) == 200


async def test_a_client_of_http_1_0_gets_its_answer(port: int) -> None:
    request = WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Connection: close\r\n", b"")

    answer = await send(port, request)

    assert answer.startswith(b"HTTP/1.0 200")
    assert b'"choices"' in answer


async def test_a_client_of_http_1_0_gets_its_stream_without_chunks(prefill: FakeInstance) -> None:
    events = [b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"]
    async with FakeInstance(Streams(events)) as decode:
        async for port in served([prefill], [decode]):
            answer = await send(port, WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"))

            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"chunked" not in head.lower()
            assert body == b"".join(events)


async def test_a_body_shorter_than_announced_reaches_no_instance(
    port: int, prefill: FakeInstance, decode: FakeInstance
) -> None:
    head = POST + b"Content-Length: 1000\r\n\r\n"

    await send(port, head, BODY, end=True)

    assert prefill.received == decode.received == []
    await check_that_the_next_request_works(port)


async def test_headers_that_do_not_end_are_not_waited_for(
    prefill: FakeInstance, decode: FakeInstance
) -> None:
    async for port in served([prefill], [decode], client_timeout_s=0.05):
        assert await send(port, POST) == b""
        await check_that_the_next_request_works(port)


async def test_a_client_that_says_nothing_is_not_waited_for(
    prefill: FakeInstance, decode: FakeInstance
) -> None:
    async for port in served([prefill], [decode], client_timeout_s=0.05):
        assert await send(port) == b""


async def test_a_stream_is_not_taken_for_a_silent_client(prefill: FakeInstance) -> None:
    streams = Streams([b"data: 1\n\n"], wait=True, more=[b"data: [DONE]\n\n"])
    async with FakeInstance(streams) as decode:
        async for port in served([prefill], [decode], client_timeout_s=0.2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(WHOLE)
            await reader.readuntil(b"data: 1\n\n")
            for _ in range(3):  # others are given up meanwhile
                assert await send(port) == b""
            streams.go_on.set()
            assert (await reader.read()).count(b"data: [DONE]") == 1
            writer.close()


async def test_no_second_answer_follows_one_that_has_begun(
    prefill: FakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Opened, "__exit__", Mock(side_effect=RuntimeError("bug")))
    async with FakeInstance(Streams([b"data: [DONE]\n\n"])) as decode:
        async for port in served([prefill], [decode]):
            answer = await send(port, WHOLE.replace(b"Connection: close\r\n", b""))

            assert answer.count(b"HTTP/1.1") == 1
