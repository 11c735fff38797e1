"""The deployments that are compared, on the same devices, one after the other."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.service import nixl
from benchmarks.service.servers import (
    MODEL_NAME,
    free_ports,
    launched,
    running,
    starting,
    wait_ready,
)
from benchmarks.transfer.pair import BenchError
from vllm_pd.launcher.devices import VISIBLE_DEVICES
from vllm_pd.launcher.split import core_list

PD, COLOCATED, REPLICAS, CHUNKED, NIXL = "pd", "colocated", "replicas", "chunked", "nixl"

CONTROL = "control"
"""The same as ``REPLICAS``, once more: what is found between these two is what the machine does."""

CHUNK_TOKENS = 256
"""Token budget of a step with chunked prefill: the small end of what is usual, for short stalls."""

TITLES = {
    PD: "PD: one prefill, one decode instance",
    COLOCATED: "colocated, one instance on all devices",
    REPLICAS: "colocated, two instances behind the router",
    CHUNKED: f"colocated, two instances, prefill in chunks of {CHUNK_TOKENS} tokens",
    NIXL: "PD with vLLM's NixlConnector, behind the router",
    CONTROL: "control: two colocated instances, once more",
}


@dataclass(frozen=True, slots=True)
class Site:
    """Where and how all deployments run.

    Attributes:
        model: checkpoint folder or Hugging Face name.
        device: ``cpu``, ``cuda`` or ``npu``.
        pool: the devices, or CPU cores, that each deployment gets; an even number.
        args: ``vllm serve`` arguments of every instance.
        kv_gib: KV cache on the CPU, in GiB, of each of two instances; one alone gets twice that.
        folder: for logs and state.
    """

    model: str
    device: str
    pool: tuple[str, ...]
    args: tuple[str, ...]
    kv_gib: int
    folder: Path

    @property
    def halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The devices of each of two instances."""
        middle = len(self.pool) // 2
        return self.pool[:middle], self.pool[middle:]

    def tp(self, devices: Sequence[str]) -> int:
        """Return the tensor-parallel size: on the CPU the cores are threads of one rank."""
        return 1 if self.device == "cpu" else len(devices)


@contextlib.contextmanager
def deployed(name: str, site: Site) -> Iterator[str]:
    """Run a deployment; yield the address for clients.

    Raises:
        BenchError: it does not start.
    """
    with _DEPLOYMENTS[name](site) as url:
        yield url


@contextlib.contextmanager
def _pd(site: Site) -> Iterator[str]:
    ports = free_ports(3)
    with launched(site.folder / PD, topology(site, ports)):
        yield f"http://127.0.0.1:{ports[0]}"


@contextlib.contextmanager
def _colocated(site: Site) -> Iterator[str]:
    alone = _Instance(COLOCATED, site.pool, kv_gib=2 * site.kv_gib)
    with _running(site, [alone]) as (url,):
        yield url


@contextlib.contextmanager
def _two(site: Site, name: str = REPLICAS, *args: str) -> Iterator[str]:
    instances = [
        _Instance(f"{name}-{number}", devices, args) for number, devices in enumerate(site.halves)
    ]
    with _running(site, instances) as urls, routed(site, name, [], urls) as url:
        yield url


def _chunked(site: Site) -> contextlib.AbstractContextManager[str]:
    budget = str(CHUNK_TOKENS)
    return _two(site, CHUNKED, "--enable-chunked-prefill", "--max-num-batched-tokens", budget)


@contextlib.contextmanager
def _nixl(site: Site) -> Iterator[str]:
    packages = site.folder / "packages"
    nixl.link_packages(nixl.find_packages(), packages)
    args = ("--kv-transfer-config", json.dumps(nixl.KV_TRANSFER))
    instances = [
        _Instance(f"{NIXL}-{role}", devices, args, nixl.variables(packages, port))
        for role, devices, port in zip(
            ("prefill", "decode"), site.halves, free_ports(2), strict=True
        )
    ]
    with _running(site, instances) as urls, routed(site, NIXL, urls[:1], urls[1:]) as url:
        yield url


_DEPLOYMENTS: Mapping[str, Callable[[Site], contextlib.AbstractContextManager[str]]] = {
    REPLICAS: _two,
    PD: _pd,
    COLOCATED: _colocated,
    CHUNKED: _chunked,
    NIXL: _nixl,
    CONTROL: lambda site: _two(site, CONTROL),
}


def topology(site: Site, ports: Sequence[int]) -> dict[str, Any]:
    """Return the topology of the PD deployment; ``ports`` of router, prefill and decode."""
    prefill, decode = (
        {"port": port, "tp": site.tp(devices), "devices": [int(device) for device in devices]}
        for port, devices in zip(ports[1:], site.halves, strict=True)
    )
    values = {
        "model": site.model,
        "served_model_name": MODEL_NAME,
        "device": site.device,
        "router": {"port": ports[0]},
        "prefill": prefill,
        "decode": decode,
        "args": list(site.args),
    }
    return values | ({"kv_cache_space_gib": site.kv_gib} if site.device == "cpu" else {})


def device_env(site: Site, devices: Sequence[str], kv_gib: int) -> dict[str, str]:
    """Return the variables that give an instance its devices, as ``vllm-pd up`` sets them."""
    if site.device != "cpu":
        return {VISIBLE_DEVICES[site.device]: ",".join(devices)}
    return {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": core_list(devices),
    }


@dataclass(frozen=True, slots=True)
class _Instance:
    """One ``vllm serve`` that the launcher does not start.

    Attributes:
        name: of its log.
        devices: what it gets.
        args: beside those of the site.
        env: further variables.
        kv_gib: KV cache on the CPU; None: that of the site.
    """

    name: str
    devices: Sequence[str]
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    kv_gib: int | None = None


@contextlib.contextmanager
def _running(site: Site, instances: Sequence[_Instance]) -> Iterator[list[str]]:
    """Run instances, which start at the same time; yield their URLs."""
    ports = free_ports(len(instances))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    logs = [site.folder / f"{one.name}.log" for one in instances]
    with contextlib.ExitStack() as stack:
        processes = []
        for one, port, log in zip(instances, ports, logs, strict=True):
            env = {**device_env(site, one.devices, one.kv_gib or site.kv_gib), **one.env}
            processes.append(stack.enter_context(starting(log, _command(site, one, port), env)))
        for process, url, log in zip(processes, urls, logs, strict=True):
            wait_ready(process, f"{url}/health", log)
        yield urls


def _command(site: Site, instance: _Instance, port: int) -> list[str]:
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", site.model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME]
    command += ["--tensor-parallel-size", str(site.tp(instance.devices))]
    eager = ["--enforce-eager"] if site.device == "cpu" else []
    return [*command, *eager, *site.args, *instance.args]


@contextlib.contextmanager
def routed(site: Site, name: str, prefill: Sequence[str], decode: Sequence[str]) -> Iterator[str]:
    """Run the router; without prefill instances it balances the load of the others."""
    (port,) = free_ports(1)
    # A file may leave prefill instances for later, which options may not.
    instances = site.folder / f"{name}-instances.yaml"
    entries = [{"url": url, "role": "prefill"} for url in prefill]
    entries += [{"url": url, "role": "decode"} for url in decode]
    instances.write_text(yaml.safe_dump({"instances": entries}))
    options: dict[str, Any] = {"instances_file": str(instances)}
    if not prefill:  # the limit on prompts at decode instances is not for this
        options["max_local_prefill_tokens"] = 2**31 - 1
    command = [sys.executable, "-P", "-m", "vllm_pd.cli", "router", "--port", str(port)]
    command += ["--options", json.dumps(options)]
    url = f"http://127.0.0.1:{port}"
    with running(site.folder / f"{name}-router.log", command, f"{url}/health", {}):
        yield url


def check_pool(pool: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Check that the devices can be given to two equal instances.

    Raises:
        BenchError: they cannot.
    """
    if not pool or len(pool) % 2:
        raise BenchError(
            f"{len(pool)} devices cannot be halved: name an even number of them by --devices"
        )
    if environ.get("VLLM_PD_FAULTS"):
        raise BenchError("VLLM_PD_FAULTS is set: what fails on purpose is no comparison")
