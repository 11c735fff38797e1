"""Traces, as a collector gets them over the wire."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from tests.collector import CLIENT, ERROR, INTERNAL, OK, SERVER, Collector, Seen
from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import (
    KV_PARAMS,
    FakeInstance,
    Streams,
    answers,
    drops,
    hangs,
)
from vllm_pd.errors import ConfigError
from vllm_pd.router.spans import open_tracer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY = {"model": "m", "prompt": "hi", "max_tokens": 8}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 4},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with Collector() as collector:
        yield collector


def names(spans: list[Seen]) -> list[str]:
    return [span.name for span in spans]


def sent_parent(instance: FakeInstance, number: int = 0) -> tuple[str, str]:
    """Return trace and span that a leg named as its parent."""
    (given,) = instance.received[number].headers.getall("traceparent")
    _, trace_id, span_id, _ = given.split("-")
    return trace_id, span_id


async def test_a_served_request_is_a_tree(
    start_router: StartRouter, start_instance: StartInstance, collector: Collector
) -> None:
    prefill = await start_instance(answers(200, {"kv_transfer_params": KV_PARAMS}))
    decode = await start_instance(answers(200, {"choices": [], "usage": USAGE}))
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    headers = SAMPLED | {"X-Request-Id": "r1"}
    async with router.post(COMPLETIONS, json=BODY, headers=headers) as response:
        assert response.status == 200
    await router.close()

    root = collector.root()
    assert (root.name, root.kind, root.status) == (f"POST {COMPLETIONS}", SERVER, OK)
    assert (root.trace_id, root.parent_id) == (TRACE_ID, PARENT_ID)
    expected = {
        "http.request.method": "POST",
        "url.path": COMPLETIONS,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": "r1",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "vllm_pd.path": "disaggregated",
        "vllm_pd.retries": 0,
    }
    assert {name: root.attributes[name] for name in expected} == expected

    parts = collector.children(root)
    assert names(parts) == ["queue decode", "queue prefill", "prefill", "decode"]
    assert {span.trace_id for span in parts} == {TRACE_ID}
    assert [span.kind for span in parts] == [INTERNAL, INTERNAL, CLIENT, CLIENT]
    for part in parts:
        assert root.began_ns <= part.began_ns <= part.ended_ns <= root.ended_ns
    assert collector.children(parts[2]) == collector.children(parts[3]) == []
    assert {resource["service.name"] for resource in collector.resources} == {"vllm-pd-router"}


async def test_each_leg_carries_its_own_span_so_that_the_engines_join(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    collector: Collector,
) -> None:
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    async with router.post(COMPLETIONS, json=BODY, headers=SAMPLED):
        pass
    await router.close()
    legs = {span.name: span for span in collector.spans if span.kind == CLIENT}
    for name, instance in (("prefill", prefill), ("decode", decode)):
        assert sent_parent(instance) == (TRACE_ID, legs[name].span_id)
        assert instance.received[0].headers.getall("tracestate") == ["vendor=1"]
        assert instance.url.endswith(f":{legs[name].attributes['server.port']}")


async def test_a_retried_prefill_is_two_parts_of_which_one_failed(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    decode: FakeInstance,
    collector: Collector,
) -> None:
    dead = await start_instance(drops)
    router = await start_router([dead, prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
    await router.close()
    root = collector.root()
    _, _, failed, again, served = collector.children(root)
    assert names([failed, again, served]) == ["prefill", "prefill", "decode"]
    assert [span.status for span in (failed, again, served, root)] == [ERROR, OK, OK, OK]
    assert failed.attributes["error.type"] == "BrokenAnswerError"
    assert again.attributes["http.request.resend_count"] == 1
    assert root.attributes["vllm_pd.retries"] == 1
    assert sent_parent(dead)[1] == failed.span_id
    assert sent_parent(prefill)[1] == again.span_id


async def test_a_failed_request_is_a_tree_of_errors(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    collector: Collector,
) -> None:
    dead = await start_instance(drops)
    router = await start_router([prefill], [dead], otlp_traces_endpoint=collector.endpoint)
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 502
    await router.close()
    root = collector.root()
    assert root.attributes["http.response.status_code"] == 502
    assert (root.status, root.message) == (ERROR, "The decode instance failed.")
    last = collector.children(root)[-1]
    assert (last.name, last.status) == ("decode", ERROR)


async def test_a_stream_that_breaks_is_an_error_of_its_leg(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    collector: Collector,
) -> None:
    decode = await start_instance(Streams([b"data: {}\n\n"], die=True))
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    async with router.post(COMPLETIONS, json=BODY | {"stream": True}) as response:
        await response.read()
    await router.close()
    root = collector.root()
    leg = collector.children(root)[-1]
    assert (leg.name, leg.status, leg.events) == ("decode", ERROR, ["answer begins"])
    assert root.attributes["http.response.status_code"] == 502


async def test_a_client_that_leaves_is_no_error(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    collector: Collector,
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    request = asyncio.ensure_future(router.post(COMPLETIONS, json=BODY))
    await decode.started.wait()
    request.cancel()
    await decode.cancelled.wait()
    await router.close()
    root = collector.root()
    leg = collector.children(root)[-1]
    assert (root.status, root.attributes["http.response.status_code"]) == (OK, 499)
    assert (leg.name, leg.status, leg.attributes["vllm_pd.cancelled"]) == ("decode", OK, True)


async def test_a_refusal_of_the_clients_request_is_no_error_of_the_router(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    collector: Collector,
) -> None:
    decode = await start_instance(answers(400, {"error": {}}))
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    async with router.post(CHAT, json=BODY) as response:
        assert response.status == 400
    await router.close()
    root = collector.root()
    assert (root.status, collector.children(root)[-1].status) == (OK, ERROR)
    assert root.attributes["gen_ai.operation.name"] == "chat"


async def test_without_a_parent_the_trace_begins_here(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    collector: Collector,
) -> None:
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    headers = {"traceparent": "nonsense", "tracestate": "of=nobody"}
    async with router.post(COMPLETIONS, json=BODY, headers=headers):
        pass
    await router.close()
    assert collector.root().parent_id == ""
    assert sent_parent(decode)[0] == collector.root().trace_id
    assert "tracestate" not in decode.received[0].headers


async def test_what_the_client_does_not_sample_is_not_sent_but_passed_on(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    collector: Collector,
) -> None:
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    async with router.post(COMPLETIONS, json=BODY, headers=headers):
        pass
    await router.close()
    assert collector.spans == []
    assert sent_parent(decode)[0] == TRACE_ID
    assert decode.received[0].headers["traceparent"].endswith("-00")


async def test_probes_are_not_traced(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    collector: Collector,
) -> None:
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    for path in ("/health", "/ready", "/metrics"):
        async with router.get(path):
            pass
    await router.close()
    assert collector.spans == []


async def test_the_environment_names_the_service(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)
    async with router.post(COMPLETIONS, json=BODY):
        pass
    await router.close()
    (resource,) = collector.resources
    assert resource["service.name"] == "mine"
    assert resource["deployment.environment.name"] == "test"


async def test_a_collector_that_is_not_there_costs_the_client_nothing(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    unused_tcp_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.1")
    endpoint = f"http://127.0.0.1:{unused_tcp_port}/v1/traces"
    router = await start_router([prefill], [decode], otlp_traces_endpoint=endpoint)
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200


async def test_without_traces_the_clients_parent_goes_on_to_the_engines(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode])
    async with router.post(COMPLETIONS, json=BODY, headers=SAMPLED):
        pass
    for instance in (prefill, decode):
        assert sent_parent(instance) == (TRACE_ID, PARENT_ID)


def test_an_unknown_protocol_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    with pytest.raises(ConfigError, match="'pigeon' is not supported"):
        open_tracer("http://127.0.0.1:4318/v1/traces")


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_without_traces_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys; from vllm_pd.router import serving;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"])
def test_missing_packages_are_named_with_what_to_do(name: str) -> None:
    code = (
        f"import sys; sys.modules['{name}'] = None\n"
        "from vllm_pd.errors import ConfigError\n"
        "from vllm_pd.router.spans import open_tracer\n"
        "try: open_tracer('http://127.0.0.1:4318')\n"
        "except ConfigError as exc: print(exc)"
    )
    said = run_python(code)
    assert f"otlp_traces_endpoint needs OpenTelemetry, and {name}" in said
    assert "pip install 'vllm-pd[otel]'" in said


async def test_a_model_name_that_is_no_text_is_made_one(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    collector: Collector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    router = await start_router([prefill], [decode], otlp_traces_endpoint=collector.endpoint)

    async with router.post(COMPLETIONS, json=BODY | {"model": "a\ud800"}):
        pass
    await router.close()

    assert collector.root().attributes["gen_ai.request.model"] == "a?"
    assert "Traceback" not in caplog.text
