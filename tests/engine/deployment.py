"""Real deployments for tests: the command line a user has, real vLLM behind it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.ports import free_ports

REPO = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300
ENGINE_ARGS = ["--max-model-len", "4096", "--max-num-seqs", "32", "--dtype", "float32"]


def get(url: str, timeout_s: float = 10.0) -> str:
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        text: str = response.read().decode()
        return text


def metric(url: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that carry the labels."""
    total, found = 0.0, False
    for line in get(f"{url}/metrics").splitlines():
        match = re.fullmatch(r"(\S+?)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            seen = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= seen.items():
                total, found = total + float(match[3]), True
    assert found, f"{url} has no metric {name} {labels}"
    return total


@dataclass
class Deployment:
    """What ``vllm-pd up`` started."""

    run_dir: Path
    router: str
    prefill: list[str]
    decode: list[str]
    topology: dict[str, Any] = field(default_factory=dict)

    def cli(
        self, *args: str, check: bool = True, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        return run_cli(*args, "--run-dir", str(self.run_dir), check=check, timeout_s=timeout_s)

    def status(self) -> dict[str, dict[str, Any]]:
        """Return what ``vllm-pd status --json`` says, by process name."""
        done = self.cli("status", "--json", check=False)
        return {entry["name"]: entry for entry in json.loads(done.stdout)["processes"]}

    def tokens_by_source(self) -> dict[str, float]:
        """Return where the decode instances' prompt tokens came from."""
        sources = ("external_kv_transfer", "local_cache_hit", "local_compute")
        name = "vllm:prompt_tokens_by_source_total"
        return {s: sum(metric(url, name, source=s) for url in self.decode) for s in sources}

    def wait_until_no_block_is_used(self, timeout_s: float = 20.0) -> None:
        """Wait until every instance has all of its blocks free again."""
        deadline = time.monotonic() + timeout_s
        while True:
            used = {
                url: metric(url, "vllm:kv_cache_usage_perc") for url in self.prefill + self.decode
            }
            if not any(used.values()):
                return
            assert time.monotonic() < deadline, f"blocks still in use: {used}"
            time.sleep(0.2)


def run_cli(
    *args: str, check: bool = True, timeout_s: float = 120.0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``vllm-pd`` as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_pd.cli", *args],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{args}: {done.stdout}\n{done.stderr}"
    return done


@contextlib.contextmanager
def deployed(
    run_dir: Path,
    model: Path,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    tp: tuple[int, int] = (1, 1),
    **changes: Any,
) -> Iterator[Deployment]:
    """Start a deployment, and stop it whatever happens.

    Args:
        run_dir: where its files go.
        model: the checkpoint.
        num_prefill: prefill instances.
        num_decode: decode instances.
        tp: tensor-parallel sizes of prefill and decode.
        changes: further keys of the topology.
    """
    ports = free_ports(1 + num_prefill + num_decode)
    topology = {
        "model": str(model),
        "served_model_name": "m",
        "device": "cpu",
        "prefill": {"count": num_prefill, "port": ports[1], "tp": tp[0]},
        "decode": {"count": num_decode, "port": ports[1 + num_prefill], "tp": tp[1]},
        "router": {"port": ports[0], **changes.pop("router", {})},
        "kv_cache_space_gib": 1,
        "args": ENGINE_ARGS,
        **changes,
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "topology.yaml"
    config.write_text(yaml.safe_dump(topology))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    deployment = Deployment(
        run_dir, urls[0], urls[1 : 1 + num_prefill], urls[1 + num_prefill :], topology
    )
    try:
        deployment.cli("up", "--config", str(config), timeout_s=START_TIMEOUT_S)
        yield deployment
    finally:
        deployment.cli("down", timeout_s=120)


@contextlib.contextmanager
def served(
    folder: Path,
    model: Path,
    *,
    name: str = "colocated",
    core: int = 0,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    **kv_transfer: Any,
) -> Iterator[str]:
    """Start one ``vllm serve`` by hand, with further ``env``; yield its address.

    Without ``kv_transfer`` it has no connector: the colocated instance that the
    answers of a deployment are compared with.
    """
    (port,) = free_ports(1)
    cores = sorted(os.sched_getaffinity(0))
    env = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(cores[core % len(cores)]),
        "PYTHONPATH": str(REPO),
        **(env or {}),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    command += ["--enforce-eager", *ENGINE_ARGS, *args]
    if kv_transfer:
        command += ["--kv-transfer-config", json.dumps(kv_transfer)]
    with running(folder / f"{name}.log", command, f"http://127.0.0.1:{port}", env) as url:
        yield url


@contextlib.contextmanager
def routed(folder: Path, prefill: str, decode: str, **options: Any) -> Iterator[str]:
    """Start ``vllm-pd router`` by hand, with further keys; yield its address."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "vllm_pd.cli", "router", "--port", str(port)]
    command += ["--prefill", prefill, "--decode", decode, "--options", json.dumps(options)]
    with running(folder / "router.log", command, f"http://127.0.0.1:{port}", {}) as url:
        yield url


@contextlib.contextmanager
def running(log: Path, command: list[str], url: str, env: dict[str, str]) -> Iterator[str]:
    """Run a server until the end of the block; it is there when /health answers."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=file,
            stderr=file,
            process_group=0,  # no session of its own: see launcher/child.py on what starves then
            cwd=log.parent,
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers(f"{url}/health"):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        get(url, timeout_s=2.0)
    except (urllib.error.URLError, OSError):
        return False
    return True
