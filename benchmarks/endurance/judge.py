"""What a soak has to show, and whether it does. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.endurance.clients import LOST, Tally
from benchmarks.router.report import quantile

WARM_UP = 0.2
"""Share of the time after which memory has to be flat."""

MAX_GROWTH_LEN = 16 * 2**20
"""Bytes by which memory may rise from the first half of the rest to the second.

Compared is what the router holds when it holds least: bodies of up to 16 MiB come and
go. In ten minutes, a leak of two kilobytes per request is more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The router at one moment.

    Attributes:
        at_s: since the start.
        memory_len: resident memory, in bytes.
        num_fds: open descriptors.
    """

    at_s: float
    memory_len: int
    num_fds: int


@dataclass(frozen=True, slots=True)
class Rest:
    """What the router holds when nobody asks anything.

    Attributes:
        num_fds: open descriptors.
        num_tasks: tasks of its event loop.
        num_requests: requests that it believes to be open, with clients or instances.
    """

    num_fds: int
    num_tasks: int
    num_requests: int

    def is_within(self, other: Rest) -> bool:
        """Return whether it is not more than another."""
        return (
            self.num_fds <= other.num_fds
            and self.num_tasks <= other.num_tasks
            and self.num_requests <= other.num_requests
        )


@dataclass(frozen=True, slots=True)
class Soak:
    """Everything that was seen.

    Attributes:
        seconds: how long clients asked.
        tally: what became of their requests.
        kills: how many instances were killed, by role.
        samples: of the router, while it served.
        before: the router at rest, before it served.
        after: likewise afterwards.
        num_tracebacks: in the router's log.
    """

    seconds: float
    tally: Tally
    kills: dict[str, int]
    samples: Sequence[Sample]
    before: Rest
    after: Rest
    num_tracebacks: int


def failures(soak: Soak) -> list[str]:
    """Return what is not as it has to be, in words."""
    found = [f"lost: {why}" for why in soak.tally.losses]
    if (more := soak.tally.num_lost - len(soak.tally.losses)) > 0:
        found.append(f"lost: {more} more requests")
    if not sum(sum(counter.values()) for counter in soak.tally.outcomes.values()):
        found.append("nobody asked anything")
    before, after = soak.before, soak.after
    if after.num_fds > before.num_fds:
        found.append(f"{after.num_fds} descriptors are open, {before.num_fds} before")
    if after.num_tasks > before.num_tasks:
        found.append(f"{after.num_tasks} tasks are left, {before.num_tasks} before")
    if after.num_requests:
        found.append(f"{after.num_requests} requests seem to be open")
    if (growth := growth_len(soak.samples)) > MAX_GROWTH_LEN:
        found.append(f"memory grew by {growth / 1e6:.1f} MB after the warm-up")
    if soak.num_tracebacks:
        found.append(f"{soak.num_tracebacks} tracebacks in the router's log")
    return found


def growth_len(samples: Sequence[Sample]) -> int:
    """Return by how many bytes the least memory rises from one half to the other."""
    if len(samples) < 2:
        return 0
    start = WARM_UP * samples[-1].at_s
    middle = (start + samples[-1].at_s) / 2
    first = [one.memory_len for one in samples if start <= one.at_s < middle]
    second = [one.memory_len for one in samples if one.at_s >= middle]
    return min(second) - min(first, default=0)


def _floors(samples: Sequence[Sample]) -> list[int]:
    """Return the least memory of every tenth of the time."""
    end_s = samples[-1].at_s if samples else 0.0
    tenths: list[list[int]] = [[] for _ in range(10)]
    for one in samples:
        tenths[min(int(10 * one.at_s / end_s), 9) if end_s else 0].append(one.memory_len)
    return [min(tenth) for tenth in tenths if tenth]


def report(soak: Soak) -> dict[str, Any]:
    """Return everything as plain data."""
    outcomes = soak.tally.outcomes
    latencies = sorted(soak.tally.latencies_ms)
    memory = [one.memory_len for one in soak.samples] or [0]
    return {
        "seconds": round(soak.seconds, 1),
        "requests": {kind: dict(outcomes[kind]) for kind in sorted(outcomes)},
        "num_requests": sum(sum(counter.values()) for counter in outcomes.values()),
        LOST: soak.tally.num_lost,
        "kills": soak.kills,
        "whole_answers_ms": {
            "p50": round(quantile(latencies, 0.5), 1),
            "p99": round(quantile(latencies, 0.99), 1),
        },
        "memory_mb": {
            "first": round(memory[0] / 1e6, 1),
            "last": round(memory[-1] / 1e6, 1),
            "most": round(max(memory) / 1e6, 1),
            "least_by_tenth": [round(one / 1e6, 1) for one in _floors(soak.samples)],
            "growth_after_warm_up": round(growth_len(soak.samples) / 1e6, 2),
        },
        "descriptors": {
            "before": soak.before.num_fds,
            "most": max((one.num_fds for one in soak.samples), default=0),
            "after": soak.after.num_fds,
        },
        "tasks": {"before": soak.before.num_tasks, "after": soak.after.num_tasks},
        "tracebacks": soak.num_tracebacks,
        "failures": failures(soak),
    }
