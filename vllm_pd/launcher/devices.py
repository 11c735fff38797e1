"""Which devices, cores and memory this machine offers. Looks, decides nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_pd.errors import ConfigError
from vllm_pd.launcher.network import find_host_ip, interface_of, resolve, used_ports
from vllm_pd.launcher.npu_env import Network
from vllm_pd.launcher.npu_smi import Npu, parse_info
from vllm_pd.launcher.port_claims import claimed_ports

DEVICES = ("npu", "cuda", "cpu")
VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
"""Variable by which an engine is given its devices."""
NOUNS = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU core"}

_QUERY_TIMEOUT_S = 30


@dataclass(frozen=True)
class Machine:
    """What can be given to instances.

    Attributes:
        device: ``cpu``, ``cuda`` or ``npu``.
        pool: device ids, or CPU core numbers, in the order they are given out.
        mem_available_gib: host memory that can be used without swapping.
        network: how other hosts reach this one; NPUs only.
        used_ports: TCP ports in use or claimed; NPUs only.
        npus: what the tool tells of the NPUs; nothing where there is no tool.
        is_slow_in_16_bit: whether instances compute on a CPU that is much faster in float32.
    """

    device: str
    pool: tuple[str, ...]
    mem_available_gib: float = 0.0
    network: Network | None = None
    used_ports: frozenset[int] = frozenset()
    npus: tuple[Npu, ...] = ()
    is_slow_in_16_bit: bool = False


def find_machine(
    device: str | None, environ: Mapping[str, str], *, host: str | None = None
) -> Machine:
    """Look at this machine.

    Args:
        device: what to use; None: an NPU, else a GPU, else the CPU.
        environ: may narrow the pool by the engine's own ``*_VISIBLE_DEVICES``.
        host: name or address that peers reach NPUs of this machine by; None: that of its
            route to others.

    Raises:
        ConfigError: unknown device, or none of that kind here; or the host has no address.
    """
    if device is None:
        device = detect_device(environ)
    if device not in DEVICES:
        raise ConfigError(f"unknown device {device!r}", hint=f"use one of {', '.join(DEVICES)}")
    if not (pool := find_pool(device, environ)):
        raise ConfigError(f"no {NOUNS[device]} found", hint="DEVICE=cpu serves on the CPU")
    if device == "cpu":
        is_slow = is_slow_in_16_bit(platform.machine(), read_cpuinfo())
        return Machine(device, pool, available_memory_gib(), is_slow_in_16_bit=is_slow)
    if device == "cuda":
        return Machine(device, pool, available_memory_gib())
    host_ip = find_host_ip() if host is None else resolve(host)
    network = Network(host_ip, interface_of(host_ip)) if host_ip else None
    ports = used_ports() | claimed_ports()
    return Machine(device, pool, available_memory_gib(), network, ports, query_npus())


def check_engine(device: str) -> None:
    """Check that vLLM is installed, for this device.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"vLLM is not installed for {sys.executable}",
            hint="bash pd_example/disaggregated_prefill.sh sets everything up",
        )
    if device != "cpu" and engine_is_cpu_build():
        raise ConfigError(
            f"device {device} asked for, but the installed vLLM is a CPU build",
            hint="install requirements/cuda.txt, or use DEVICE=cpu",
        )


def engine_is_cpu_build() -> bool:
    """Whether the installed vLLM runs on nothing but the CPU."""
    try:
        return importlib.metadata.version("vllm").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def detect_device(environ: Mapping[str, str]) -> str:
    """Return the best kind of device that both the machine and the engine have."""
    if engine_is_cpu_build():
        return "cpu"
    if importlib.util.find_spec("torch_npu") and find_pool("npu", environ):
        return "npu"
    return "cuda" if find_pool("cuda", environ) else "cpu"


def find_pool(device: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the device ids, or one core number for each physical core, that may be used."""
    if device == "cpu":
        cores = os.sched_getaffinity(0)
        return tuple(map(str, one_thread_per_core(cores, read_siblings(cores))))
    visible = visible_pool(environ.get(VISIBLE_DEVICES[device]))
    if visible is not None:
        return visible
    return find_npus() if device == "npu" else find_gpus()


def visible_pool(value: str | None) -> tuple[str, ...] | None:
    """Parse a ``*_VISIBLE_DEVICES`` value; None: it is not set."""
    if value is None:
        return None
    return tuple(part.strip() for part in value.split(",") if part.strip())


def find_npus(dev: Path = Path("/dev")) -> tuple[str, ...]:
    """Return the logical ids of the NPUs: 0 to n-1, whatever their device files are called."""
    count = sum(bool(re.fullmatch(r"davinci\d+", path.name)) for path in dev.glob("davinci*"))
    return tuple(map(str, range(count or len(query_npus()))))


def query_npus() -> tuple[Npu, ...]:
    """Ask ``npu-smi info``; nothing where it is missing or fails."""
    return parse_info(_query("npu-smi", "info") or "")


def find_gpus() -> tuple[str, ...]:
    """Return the indices of the CUDA devices."""
    return gpu_indices(_query("nvidia-smi", "-L") or "")


def gpu_indices(listing: str) -> tuple[str, ...]:
    """Read the GPU indices from ``nvidia-smi -L``."""
    return tuple(re.findall(r"^GPU (\d+):", listing, flags=re.MULTILINE))


def _query(*command: str) -> str | None:
    """Return the output of a device tool; None where it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_QUERY_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def one_thread_per_core(cores: Iterable[int], siblings: Mapping[int, str]) -> list[int]:
    """Keep one hardware thread of each physical core.

    Two instances on two threads of one core would slow each other down, and
    where siblings are numbered apart (0 and 32) an even split of all threads
    does exactly that.
    """
    seen: set[str] = set()
    kept = []
    for core in sorted(cores):
        group = siblings.get(core, str(core))
        if group not in seen:
            seen.add(group)
            kept.append(core)
    return kept


def read_siblings(cores: Iterable[int]) -> dict[int, str]:
    """Return for each core the kernel's list of threads that share it, where it tells."""
    siblings = {}
    for core in cores:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        try:
            siblings[core] = path.read_text().strip()
        except OSError:
            continue
    return siblings


def is_slow_in_16_bit(machine: str, cpuinfo: str) -> bool:
    """Tell whether a CPU computes in bfloat16 and float16 much slower than in float32.

    oneDNN, which PyTorch and with it vLLM multiply matrices by, has fast 16-bit kernels for
    x86 only from AVX-512 (emulated or native) or AVX-NE-CONVERT on. Seen on a Zen 3: products
    of 512 rows took 9 times as long in bfloat16 as in float32, those of one row the same.

    Args:
        machine: the architecture, as ``uname -m`` tells.
        cpuinfo: content of ``/proc/cpuinfo``.
    """
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, flags=re.MULTILINE)
    if machine not in ("x86_64", "AMD64") or found is None:
        return False
    return not {"avx512f", "avx_ne_convert"} & set(found[1].split())


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the kernel tells of the CPUs; nothing where it does not."""
    try:
        return path.read_text()
    except OSError:
        return ""


def available_memory_gib(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> float:
    """Return the available host memory in GiB, within the control group's limit."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), flags=re.MULTILINE)
    available = int(found[1]) * 1024 if found else 0
    try:
        limit = int((cgroup / "memory.max").read_text())
        available = min(available, limit - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group here, or it says "max"
    return available / 2**30
