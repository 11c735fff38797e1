"""What ``vllm-pd doctor`` checks: one line each, with what to do.

Looks only; starts nothing and needs no vLLM. Checks of NPUs are made where there are
any, or where they are asked for.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import enum
import importlib.metadata
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_pd.config import DEFAULT_DECODE_PORT, DEFAULT_PREFILL_PORT, DEFAULT_ROUTER_PORT
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.devices import Machine, find_machine
from vllm_pd.launcher.network import used_ports
from vllm_pd.launcher.npu_env import port_ranges, unset_port_ranges
from vllm_pd.launcher.npu_smi import complaints
from vllm_pd.launcher.port_claims import claimed_ports

DRIVER_VERSION = Path("/usr/local/Ascend/driver/version.info")
HCCN_CONF = Path("/etc/hccn.conf")
SHARED_MEMORY = Path("/dev/shm")
TOOLKIT = Path("/usr/local/Ascend/ascend-toolkit/latest")

_MIN_SHARED_GIB = 1.0
_OLDEST_CLOCK_S = 1_767_225_600  # 2026-01-01: before it, no release of this project existed
_STA_UNSYNC = 0x0040
_OLDEST_CANN = (9, 1)  # of the vllm-ascend 0.23.0 image
_CONNECT_TIMEOUT_S, _CONNECT_GRACE_S = 120, 20  # of HCCL 9.1, ``HCCL_CONNECT_TIMEOUT.md``
_STEP_TIMEOUT_S = 300  # VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS in ``vllm/envs.py`` of 0.23 and 0.32
_WANTED = {
    "npu": ("vllm", "vllm-ascend", "torch", "torch-npu", "vllm-pd", "ascend-vllm-plugin"),
    "cuda": ("vllm", "torch", "vllm-pd"),
    "cpu": ("vllm", "torch", "vllm-pd"),
}


class Verdict(enum.Enum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


_TOGETHER = (
    ("torch", "torch-npu", Verdict.PROBLEM),
    ("vllm", "vllm-ascend", Verdict.WARNING),
)
"""What must have the same first two numbers, and how bad it is if not."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line.

    Attributes:
        name: of what was looked at.
        verdict: how it is.
        found: what was seen.
        advice: what to do, where it is not well.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.verdict.value:8} {self.name:14} {self.found}{advice}"


def examine(device: str | None, environ: Mapping[str, str]) -> list[Check]:
    """Make all checks of this machine.

    Args:
        device: what is to be used; None: the best that is found.
        environ: the user's environment.
    """
    try:
        machine = find_machine(device, environ)
    except ConfigError as exc:
        return [Check("devices", Verdict.PROBLEM, str(exc))]
    checks = [check_devices(machine), check_versions(machine.device, version_of)]
    if machine.device == "npu":
        checks += [
            check_file("driver", DRIVER_VERSION, "mount it into the container, or install it"),
            check_hccn(HCCN_CONF, len(machine.pool)),
            check_cann(environ, TOOLKIT),
            check_stall(environ),
        ]
    if "VLLM_PLUGINS" in environ:
        checks.append(check_plugins(machine.device, environ["VLLM_PLUGINS"]))
    # As many as two instances want, of those that the user has not set.
    num_ranges = 2 * len(unset_port_ranges(environ)) if machine.device == "npu" else 0
    checks += [
        check_ports(used_ports() | claimed_ports(), num_ranges=num_ranges),
        check_shared_memory(shutil.disk_usage(SHARED_MEMORY).total / 2**30),
        check_clock(
            time.clock_gettime(time.CLOCK_REALTIME), is_synchronised=clock_is_synchronised()
        ),
    ]
    return checks


def check_devices(machine: Machine) -> Check:
    """Look whether the devices are well and idle."""
    found = f"{len(machine.pool)} x {machine.device}"
    if machine.device == "npu" and not machine.npus:
        advice = "npu-smi info does not answer: mount npu-smi and its libraries, see docs/ascend.md"
        return Check("devices", Verdict.WARNING, found, advice)
    if problems := complaints(machine.npus, machine.pool if machine.npus else ()):
        return Check("devices", Verdict.PROBLEM, found, "; ".join(problems))
    return Check(
        "devices", Verdict.OK, found + "".join(sorted({f" {n.name}" for n in machine.npus}))
    )


def check_versions(device: str, version: Callable[[str], str | None]) -> Check:
    """Look whether everything is installed, and of which versions."""
    versions = {name: version(name) for name in _WANTED[device]}
    found = ", ".join(f"{name} {its}" for name, its in versions.items() if its)
    missing = [name for name, its in versions.items() if its is None]
    if missing == ["ascend-vllm-plugin"]:
        advice = "KV cache goes through host memory: pip install --no-deps ./ascend-vllm-plugin"
        return Check("versions", Verdict.WARNING, found, advice)
    if missing:
        advice = f"{', '.join(missing)} not installed: use the image, or pd_example/setup_env.sh"
        return Check("versions", Verdict.PROBLEM, found or "nothing", advice)
    if device == "npu":
        for name, other, verdict in _TOGETHER:
            if _minor(versions[name] or "") != _minor(versions[other] or ""):
                advice = f"{other} is made for another {name}: use the image, or those that fit"
                return Check("versions", verdict, found, advice)
    return Check("versions", Verdict.OK, found)


def _minor(version: str) -> tuple[int, int] | None:
    """Return the first two numbers of a version; None: it has not so many."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def check_plugins(device: str, value: str) -> Check:
    """Look whether vLLM will load what it is to load, where that is restricted.

    Args:
        device: which serves.
        value: VLLM_PLUGINS; vLLM takes its parts as they are (``vllm/envs.py`` of 0.32).
    """
    wanted = ("ascend", "vllm_pd") if device == "npu" else ("vllm_pd",)
    if missing := [name for name in wanted if name not in value.split(",")]:
        advice = f"add {','.join(missing)} without spaces, or unset it: vLLM loads no others"
        return Check("VLLM_PLUGINS", Verdict.PROBLEM, value or "empty", advice)
    return Check("VLLM_PLUGINS", Verdict.OK, value)


def check_file(name: str, path: Path, advice: str) -> Check:
    """Look whether a file is there; tell its first line with a version."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as exc:
        return Check(name, Verdict.PROBLEM, f"{path}: {exc.strerror}", advice)
    version = next((line.strip() for line in lines if "ersion" in line), "")
    return Check(name, Verdict.OK, version or str(path))


def check_hccn(path: Path, num_npus: int) -> Check:
    """Look whether the NPUs have addresses of their own, which HCCL needs between hosts."""
    try:
        text = path.read_text(errors="replace")
    except OSError as exc:
        advice = "NPUs of other hosts cannot be reached: mount it into the container"
        return Check("hccn.conf", Verdict.WARNING, f"{path}: {exc.strerror}", advice)
    addresses = set(re.findall(r"^address_(\d+)=", text, flags=re.MULTILINE))
    if len(addresses) < num_npus:
        advice = "hccn_tool -i N -ip -s address A netmask M gives an NPU its own"
        found = f"{len(addresses)} addresses for {num_npus} NPUs"
        return Check("hccn.conf", Verdict.WARNING, found, advice)
    return Check("hccn.conf", Verdict.OK, f"{len(addresses)} addresses")


def check_cann(
    environ: Mapping[str, str],
    toolkit: Path,
    find_library: Callable[[str], str | None] = ctypes.util.find_library,
) -> Check:
    """Look whether libhccl can be found, and whether CANN is new enough.

    Args:
        environ: the user's environment.
        toolkit: where CANN's toolkit is, unless ASCEND_TOOLKIT_HOME says otherwise.
        find_library: asks the loader's own configuration for a library.
    """
    library = _find_libhccl(environ, find_library)
    if library is None:
        advice = f"source {toolkit.parent}/set_env.sh, or set HCCL_SO_PATH"
        return Check("CANN", Verdict.PROBLEM, "no libhccl.so", advice)
    version = cann_version(Path(environ.get("ASCEND_TOOLKIT_HOME") or toolkit))
    oldest = ".".join(map(str, _OLDEST_CANN))
    minor = _minor(version or "")
    if minor is None:
        advice = f"look whether it is {oldest} or newer, which is what this was written for"
        found = f"{version or 'of unknown version'}, {library}"
        return Check("CANN", Verdict.WARNING, found, advice)
    found = f"{version}, {library}"
    if minor < _OLDEST_CANN:
        return Check("CANN", Verdict.PROBLEM, found, f"too old: use the image, or CANN {oldest}")
    return Check("CANN", Verdict.OK, found)


def _find_libhccl(
    environ: Mapping[str, str], find_library: Callable[[str], str | None]
) -> str | None:
    """Return where libhccl is, as the loader would; None: it is not to be found."""
    if named := environ.get("HCCL_SO_PATH"):
        return named if Path(named).is_file() else None
    for folder in environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and (path := Path(folder) / "libhccl.so").is_file():
            return str(path)
    return find_library("hccl")


def check_stall(environ: Mapping[str, str]) -> Check:
    """Look whether vLLM waits longer for a step than HCCL may hold it up.

    Linking two NPUs that cannot be linked takes a step that long; an instance of several
    ranks whose step takes longer than vLLM waits ends.
    """
    connect_s = _number(environ, "HCCL_CONNECT_TIMEOUT", _CONNECT_TIMEOUT_S) + _CONNECT_GRACE_S
    step_s = _number(environ, "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", _STEP_TIMEOUT_S)
    found = f"HCCL may hold a step up for {connect_s} s, vLLM waits for {step_s} s"
    if connect_s >= step_s:
        advice = f"set VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS to {2 * connect_s}"
        advice += ", or HCCL_CONNECT_TIMEOUT lower"
        return Check("step timeout", Verdict.WARNING, found, advice)
    return Check("step timeout", Verdict.OK, found)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    """Return a variable's value; what is no number is the library's own affair."""
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else default


def cann_version(toolkit: Path) -> str | None:
    """Return the version that a toolkit says it has; None: it does not say.

    Looks for ``ARCH-linux/ascend_toolkit_install.info`` with a line ``version=``, as the
    toolkit's installer is known to leave it; not seen on CANN 9.1.
    """
    for path in sorted(toolkit.glob("*-linux/ascend_toolkit_install.info")):
        if found := re.search(r"^version=(\S+)", path.read_text(errors="replace"), re.MULTILINE):
            return found[1]
    return None


def check_ports(used: frozenset[int], *, num_ranges: int = 0) -> Check:
    """Look whether the default ports are free, and as many ranges for HCCL."""
    wanted = (DEFAULT_ROUTER_PORT, DEFAULT_PREFILL_PORT, DEFAULT_DECODE_PORT)
    if busy := [port for port in wanted if port in used]:
        advice = "stop what uses them, or set PORT, PREFILL_PORT and DECODE_PORT"
        return Check("ports", Verdict.WARNING, f"in use: {', '.join(map(str, busy))}", advice)
    found = ", ".join(map(str, wanted))
    if num_ranges:
        try:
            ranges = port_ranges(num_ranges, used)
        except ConfigError as exc:
            return Check("ports", Verdict.PROBLEM, str(exc))
        found += f"; for HCCL {ranges[0].start} to {ranges[-1].stop - 1}"
    return Check("ports", Verdict.OK, f"free: {found}")


def check_shared_memory(total_gib: float) -> Check:
    """Look whether the ranks of an instance have room to exchange messages."""
    found = f"{total_gib:.1f} GiB in {SHARED_MEMORY}"
    if total_gib < _MIN_SHARED_GIB:
        return Check("shared memory", Verdict.PROBLEM, found, "docker run --shm-size=1g or more")
    return Check("shared memory", Verdict.OK, found)


def check_clock(now_s: float, *, is_synchronised: bool) -> Check:
    """Look whether logs of several hosts can be compared, and certificates be valid."""
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if now_s < _OLDEST_CLOCK_S:
        return Check("clock", Verdict.PROBLEM, found, "it is wrong: set it, TLS depends on it")
    if not is_synchronised:
        advice = "not synchronised: start chrony or ntpd on the host where several hosts take part"
        return Check("clock", Verdict.WARNING, found, advice)
    return Check("clock", Verdict.OK, found)


def clock_is_synchronised() -> bool:
    """Ask the kernel; see adjtimex(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    timex = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; modes = 0 only reads
    if libc.adjtimex(timex) < 0:
        return False
    status = ctypes.c_int.from_buffer(timex, 5 * ctypes.sizeof(ctypes.c_long)).value
    return not status & _STA_UNSYNC


def version_of(name: str) -> str | None:
    """Return the version of a distribution; None: it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def exit_code(checks: Sequence[Check]) -> int:
    """Return 1 if there is a problem, else 0."""
    return int(any(check.verdict is Verdict.PROBLEM for check in checks))
