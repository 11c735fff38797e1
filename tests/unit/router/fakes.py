"""A vLLM server that does as it is told, and a router in front of some of them."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from multidict import CIMultiDict, CIMultiDictProxy

from vllm_pd.config import RouterConfig
from vllm_pd.router.app import create_app

KV_PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "engine-1",
    "remote_block_ids": [3, 4],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "transfer_id": "t-1",
}

Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]
Client = TestClient[web.Request, web.Application]


@dataclass(frozen=True)
class Received:
    """One request as an instance saw it."""

    path: str
    headers: CIMultiDictProxy[str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


@dataclass
class FakeInstance:
    """Records the requests it gets and answers them with ``behave``."""

    behave: Behaviour
    healthy: bool = True
    keep_alive: bool = False  # without it, no request is sent on a probe's connection
    metrics: str | None = ""
    tls: ssl.SSLContext | None = None
    received: list[Received] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._any)
        self._server = TestServer(app)
        await self._server.start_server(ssl=self.tls)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return str(self._server.make_url("")).rstrip("/")

    async def stop(self) -> None:
        await self._server.close()

    async def _health(self, _request: web.Request) -> web.Response:
        response = web.Response(status=200 if self.healthy else 503)
        if not self.keep_alive:
            response.force_close()
        return response

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        if self.metrics is None:
            return await self.behave(request)
        return web.Response(text=self.metrics)

    async def _any(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.received.append(Received(request.path, request.headers, raw))
        self.started.set()
        try:
            return await self.behave(request)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.ended.set()


async def prefills(_request: web.Request) -> web.StreamResponse:
    """Answer a prefill leg as vLLM does."""
    return web.json_response({"choices": [{"text": "x"}], "kv_transfer_params": KV_PARAMS})


async def completes(_request: web.Request) -> web.StreamResponse:
    """Answer a whole completion."""
    return web.json_response({"choices": [{"text": "hello"}]})


async def hangs(_request: web.Request) -> web.StreamResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def drops(request: web.Request) -> web.StreamResponse:
    """Die before the first byte of the answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def answers(status: int, payload: object = None, **headers: str) -> Behaviour:
    """Answer with a status, e.g. an error."""

    async def behave(_request: web.Request) -> web.StreamResponse:
        return web.json_response(payload, status=status, headers=CIMultiDict(headers))

    return behave


@dataclass
class Streams:
    """Sends chunks, then (optionally) waits for ``go_on`` and sends more, then ends or dies."""

    chunks: Sequence[bytes]
    more: Sequence[bytes] = ()
    wait: bool = False
    die: bool = False
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for chunk in self.chunks:
            await response.write(chunk)
        if self.wait:
            await self.go_on.wait()
        for chunk in self.more:
            await response.write(chunk)
        if self.die:
            assert request.transport is not None
            request.transport.close()
        return response


class FirstOfEquals(random.Random):
    """Decides as a test can foresee."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


def config_for(
    prefill: Sequence[FakeInstance], decode: Sequence[FakeInstance], **options: Any
) -> RouterConfig:
    # An hour between probes: what the router knows, it knows from its start or from requests.
    settings: dict[str, Any] = {
        "health_interval_s": 3600.0,
        "prefill_urls": tuple(instance.url for instance in prefill),
        "decode_urls": tuple(instance.url for instance in decode),
    }
    return RouterConfig(**(settings | options))


async def start_client(
    prefill: Sequence[FakeInstance], decode: Sequence[FakeInstance], **options: Any
) -> Client:
    """Start a router in front of instances and return a client of it."""
    app = create_app(config_for(prefill, decode, **options), rng=FirstOfEquals())
    client: Client = TestClient(TestServer(app))
    await client.start_server()
    return client
