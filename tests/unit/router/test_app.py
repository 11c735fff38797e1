from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from contextlib import closing

import aiohttp
import pytest
from aiohttp.test_utils import unused_port

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import Client, FakeInstance, Streams, config_for
from vllm_pd.config import RouterConfig
from vllm_pd.errors import ConfigError
from vllm_pd.router.serving import run, serve

UNREACHABLE = ("http://127.0.0.1:9",)


async def test_the_models_come_from_a_decode_instance(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    async with router.get("/v1/models", headers={"Authorization": "Bearer k"}) as response:
        assert response.status == 200
        assert await response.json() == {"choices": [{"text": "hello"}]}

    assert prefill.received == []
    assert decode.received[0].path == "/v1/models"
    assert decode.received[0].headers["Authorization"] == "Bearer k"


async def test_no_decode_instance_means_no_models(start_router: StartRouter) -> None:
    router = await start_router([], [])

    async with router.get("/v1/models") as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == 503


async def test_the_router_is_healthy_without_any_instance(start_router: StartRouter) -> None:
    router = await start_router([], [])

    async with router.get("/health") as response:
        assert response.status == 200


async def test_the_router_is_ready_when_both_roles_are_there(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    async with router.get("/ready") as response:
        assert response.status == 200
        assert await response.json() == {
            "ready": True,
            "instances": [
                {"role": "prefill", "url": prefill.url, "healthy": True},
                {"role": "decode", "url": decode.url, "healthy": True},
            ],
        }


async def test_the_router_is_not_ready_while_a_role_is_missing(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    prefill.healthy = False
    router = await start_router([prefill], [decode])

    async with router.get("/ready") as response:
        assert response.status == 503
        assert (await response.json())["instances"][0]["healthy"] is False


async def test_the_router_becomes_ready_when_the_instances_do(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    decode.healthy, decode.keep_alive = False, True
    router = await start_router([prefill], [decode], health_interval_s=0.001)
    decode.healthy = True

    status = 503
    while status != 200:  # bounded by the test's timeout
        async with router.get("/ready") as response:
            status = response.status


async def test_an_unknown_path_is_a_404_in_vllms_shape(router: Client) -> None:
    async with router.get("/v1/nothing") as response:
        assert response.status == 404
        assert await response.json() == {"detail": "Not Found"}


async def test_a_wrong_method_is_a_405_that_names_the_right_one(router: Client) -> None:
    async with router.get("/v1/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert await response.json() == {"detail": "Method Not Allowed"}


async def test_the_metrics_tell_requests_and_instances_apart(
    router: Client, decode: FakeInstance
) -> None:
    async with router.post("/v1/completions", json={"prompt": "a"}):
        pass

    async with router.get("/metrics") as response:
        text = await response.text()

    assert (
        "vllm_pd:router_requests_total"
        '{code="200",endpoint="/v1/completions",path="disaggregated"} 1.0' in text
    )
    assert f'vllm_pd:router_instance_up{{role="decode",url="{decode.url}"}} 1.0' in text
    assert "vllm_pd:router_requests_in_flight 0.0" in text
    assert "vllm_pd:router_prefill_retries_total 0.0" in text


async def test_a_served_router_ends_a_request_when_its_client_leaves(
    start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([b"data: 1\n\n"], wait=True))
    port = unused_port()
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(config_for([prefill], [decode], port=port), stop))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        await _until_it_listens(session)
        async with session.post("/v1/completions", json={"prompt": "a"}) as response:
            await response.content.readany()
            response.close()

        await decode.cancelled.wait()
    stop.set()
    await serving


async def test_a_stopped_router_finishes_its_open_requests(
    start_instance: StartInstance, prefill: FakeInstance
) -> None:
    streams = Streams([b"data: 1\n\n"], wait=True, more=[b"data: [DONE]\n\n"])
    decode = await start_instance(streams)
    port = unused_port()
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(config_for([prefill], [decode], port=port), stop))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        await _until_it_listens(session)
        async with session.post("/v1/completions", json={"prompt": "a"}) as response:
            await response.content.readany()
            stop.set()
            streams.go_on.set()
            assert await response.content.read() == b"data: [DONE]\n\n"
    await serving


async def _until_it_listens(session: aiohttp.ClientSession) -> None:
    while True:  # bounded by the test's timeout
        try:
            async with session.get("/health"):
                return
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0)


def test_a_port_in_use_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        config = RouterConfig(port=port, prefill_urls=UNREACHABLE, decode_urls=UNREACHABLE)

        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is already in use"):
            run(config)


def test_an_address_of_another_host_cannot_be_listened_on() -> None:
    config = RouterConfig(host="192.0.2.1", prefill_urls=UNREACHABLE, decode_urls=UNREACHABLE)

    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        run(config)


def test_a_role_without_instances_is_refused() -> None:
    with pytest.raises(ConfigError, match="no decode instance given"):
        run(RouterConfig(prefill_urls=UNREACHABLE))


@pytest.mark.parametrize("url", ["http://", "http://host:99999"])
def test_an_instance_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="instance address"):
        run(RouterConfig(prefill_urls=(url,), decode_urls=UNREACHABLE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_router_with_exit_code_0(number: signal.Signals) -> None:
    port = unused_port()
    config = RouterConfig(port=port, prefill_urls=UNREACHABLE, decode_urls=UNREACHABLE)

    def stop_when_it_listens() -> None:
        while True:  # bounded by the test's timeout
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except urllib.error.URLError:
                continue
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=stop_when_it_listens)
    killer.start()

    assert run(config) == 0
    killer.join()
