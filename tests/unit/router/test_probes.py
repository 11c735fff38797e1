from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from tests.unit.router.conftest import StartInstance
from tests.unit.router.fakes import answers, drops
from vllm_pd.router import probes as probes_module
from vllm_pd.router.probes import Probes


@pytest.fixture
async def probes() -> AsyncIterator[Probes]:
    async with Probes(connect_timeout_s=1.0, tls=ssl.create_default_context()) as probes:
        yield probes


async def test_health_is_the_status(probes: Probes, start_instance: StartInstance) -> None:
    instance = await start_instance(drops)
    assert await probes.is_healthy(instance.url)
    instance.healthy = False
    assert not await probes.is_healthy(instance.url)


async def test_who_cannot_be_reached_is_not_healthy_and_has_no_metrics(probes: Probes) -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    assert not await probes.is_healthy(url)
    assert await probes.metrics_text(url) is None


async def test_a_redirection_is_no_health(probes: Probes, start_instance: StartInstance) -> None:
    healthy = await start_instance(drops)

    async def elsewhere(_request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(f"{healthy.url}/health")

    app = web.Application()
    app.router.add_get("/health", elsewhere)
    async with TestServer(app) as server:
        assert not await probes.is_healthy(str(server.make_url("")).rstrip("/"))


async def test_the_metrics_are_text_whatever_the_bytes(
    probes: Probes, start_instance: StartInstance
) -> None:
    async def behave(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"a 1\n\xff 2\n")

    instance = await start_instance(behave)
    instance.metrics = None
    assert await probes.metrics_text(instance.url) == "a 1\n\ufffd 2\n"


async def test_an_instance_without_metrics_has_none(
    probes: Probes, start_instance: StartInstance
) -> None:
    for behave in (answers(404), drops):
        instance = await start_instance(behave)
        instance.metrics = None
        assert await probes.metrics_text(instance.url) is None


async def test_endless_metrics_are_not_read(
    probes: Probes, start_instance: StartInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes_module, "MAX_METRICS_LEN", 1000)

    async def behave(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * 1001)

    instance = await start_instance(behave)
    instance.metrics = None
    assert await probes.metrics_text(instance.url) is None


async def test_what_was_logged_of_many_instances_is_not_remembered_for_ever(
    probes: Probes,
    start_instance: StartInstance,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes_module, "MAX_TOLD", 1)
    one, other = [await start_instance(drops) for _ in range(2)]
    for instance in (one, one, other, one):
        assert not await probes.is_healthy(instance.url.replace("http:", "https:"))
    assert len(caplog.records) == 3
