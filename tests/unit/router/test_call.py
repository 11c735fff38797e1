"""What the router reads of a client's request."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.router.api_keys import Access
from vllm_pd.router.body_budget import BodyBudget
from vllm_pd.router.call import Call
from vllm_pd.router.metrics import Outcome
from vllm_pd.router.record import Record


@pytest.fixture
async def body() -> StreamReader:
    loop = asyncio.get_running_loop()
    return StreamReader(BaseProtocol(loop), limit=2**16, loop=loop)


@pytest.fixture
def request_of(body: StreamReader) -> web.Request:
    return make_mocked_request("POST", "/v1/completions", payload=body)


@pytest.fixture
def call(request_of: web.Request) -> Call:
    client = Access(None, None).client_of({})
    assert client is not None
    hold = BodyBudget(1000).hold()
    return Call(request_of, "r-1", CIMultiDict(), Outcome(), client, Record("r-1"), hold)


async def test_body_is_read_whole(call: Call, body: StreamReader) -> None:
    for part in (b'{"prompt":', b'"hi"}'):
        body.feed_data(part)
    body.feed_eof()

    assert await call.read(100) == b'{"prompt":"hi"}'


async def test_request_keeps_no_copy_of_its_body(
    call: Call, body: StreamReader, request_of: web.Request
) -> None:
    body.feed_data(b"{}")
    body.feed_eof()

    await call.read(100)

    assert await request_of.read() == b""


async def test_body_without_end_is_refused_when_it_is_too_long(
    call: Call, body: StreamReader
) -> None:
    body.feed_data(b"x" * 101)

    with pytest.raises(web.HTTPRequestEntityTooLarge):
        await call.read(100)


async def test_damaged_body_is_the_clients_fault(call: Call, body: StreamReader) -> None:
    body.feed_data(b"{")
    body.set_exception(web.RequestPayloadError("Bad chunk"))

    with pytest.raises(RemoteProtocolError, match="the request body is damaged"):
        await call.read(100)
