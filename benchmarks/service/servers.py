"""The services that are compared, as a user starts them; all end with the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.transfer.pair import BenchError
from vllm_pd.launcher.devices import is_slow_in_16_bit, read_cpuinfo
from vllm_pd.launcher.model import is_quantized

MODEL_NAME = "m"
ENGINE_ARGS = ("--max-model-len", "4096", "--max-num-seqs", "32")

_given: set[int] = set()

_HERE = Path(__file__).resolve().parent
_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0
_PROBE_INTERVAL_S = 0.25
_LAST_WORDS_LEN = 300
# ``vllm-pd up`` prefers these to a topology file, and a benchmark wants no faults.
_NOT_FOR_UP = (
    "MODEL",
    "PREFILL",
    "DECODE",
    "DEVICE",
    "PORT",
    "PREFILL_PORT",
    "DECODE_PORT",
    "VLLM_PD_RUN_DIR",
    "VLLM_PD_TRANSPORT",
    "VLLM_PD_FAULTS",
)


@dataclass(frozen=True, slots=True)
class Engine:
    """How every engine is run.

    Attributes:
        model: checkpoint folder.
        kv_gib: KV cache of each, in GiB.
        folder: for logs and state.
    """

    model: Path
    kv_gib: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Instance:
    """One ``vllm serve`` that answers.

    Attributes:
        name: for people.
        url: base URL.
        pid: of its API server, the parent of its other processes.
    """

    name: str
    url: str
    pid: int


@dataclass(frozen=True, slots=True)
class Service:
    """A router in front of two instances.

    Attributes:
        name: ``vllm-pd`` or the peer.
        url: of the router.
        prefill: the prefill instance.
        decode: the decode instance.
    """

    name: str
    url: str
    prefill: Instance
    decode: Instance


@contextlib.contextmanager
def deployed(
    engine: Engine, cores: tuple[int, int], connector: Mapping[str, Any]
) -> Iterator[Service]:
    """Run ``vllm-pd up`` with one prefill and one decode instance.

    Args:
        engine: how to run both.
        cores: of prefill and decode.
        connector: ``kv_connector_extra_config`` of both.

    Raises:
        BenchError: it does not start.
    """
    ports = free_ports(3)
    with launched(engine.folder / "vllm-pd", topology(engine, cores, connector, ports)) as pids:
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        yield Service(
            "vllm-pd",
            urls[0],
            Instance("prefill", urls[1], pids["prefill-0"]),
            Instance("decode", urls[2], pids["decode-0"]),
        )


@contextlib.contextmanager
def launched(run_dir: Path, values: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Run ``vllm-pd up`` with a topology; yield its processes by name.

    Raises:
        BenchError: it does not start.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "topology.yaml"
    config.write_text(yaml.safe_dump(dict(values)))
    guard = subprocess.Popen(
        [sys.executable, "-P", str(_HERE / "guard.py"), str(run_dir)],
        stdin=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for the benchmark, which closes the pipe
    )
    try:
        _up(run_dir, config)
        yield _pids(run_dir)
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        _wait_for(guard)


@contextlib.contextmanager
def served(
    engine: Engine,
    name: str,
    core: int | str,
    *args: str,
    env: Mapping[str, str] | None = None,
) -> Iterator[Instance]:
    """Run one ``vllm serve`` with what ``vllm-pd up`` would set, but no connector.

    Raises:
        BenchError: it does not start.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(engine.model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME]
    command += ["--enforce-eager", *ENGINE_ARGS, *dtype_args(), *args]
    variables = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        **(env or {}),
    }
    url = f"http://127.0.0.1:{port}"
    with running(engine.folder / f"{name}.log", command, f"{url}/health", variables) as pid:
        yield Instance(name, url, pid)


@contextlib.contextmanager
def routed(engine: Engine, name: str, prefill: Instance, decode: Instance) -> Iterator[Service]:
    """Run ``vllm-pd router`` in front of two instances.

    Raises:
        BenchError: it does not start.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-P", "-m", "vllm_pd.cli", "router", "--port", str(port)]
    command += ["--prefill", prefill.url, "--decode", decode.url]
    url = f"http://127.0.0.1:{port}"
    with running(engine.folder / f"{name}-router.log", command, f"{url}/ready", {}):
        yield Service(name, url, prefill, decode)


def topology(
    engine: Engine, cores: tuple[int, int], connector: Mapping[str, Any], ports: Sequence[int]
) -> dict[str, Any]:
    """Return the topology file of the deployment; ``ports`` of router, prefill and decode."""
    return {
        "model": str(engine.model),
        "served_model_name": MODEL_NAME,
        "device": "cpu",
        "router": {"port": ports[0]},
        "prefill": {"port": ports[1], "devices": [cores[0]]},
        "decode": {"port": ports[2], "devices": [cores[1]]},
        "connector": dict(connector),
        "kv_cache_space_gib": engine.kv_gib,
        "args": list(ENGINE_ARGS),
        "start_timeout_s": _START_TIMEOUT_S,
    }


def dtype_args(device: str = "cpu", model: str | None = None) -> tuple[str, ...]:
    """Return the type that ``vllm-pd up`` chooses here, for instances that it does not start.

    Args:
        device: what they compute on.
        model: folder or name; None: an untrained one of ours.
    """
    is_slow = device == "cpu" and is_slow_in_16_bit(platform.machine(), read_cpuinfo())
    is_possible = model is None or is_quantized(model) is False
    return ("--dtype", "float32") if is_slow and is_possible else ()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on.

    Not from the range out of which the kernel serves outgoing connections: one of
    those could be taken again before the server that is to have it has started.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if port not in _given and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
                _given.add(port)  # its server may not listen yet when the next one is chosen
    return found


def _wait_for(guard: subprocess.Popen[bytes]) -> None:
    """Wait until everything is stopped; an impatient Ctrl-C must not remove its state file."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            guard.wait()
            return


def _up(run_dir: Path, config: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_UP}
    command = [sys.executable, "-P", "-m", "vllm_pd.cli", "up"]
    command += ["--config", str(config), "--run-dir", str(run_dir)]
    log = run_dir / "up.log"
    with log.open("wb") as file:
        up = _start(command, environ, file)
        try:
            status = up.wait()
        except BaseException:
            up.terminate()  # it stops what it has started
            up.wait()
            raise
    if status:
        raise BenchError(f"vllm-pd up: {_last_words(log)}")


def _pids(run_dir: Path) -> dict[str, int]:
    """Return the processes of the deployment."""
    command = [sys.executable, "-P", "-m", "vllm_pd.cli", "status", "--json"]
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"vllm-pd status: {' '.join(done.stderr.split()) or 'not ready'}")
    return {entry["name"]: entry["pid"] for entry in json.loads(done.stdout)["processes"]}


@contextlib.contextmanager
def running(
    log: Path, command: Sequence[str], ready_url: str, env: Mapping[str, str]
) -> Iterator[int]:
    """Run a server until the end of the block; yield its process id once it is ready.

    Raises:
        BenchError: it does not start.
    """
    with starting(log, command, env) as process:
        wait_ready(process, ready_url, log)
        yield process.pid


@contextlib.contextmanager
def starting(
    log: Path, command: Sequence[str], env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the block; ``wait_ready`` waits until it answers.

    Raises:
        BenchError: it cannot be run.
    """
    with log.open("wb") as file:
        process = _start(command, {**os.environ, **env}, file)
    try:
        yield process
    finally:
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
        finally:  # an impatient Ctrl-C ends the waiting, not this
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
            process.wait()


def wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until a server answers at ``url``.

    Raises:
        BenchError: it ended before, or takes too long.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _answers(url):
        if process.poll() is not None:
            raise BenchError(f"{log.stem} ended while starting: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise BenchError(f"{log.stem} was not ready within {_START_TIMEOUT_S:g} s")
        time.sleep(_PROBE_INTERVAL_S)


def _start(command: Sequence[str], environ: Mapping[str, str], log: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", str(_HERE / "tied.py"), str(os.getpid()), *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C is for the benchmark, which ends it
        )
    except OSError as exc:
        raise BenchError(f"cannot start {command[0]}: {exc}") from exc


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _last_words(log: Path) -> str:
    """Return the last line of a log, or the last that names an error."""
    lines = log.read_text(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()] or ["no output"]
    errors = [line for line in lines if "rror:" in line]
    return (errors or lines)[-1][-_LAST_WORDS_LEN:]
