"""The routers that are compared, each in front of the same null backends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.service.servers import free_ports, running
from benchmarks.transfer import peers
from benchmarks.transfer.pair import REPO

OURS = "vllm-pd"
DIRECT = "direct"
"""No router: the load generator sends both legs itself."""
VLLM_ROUTER = "vllm-router"
XPYD = "xpyd-proxy"
FOREIGN = (VLLM_ROUTER, XPYD)
PROXIES = (DIRECT, OURS, *FOREIGN)

PEERS = peers.Packages(
    folder=Path(__file__).resolve().parent / ".venv-peers",
    requirements=Path(__file__).resolve().parent / "requirements.txt",
    modules=("vllm_router.launch_router", "xpyd.proxy"),
)


@dataclass(frozen=True, slots=True)
class Backends:
    """The null backends.

    Attributes:
        prefill_port: of the prefill instance.
        decode_port: of the decode instance.
    """

    prefill_port: int
    decode_port: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load generator sends requests.

    Attributes:
        proxy: one of ``PROXIES``.
        ports: its port, or those of the backends in the order of the legs.
        pid: of its process; None without a router.
    """

    proxy: str
    ports: Sequence[int]
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class _Command:
    argv: Sequence[str]
    ready_path: str = "/health"
    env: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def backends(folder: Path) -> Iterator[Backends]:
    """Run the null backends.

    Args:
        folder: for their log.

    Raises:
        BenchError: they do not start.
    """
    found = Backends(*free_ports(2))
    argv = [sys.executable, "-m", "benchmarks.router.backend"]
    argv += [str(found.prefill_port), str(found.decode_port)]
    ready_url = f"http://127.0.0.1:{found.decode_port}/health"
    with running(folder / "backends.log", argv, ready_url, {"PYTHONPATH": str(REPO)}):
        yield found


@contextlib.contextmanager
def started(proxy: str, behind: Backends, folder: Path, python: Path | None) -> Iterator[Target]:
    """Run a router in front of the backends.

    Args:
        proxy: one of ``PROXIES``.
        behind: the backends.
        folder: for its log and configuration.
        python: of the peers' environment.

    Raises:
        BenchError: it does not start.
    """
    if proxy == DIRECT:
        yield Target(proxy, (behind.prefill_port, behind.decode_port))
        return
    (port,) = free_ports(1)
    command = _command(proxy, port, behind, folder, python)
    ready_url = f"http://127.0.0.1:{port}{command.ready_path}"
    with running(folder / f"{proxy}.log", command.argv, ready_url, command.env) as pid:
        yield Target(proxy, (port,), pid)


def _command(
    proxy: str, port: int, behind: Backends, folder: Path, python: Path | None
) -> _Command:
    prefill = f"http://127.0.0.1:{behind.prefill_port}"
    decode = f"http://127.0.0.1:{behind.decode_port}"
    if proxy == OURS:
        argv = [sys.executable, "-P", "-m", "vllm_pd.cli", "router", "--port", str(port)]
        return _Command([*argv, "--prefill", prefill, "--decode", decode], "/ready")
    assert python is not None
    if proxy == VLLM_ROUTER:
        argv = [str(python.with_name("vllm-router")), "--port", str(port)]
        argv += ["--vllm-pd-disaggregation", "--kv-connector", "nixl", "--policy", "round_robin"]
        argv += ["--prefill", prefill, "--decode", decode, "--log-level", "warning"]
        return _Command([*argv, "--prometheus-port", str(free_ports(1)[0])])
    config = folder / "xpyd.yaml"
    config.write_text(
        f"model: m\nprefill: ['127.0.0.1:{behind.prefill_port}']\n"
        f"decode: ['127.0.0.1:{behind.decode_port}']\nport: {port}\nscheduling: roundrobin\n"
    )
    argv = [str(python.with_name("xpyd")), "proxy", "--config", str(config)]
    argv += ["--disaggregated-mode", "nixl", "--log-level", "warning"]
    # Without a hub to ask for the tokenizer of a model that is none.
    return _Command(argv, env={"HF_HUB_OFFLINE": "1"})


def memory_len(pid: int) -> int:
    """Return the largest resident memory so far of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024
