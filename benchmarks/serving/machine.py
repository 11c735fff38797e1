"""What the machine did beside a run: the CPU time that a hypervisor gave to others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_NUM_TIMES = 8
"""Times of a line of ``/proc/stat`` that add up; the two after them are part of the first two."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Counters of all CPUs together, in ticks.

    Attributes:
        total: all time, idle or not.
        stolen: in which a CPU was wanted and the hypervisor ran others on it.
    """

    total: int
    stolen: int


def parse_stat(text: str) -> CpuTimes | None:
    """Read ``/proc/stat``; None: it does not tell."""
    for line in text.splitlines():
        name, *fields = line.split()
        if name == "cpu" and len(fields) >= _NUM_TIMES:
            times = [int(field) for field in fields[:_NUM_TIMES]]
            return CpuTimes(sum(times), times[-1])
    return None


def read_cpu_times(path: Path = _STAT) -> CpuTimes | None:
    """Read the counters of this machine; None: it has none."""
    try:
        return parse_stat(path.read_text())
    except (OSError, ValueError):
        return None


def stolen_between(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Return the part of all CPU time that was stolen meanwhile; None: not known."""
    if before is None or after is None or after.total <= before.total:
        return None
    return (after.stolen - before.stolen) / (after.total - before.total)
