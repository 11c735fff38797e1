"""TLS on real sockets: towards clients, and towards instances."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import unused_port
from cryptography.hazmat.primitives import serialization

from tests.unit.router.certificates import DAY, Authority, Pair
from tests.unit.router.conftest import StartRouter
from tests.unit.router.fakes import FakeInstance, completes, prefills
from vllm_pd.config import RouterConfig, from_mapping
from vllm_pd.errors import ConfigError
from vllm_pd.router.probes import Probes
from vllm_pd.router.serving import serve
from vllm_pd.router.tls import ServerTls, client_tls, server_tls

LOAD = "vllm:num_requests_running 1\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[str]:
    """Run a router as the command does, and give its address."""
    config = RouterConfig(
        port=unused_port(), decode_urls=("http://127.0.0.1:9",), health_interval_s=3600.0, **options
    )
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, stop))
    address = ("127.0.0.1", config.port)
    while not task.done():
        try:
            _, writer = await asyncio.open_connection(*address)
        except ConnectionRefusedError:
            await asyncio.sleep(0)
        else:
            writer.close()
            break
    try:
        if task.done():
            await task
        yield f"127.0.0.1:{config.port}"
    finally:
        stop.set()
        await task


async def get(url: str, tls: ssl.SSLContext | None = None) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, ssl=tls if tls is not None else True) as response,
    ):
        await response.read()
        return response.status


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.cafile))


def accepting(pair: Pair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certfile, pair.keyfile)
    return context


async def test_a_client_that_never_shakes_hands_is_not_waited_for(authority: Authority) -> None:
    options = authority.issue("router").options
    async with serving(client_timeout_s=0.1, **options) as address:
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""  # the event loop's own limit is a minute
        writer.close()


async def serial_number(address: str, tls: ssl.SSLContext) -> object:
    """Return the serial number of the certificate that a router shows."""
    host, _, port = address.partition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=tls)
    try:
        return writer.get_extra_info("peercert")["serialNumber"]
    finally:
        writer.close()
        await writer.wait_closed()


# Towards clients


async def test_a_client_that_trusts_the_authority_is_served(authority: Authority) -> None:
    async with serving(**authority.issue("router").options) as address:
        assert await get(f"https://{address}/health", trusting(authority)) == 200


async def test_a_client_that_does_not_trust_the_authority_refuses(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other")
    async with serving(**authority.issue("router").options) as address:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await get(f"https://{address}/health", trusting(other))


async def test_plain_http_on_the_tls_port_does_no_harm(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(**authority.issue("router").options) as address:
        with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
            await get(f"http://{address}/health")
        assert await get(f"https://{address}/health", trusting(authority)) == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_nothing_older_than_tls_1_2_is_spoken(authority: Authority) -> None:
    pair = authority.issue("router")
    towards_instances = RouterConfig(upstream_ca_file=str(authority.cafile))
    for context in (
        ServerTls(pair.certfile, pair.keyfile).context,
        client_tls(towards_instances),
        client_tls(RouterConfig()),
    ):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_a_client_without_the_certificate_that_is_asked_for_is_refused(
    authority: Authority,
) -> None:
    options = authority.issue("router").options | {"ssl_ca_certs": str(authority.cafile)}
    client, pair = trusting(authority), authority.issue("client")
    async with serving(**options, ssl_cert_reqs=2) as address:
        with pytest.raises((aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)):
            await get(f"https://{address}/health", trusting(authority))
        client.load_cert_chain(pair.certfile, pair.keyfile)
        assert await get(f"https://{address}/health", client) == 200


async def test_a_client_certificate_of_somebody_else_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    options = authority.issue("router").options | {"ssl_ca_certs": str(authority.cafile)}
    client, pair = trusting(authority), Authority(tmp_path, "other").issue("client")
    client.load_cert_chain(pair.certfile, pair.keyfile)
    async with serving(**options, ssl_cert_reqs=2) as address:
        with pytest.raises((aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)):
            await get(f"https://{address}/health", client)


async def test_a_renewed_certificate_is_used_without_a_restart(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_pd.router.tls.RELOAD_INTERVAL_S", 0.001)
    async with serving(**authority.issue("router").options) as address:
        before = await serial_number(address, trusting(authority))
        authority.issue("router")
        while await serial_number(address, trusting(authority)) == before:
            pass  # bounded by the test's timeout
        assert await get(f"https://{address}/health", trusting(authority)) == 200


def test_a_renewal_that_is_half_done_changes_nothing(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair, renewed = authority.issue("router"), authority.issue("renewed")
    tls = ServerTls(pair.certfile, pair.keyfile)

    pair.certfile.write_bytes(renewed.certfile.read_bytes())
    tls.reload_if_changed()
    tls.reload_if_changed()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "is not the key of the certificate" in caplog.text

    caplog.clear()
    pair.keyfile.write_bytes(renewed.keyfile.read_bytes())
    with caplog.at_level(logging.INFO):
        tls.reload_if_changed()
    assert "again" in caplog.text


def test_an_expired_certificate_is_warned_of(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair = authority.issue("router", validity=-DAY)
    ServerTls(pair.certfile, pair.keyfile)
    assert "has expired" in caplog.text


@pytest.mark.parametrize("option", ["ssl_certfile", "ssl_keyfile"])
def test_a_missing_file_is_named(authority: Authority, option: str, tmp_path: Path) -> None:
    options = authority.issue("router").options | {option: str(tmp_path / "nowhere.pem")}
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.pem"):
        server_tls(RouterConfig(**options))  # type: ignore[arg-type]


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    pair, other = authority.issue("router"), authority.issue("other")
    with pytest.raises(ConfigError, match="is not the key of the certificate"):
        ServerTls(pair.certfile, other.keyfile)


def test_a_key_with_a_pass_phrase_is_refused_without_asking_for_it(authority: Authority) -> None:
    pair = authority.issue("router")
    key = serialization.load_pem_private_key(pair.keyfile.read_bytes(), None)
    pair.keyfile.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="without pass phrase"):
        ServerTls(pair.certfile, pair.keyfile)


def test_what_is_no_certificate_is_refused(authority: Authority) -> None:
    pair = authority.issue("router")
    pair.certfile.write_text("nothing of the kind")
    with pytest.raises(ConfigError, match="holds no certificate"):
        ServerTls(pair.certfile, pair.keyfile)


@pytest.mark.parametrize(
    "options",
    [
        {"ssl_certfile": "a"},
        {"ssl_keyfile": "a"},
        {"ssl_ca_certs": "a", "ssl_cert_reqs": 2},
        {"ssl_certfile": "a", "ssl_keyfile": "b", "ssl_ca_certs": "c"},
        {"ssl_certfile": "a", "ssl_keyfile": "b", "ssl_cert_reqs": 2},
        {"ssl_certfile": "a", "ssl_keyfile": "b", "ssl_ca_certs": "c", "ssl_cert_reqs": 3},
    ],
)
def test_options_that_would_not_do_what_they_say_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="ssl_"):
        from_mapping(RouterConfig, options, source="test")


# Towards instances


async def test_instances_are_reached_over_tls(
    authority: Authority, start_router: StartRouter
) -> None:
    tls = accepting(authority.issue("instance"))
    async with (
        FakeInstance(prefills, tls=tls, metrics=LOAD) as prefill,
        FakeInstance(completes, tls=tls) as decode,
    ):
        router = await start_router([prefill], [decode], upstream_ca_file=str(authority.cafile))
        assert prefill.url.startswith("https://")
        async with router.get("/ready") as response:
            assert response.status == 200
        async with router.post("/v1/completions", json={"prompt": "hi"}) as response:
            assert response.status == 200
            assert response.headers["X-VLLM-PD-Path"] == "disaggregated"
            assert (await response.json())["choices"] == [{"text": "hello"}]


async def test_the_metrics_of_an_instance_are_read_over_tls(authority: Authority) -> None:
    tls = accepting(authority.issue("instance"))
    upstream = client_tls(RouterConfig(upstream_ca_file=str(authority.cafile)))
    async with (
        FakeInstance(completes, tls=tls, metrics=LOAD) as decode,
        Probes(connect_timeout_s=1.0, tls=upstream) as probes,
    ):
        assert await probes.metrics_text(decode.url) == LOAD


async def refused(instance: FakeInstance, start_router: StartRouter, **options: Any) -> str:
    """Return what a request is told if its only instance is refused."""
    router = await start_router([], [instance], **options)
    async with router.get("/ready") as response:
        assert response.status == 503
    async with router.post("/v1/completions", json={"prompt": "hi"}) as response:
        assert response.status == 503
    assert instance.received == []
    return instance.url


async def test_an_instance_with_an_untrusted_certificate_is_unhealthy_for_that_reason(
    authority: Authority,
    start_router: StartRouter,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    tls = accepting(Authority(tmp_path, "other").issue("instance"))
    async with FakeInstance(completes, tls=tls) as decode:
        url = await refused(decode, start_router, upstream_ca_file=str(authority.cafile))
    assert "its TLS certificate is refused: unable to get local issuer" in caplog.text
    assert caplog.text.count(url) == 1


async def test_an_instance_with_a_certificate_for_another_name_is_unhealthy_for_that_reason(
    authority: Authority, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    tls = accepting(authority.issue("instance", address="127.0.0.2"))
    async with FakeInstance(completes, tls=tls) as decode:
        await refused(decode, start_router, upstream_ca_file=str(authority.cafile))
    assert "its TLS certificate is refused: IP address mismatch" in caplog.text


async def test_by_default_only_the_systems_authorities_are_trusted(
    authority: Authority, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeInstance(completes, tls=accepting(authority.issue("instance"))) as decode:
        await refused(decode, start_router)
    assert "its TLS certificate is refused" in caplog.text


async def test_an_instance_without_tls_is_unhealthy_for_that_reason(
    start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeInstance(completes) as plain:
        router = await start_router(
            [], [], decode_urls=(plain.url.replace("http://", "https://"),), prefill_urls=()
        )
        async with router.get("/ready") as response:
            assert response.status == 503
    assert "no TLS connection: wrong version number" in caplog.text


async def test_an_authority_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read upstream_ca_file"):
        client_tls(RouterConfig(upstream_ca_file=str(tmp_path / "nowhere.pem")))
