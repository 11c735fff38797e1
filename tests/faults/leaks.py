"""What a process holds of the kernel's, to be compared before and after."""

from __future__ import annotations

import gc
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

_WAIT_S = 10.0


@dataclass(frozen=True)
class Holdings:
    """Descriptors by kind, names of threads, mappings of our memfds, files, children."""

    descriptors: tuple[tuple[str, int], ...]
    threads: tuple[str, ...]
    num_mapped: int
    shared_files: tuple[str, ...]
    children: tuple[str, ...]

    def with_thread(self, name: str) -> Holdings:
        return replace(self, threads=tuple(sorted((*self.threads, name))))

    @classmethod
    def now(cls) -> Holdings:
        return cls(
            tuple(sorted(_descriptors().items())),
            tuple(sorted(_threads())),
            Path("/proc/self/maps").read_text().count("memfd:vllm-pd"),
            # Other processes have theirs there, too.
            tuple(sorted(p.name for p in Path("/dev/shm").iterdir() if "vllm-pd" in p.name)),
            tuple(sorted(_children())),
        )


def check_nothing_is_left(before: Holdings, *, may_keep: str | None = None) -> None:
    """Wait until this process holds what it held before; some of it ends a moment later.

    Args:
        before: what it held.
        may_keep: name of a thread that it may have one more of.
    """
    deadline = time.monotonic() + _WAIT_S
    while True:
        gc.collect()
        now = Holdings.now()
        if now == before or (may_keep and now == before.with_thread(may_keep)):
            return
        assert time.monotonic() < deadline, f"{now}\ninstead of\n{before}"
        time.sleep(0.01)


def _descriptors() -> Counter[str]:
    kinds: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            kinds[re.sub(r"\d+", "N", str(entry.readlink()))] += 1
        except OSError:  # the one by which the folder is read
            continue
    return kinds


def _threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            continue
    return names


def _children() -> list[str]:
    paths = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [child for path in paths for child in path.read_text().split()]
