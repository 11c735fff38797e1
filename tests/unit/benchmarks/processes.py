"""What runs on this machine."""

from __future__ import annotations

from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that have not been waited for."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
