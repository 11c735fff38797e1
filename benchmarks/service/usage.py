"""CPU time and memory of an instance's processes, from /proc."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.service.servers import Instance
from benchmarks.transfer.pair import BenchError

THREADS = "vllm-pd-"
"""How the names of our threads begin."""

KV_MEMFD = "/memfd:vllm-pd-kv"
"""Mappings of it hold KV cache: an instance's own, or that of a peer."""

KINDS = {"EngineCore": "engine core", "Worker": "worker"}
"""vLLM's titles of the processes behind an API server, and what they are called here."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)")


@dataclass(frozen=True, slots=True)
class Idle:
    """What a process used while it had nothing to do, in percent of a core.

    Attributes:
        kind: one of the values of ``KINDS``.
        ours: all of our threads.
        total: all threads.
        num_ours: how many threads are ours.
    """

    kind: str
    ours: float
    total: float
    num_ours: int


def find_processes(instance: Instance) -> dict[str, int]:
    """Return the process ids behind an instance's API server, by kind.

    Raises:
        BenchError: there is not one of each kind.
    """
    found: dict[str, int] = {}
    for pid in _descendants(instance.pid):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            kinds = [kind for mark, kind in KINDS.items() if title.startswith(f"VLLM::{mark}")]
            found |= dict.fromkeys(kinds, pid)
    if missing := KINDS.values() - found.keys():
        raise BenchError(f"{instance.name} has no process that is a {' or a '.join(missing)}")
    return found


def watch_idle(instances: Mapping[str, Instance], seconds: float) -> dict[str, dict[str, Idle]]:
    """Watch processes do nothing; return what they used, by name and kind."""
    pids = {
        (n, kind): pid for n, one in instances.items() for kind, pid in find_processes(one).items()
    }
    before = {key: _thread_seconds(pid) for key, pid in pids.items()}
    started = time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - started
    found: dict[str, dict[str, Idle]] = {name: {} for name in instances}
    for (name, kind), pid in pids.items():
        used = threads_used(before[name, kind], _thread_seconds(pid))
        ours = [value for thread, value in used.items() if thread.startswith(THREADS)]
        found[name][kind] = Idle(
            kind=kind,
            ours=sum(ours) / elapsed_s * 100,
            total=sum(used.values()) / elapsed_s * 100,
            num_ours=len(ours),
        )
    return found


def threads_used(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return the CPU seconds of each thread; one that is new counts from its start."""
    return {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}


def memory_of(instance: Instance, kv_len: int) -> dict[str, int]:
    """Return the resident bytes of an instance's processes beside the KV cache, by kind.

    Args:
        instance: the instance; its KV cache is in its worker.
        kv_len: bytes of the KV cache.
    """
    found = {}
    for kind, pid in find_processes(instance).items():
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        found[kind] = beside_kv(lines, kv_len if kind == "worker" else 0)
    return found


def beside_kv(lines: Iterable[str], kv_len: int) -> int:
    """Return the resident bytes beside the KV cache, from the lines of ``smaps``.

    KV cache that was moved onto memfds is known by their name. Otherwise it is in
    private memory, all of which vLLM has written, so its length is subtracted.
    """
    resident = {True: 0, False: 0}
    is_kv, has_memfd = False, False
    for line in lines:
        if mapping := _MAPPING.fullmatch(line):
            is_kv = mapping[1].startswith(KV_MEMFD)
            has_memfd = has_memfd or is_kv
        elif line.startswith("Rss:"):
            resident[is_kv] += int(line.split()[1]) * 1024
    return resident[False] - (0 if has_memfd else kv_len)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for one in found:  # which grows meanwhile
        found += children.get(one, [])
    return found[1:]


def _thread_seconds(pid: int) -> dict[str, float]:
    """Return the CPU seconds so far of all threads, by name and id."""
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            name = (task / "comm").read_text().strip()
            seconds[f"{name}/{task.name}"] = _cpu_seconds(task)
    return seconds


def _cpu_seconds(task: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    # A kernel without it has only clock ticks.
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
