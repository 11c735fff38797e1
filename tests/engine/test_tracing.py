"""Traces through real engines: the router's spans and vLLM's own make one tree."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.collector import Collector, Seen
from tests.engine.deployment import ENGINE_ARGS, deployed

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
ENGINES_SPAN = "llm_request"
EXPORT_TIMEOUT_S = 30.0


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector in a thread, as the commands of a deployment block this one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    collector = Collector()
    try:
        asyncio.run_coroutine_threadsafe(collector.__aenter__(), loop).result()
        yield collector
    finally:
        asyncio.run_coroutine_threadsafe(collector.__aexit__(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def ask(url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()


def wait_for_spans(collector: Collector, count: int) -> list[Seen]:
    """Return the spans of the trace once there are as many; they come in batches."""
    deadline = time.monotonic() + EXPORT_TIMEOUT_S
    while True:
        spans = [span for span in collector.spans if span.trace_id == TRACE_ID]
        if len(spans) >= count or time.monotonic() > deadline:
            return spans
        time.sleep(0.1)


def test_router_and_engines_make_one_tree_and_the_log_names_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    access_log = tmp_path / "access.log"
    with (
        collecting() as collector,
        deployed(
            tmp_path / "run",
            model,
            router={"otlp_traces_endpoint": collector.endpoint, "access_log": str(access_log)},
            args=[*ENGINE_ARGS, "--otlp-traces-endpoint", collector.endpoint],
        ) as deployment,
    ):
        body = {"model": "m", "prompt": [11] * 300, "max_tokens": 5, "ignore_eos": True}
        ask(deployment.router, body, {"traceparent": TRACEPARENT, "X-Request-Id": "r1"})
        spans = wait_for_spans(collector, 7)

    by_id = {span.span_id: span for span in spans}
    engines = [span for span in spans if span.name == ENGINES_SPAN]
    assert sorted(by_id[span.parent_id].name for span in engines) == ["decode", "prefill"]
    (root,) = (span for span in spans if span.parent_id not in by_id)
    assert root.name == "POST /v1/completions"
    assert root.attributes["gen_ai.usage.input_tokens"] == 300
    assert root.attributes["gen_ai.usage.output_tokens"] == 5
    for span in engines:
        assert span.attributes["gen_ai.usage.prompt_tokens"] == 300
        assert "r1" in span.attributes["gen_ai.request.id"]

    # Written when the router was told to stop, at the latest.
    lines = [json.loads(line) for line in access_log.read_text().splitlines()]
    (line,) = (line for line in lines if line["request_id"] == "r1")
    assert line["trace_id"] == TRACE_ID
    assert (line["status"], line["pd_path"]) == (200, "disaggregated")
    assert (line["prefill"], line["decode"]) == (deployment.prefill[0], deployment.decode[0])
    assert (line["prompt_tokens"], line["completion_tokens"]) == (300, 5)
