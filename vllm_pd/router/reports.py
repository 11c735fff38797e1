"""What one process of the router says of itself, and what all of them say together.

Only what the processes do not share anyhow: what is open on instances is on the board, and
every process has all instances. Times are on the monotonic clock, which all processes of a
host have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from vllm_pd.config import Role
from vllm_pd.router.activity import Slice
from vllm_pd.router.admission import Stage
from vllm_pd.router.health import BreakerState
from vllm_pd.router.instance import Instance, State
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.metrics import Metrics


class Queue(msgspec.Struct, frozen=True, array_like=True):
    """A stage: requests that wait, and slots that are held."""

    waiting: int = 0
    in_use: int = 0


class Finding(msgspec.Struct, frozen=True, array_like=True):
    """An instance as a process sees it, by its own probes and requests.

    Attributes:
        accepting: whether it gets requests.
        state: where it is in its life.
        breaker: the state of its circuit breaker.
        num_failed: requests that broke there.
        last_failure: how the last of them did.
        failed_at: when that was.
    """

    accepting: bool
    state: State
    breaker: BreakerState
    num_failed: int = 0
    last_failure: str = ""
    failed_at: float | None = None


class Report(msgspec.Struct, frozen=True):
    """A process, or several.

    Attributes:
        age_s: since it began to count; of several, since the first did.
        in_flight: requests that are being served.
        slices: what happened lately; there may be several with the same number.
        queues: by stage.
        findings: by base URL.
    """

    age_s: float = 0.0
    in_flight: int = 0
    slices: tuple[Slice, ...] = ()
    queues: dict[Role, Queue] = {}
    findings: dict[str, Finding] = {}


def report_of(pool: InstancePool, metrics: Metrics, stages: Mapping[Role, Stage]) -> Report:
    """Return what this process says of itself."""
    return Report(
        metrics.activity.age_s,
        metrics.num_in_flight,
        metrics.activity.slices,
        {role: Queue(stage.num_waiting, stage.in_use) for role, stage in stages.items()},
        {one.base_url: finding_of(one, pool) for one in pool},
    )


def finding_of(instance: Instance, pool: InstancePool) -> Finding:
    """Return how this process sees an instance."""
    return Finding(
        pool.is_accepting(instance),
        instance.state,
        instance.breaker.state,
        instance.num_failed,
        instance.last_failure,
        instance.failed_at,
    )


def merged(reports: Sequence[Report]) -> Report:
    """Return what several processes say together.

    Of an instance it is told how the process sees it that thinks worst of it: requests
    that come to that one do not get there.
    """
    findings: dict[str, list[Finding]] = {}
    for report in reports:
        for url, finding in report.findings.items():
            findings.setdefault(url, []).append(finding)
    return Report(
        max((one.age_s for one in reports), default=0.0),
        sum(one.in_flight for one in reports),
        tuple(slice_ for one in reports for slice_ in one.slices),
        {role: _sum(one.queues.get(role, Queue()) for one in reports) for role in Role},
        {url: _worst(each) for url, each in findings.items()},
    )


def _sum(queues: Iterable[Queue]) -> Queue:
    waiting = in_use = 0
    for one in queues:
        waiting, in_use = waiting + one.waiting, in_use + one.in_use
    return Queue(waiting, in_use)


def _worst(findings: Sequence[Finding]) -> Finding:
    worst = min(findings, key=lambda one: one.accepting)
    latest = max(findings, key=lambda one: one.failed_at or 0.0)
    return msgspec.structs.replace(
        worst,
        num_failed=sum(one.num_failed for one in findings),
        last_failure=latest.last_failure,
        failed_at=latest.failed_at,
    )
