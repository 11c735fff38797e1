"""What a process holds of the kernel's, to be compared before and after."""

from __future__ import annotations

import gc
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_WAIT_S = 10.0


def holdings() -> Counter[str]:
    """Count descriptors by kind, threads, mapped memfds, shared files and children."""
    gc.collect()
    return Counter(
        f"{kind} {name}"
        for kind, names in (
            ("descriptor", _descriptors()),
            # Not by name: a thread has its maker's until it names itself.
            ("thread", ("" for _ in Path("/proc/self/task").iterdir())),
            ("mapping", re.findall("memfd:vllm-pd.*", Path("/proc/self/maps").read_text())),
            # Other processes have theirs there, too.
            ("file", (p.name for p in Path("/dev/shm").iterdir() if "vllm-pd" in p.name)),
            ("child", _children()),
        )
        for name in names
    )


def check_nothing_is_left(before: Counter[str], *, allowed: tuple[str, ...] = ()) -> None:
    """Wait until this process holds no more than before; some of it ends a moment later.

    Args:
        before: what it held.
        allowed: what there may be in addition.
    """
    deadline = time.monotonic() + _WAIT_S
    while more := holdings() - before - Counter(allowed):
        assert time.monotonic() < deadline, more
        time.sleep(0.01)


def _descriptors() -> Iterator[str]:
    for entry in Path("/proc/self/fd").iterdir():
        try:
            yield re.sub(r"\d+", "N", str(entry.readlink()))
        except OSError:  # the one by which the folder is read
            continue


def _children() -> Iterator[str]:
    for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        yield from path.read_text().split()
