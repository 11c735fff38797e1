"""SIGTERM to a prefill instance: it ends when nobody needs its KV cache any more."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.deployment import metric, served
from tests.engine.workload import Case, completion

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [7 + i % 900 for i in range(700)]
DRAIN_S = 90
LONG_LEASE_S = 60.0


@dataclass(frozen=True)
class Instance:
    """One ``vllm serve``, started by hand."""

    url: str
    log: Path
    pid: int  # a child of this process

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def errors(self) -> list[str]:
        """Return what engine and worker logged as errors; the API server's are vLLM's own."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if re.match(r"\((EngineCore|Worker).*\) ERROR", line)]

    def wait_exit(self, timeout_s: float) -> int:
        """Wait until it ends by itself; return the exit code."""
        deadline = time.monotonic() + timeout_s
        while self.is_running():
            assert time.monotonic() < deadline, f"still running: {self.log.read_text()[-3000:]}"
            time.sleep(0.05)
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert ended.si_code == os.CLD_EXITED, f"killed by signal {ended.si_status}"
        return ended.si_status


@contextmanager
def instance(
    folder: Path, model: Path, name: str, *, lease_s: float, core: int
) -> Iterator[Instance]:
    options = {
        "kv_connector": "PDConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lease_s": lease_s},
    }
    drain = ["--shutdown-timeout", str(DRAIN_S)]
    with served(folder, model, name=name, core=core, args=drain, **options) as url:
        log = folder / f"{name}.log"
        found = re.search(r"APIServer pid=(\d+)", log.read_text())
        assert found
        yield Instance(url, log, int(found[1]))


def post(url: str, case: Case, params: dict[str, Any]) -> dict[str, Any]:
    """Send one leg by hand, as a router does."""
    request = urllib.request.Request(
        url + case.path,
        json.dumps({**case.body, "kv_transfer_params": params}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60.0) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


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


def test_blocks_are_fetched_during_the_drain_which_then_ends_at_once(
    model: Path, tmp_path: Path
) -> None:
    with (
        instance(tmp_path, model, "prefill", lease_s=LONG_LEASE_S, core=0) as prefill,
        instance(tmp_path, model, "decode", lease_s=LONG_LEASE_S, core=1) as decode,
    ):
        granted = time.monotonic()
        params = prefill_leg(prefill.url)
        prefill.terminate()
        while "mode=drain" not in prefill.log.read_text():
            time.sleep(0.05)
        post(decode.url, completion(PROMPT, stream=False, max_tokens=4), params)
        source = "vllm:prompt_tokens_by_source_total"
        assert metric(decode.url, source, source="external_kv_transfer") == len(PROMPT)
        assert prefill.wait_exit(60.0) == 0
        assert time.monotonic() - granted < LONG_LEASE_S
        assert prefill.errors() == []


def test_instance_without_leases_ends_at_once(model: Path, tmp_path: Path) -> None:
    with instance(tmp_path, model, "prefill", lease_s=LONG_LEASE_S, core=0) as prefill:
        told = time.monotonic()
        prefill.terminate()
        assert prefill.wait_exit(60.0) == 0
        assert time.monotonic() - told < DRAIN_S / 3
