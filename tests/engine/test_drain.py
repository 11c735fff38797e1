"""SIGTERM to a prefill instance: it ends when nobody needs its KV cache any more."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.engine.deployment import metric
from tests.engine.instances import Instance, started
from tests.engine.workload import Case, completion

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [7 + i % 900 for i in range(700)]
DRAIN_S = 90


@contextmanager
def instance(
    folder: Path, model: Path, name: str, *args: str, lease_s: float, core: int
) -> Iterator[Instance]:
    options: dict[str, Any] = {
        "kv_connector": "PDConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lease_s": lease_s},
    }
    args = ("--shutdown-timeout", str(DRAIN_S), *args)
    with started(folder, model, name, core=core, args=args, **options) as instance:
        yield instance


def post(url: str, case: Case, params: dict[str, Any]) -> dict[str, Any]:
    """Send one leg by hand, as a router does."""
    with open_leg(url, case, params) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def open_leg(url: str, case: Case, params: dict[str, Any]) -> HTTPResponse:
    """Send one leg by hand; closing its answer aborts it."""
    request = urllib.request.Request(
        url + case.path,
        json.dumps({**case.body, "kv_transfer_params": params}).encode(),
        {"Content-Type": "application/json"},
    )
    response: HTTPResponse = urllib.request.urlopen(request, timeout=60.0)
    return response


def prefill_leg(url: str) -> dict[str, Any]:
    """Return the params by which a decode instance finds the KV cache."""
    case = completion(PROMPT, stream=False, max_tokens=1)
    params: dict[str, Any] = post(url, case, {"do_remote_decode": True})["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    return params


def test_prefill_instance_waits_until_the_lease_ends_and_exits_cleanly(
    model: Path, tmp_path: Path
) -> None:
    with instance(tmp_path, model, "prefill", lease_s=8.0, core=0) as prefill:
        granted = time.monotonic()
        prefill_leg(prefill.url)
        prefill.terminate()
        assert prefill.wait_exit(60.0) == 0
        assert time.monotonic() - granted > 8.0
        assert "nobody fetched its KV cache before the lease ended" in prefill.log.read_text()
        assert prefill.errors() == []


def test_blocks_are_kept_for_a_request_that_queues_and_the_drain_ends_when_it_has_them(
    model: Path, tmp_path: Path
) -> None:
    with (
        instance(tmp_path, model, "prefill", lease_s=4.0, core=0) as prefill,
        instance(tmp_path, model, "decode", "--max-num-seqs", "1", lease_s=4.0, core=1) as decode,
        ThreadPoolExecutor(1) as pool,
    ):
        # Its choices run one after the other: more than any machine can end while this test lasts.
        endless = completion([5] * 9, stream=True, max_tokens=4000)
        endless.body.update(n=100, temperature=1)  # vLLM refuses greedy choices, all alike
        with open_leg(decode.url, endless, {}) as busy:
            busy.readline()  # it runs, and nothing else can
            params = prefill_leg(prefill.url)
            prefill.terminate()
            case = completion(PROMPT, stream=False, max_tokens=4)
            queued = pool.submit(post, decode.url, case, params)
            time.sleep(12.0)  # three leases
            assert not queued.done()
            assert prefill.is_running()
        queued.result()
        source = "vllm:prompt_tokens_by_source_total"
        num_loaded = metric(decode.url, source, source="external_kv_transfer")
        assert num_loaded == len(PROMPT), decode.log.read_text()[-3000:]
        assert prefill.wait_exit(DRAIN_S / 2) == 0
        assert prefill.errors() == []
