"""Where the time of requests went, by the metrics of router and instances. Pure.

Every figure is the mean of what was added to a histogram between two readings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_ROUTER = "vllm_pd:router_"
_PREFILL_LEG, _TOTAL = "prefill leg", "to first bytes, in all"
_REST = "hand-over, decode queue and first step"
_LEGS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "queue for prefill": ("queue_seconds", {"stage": "prefill"}),
    _PREFILL_LEG: ("prefill_seconds", {}),
    "queue for decode": ("queue_seconds", {"stage": "decode"}),
}
_WITHIN_REST: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "of it: decode leg of a stream, to its first bytes": ("decode_start_seconds", {}),
    "of it: hand-over, where the engine tells": ("kv_handover_seconds", {}),
    "of it: decode queue, where the engine tells": ("decode_queue_seconds", {}),
}
"""Metrics of a router, with labels, by what they time."""

_INSTANCE_UP = f"{_ROUTER}instance_up"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the requests of a run.

    Attributes:
        name: for people.
        mean_ms: mean duration.
        count: how many were timed.
        source: ``router``, ``prefill`` or ``decode``: whose clock it was.
    """

    name: str
    mean_ms: float
    count: int
    source: str


Sample = tuple[str, frozenset[tuple[str, str]]]
Reading = Mapping[Sample, float]
"""Values by name and labels."""


def parse_metrics(text: str) -> Reading:
    """Read Prometheus' text format.

    Raises:
        ValueError: it is something else.
    """
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def instances(reading: Reading) -> dict[str, list[str]]:
    """Return the URLs of a router's instances, by role; empty if it is no router's reading."""
    found: dict[str, list[str]] = {}
    for name, labels in reading:
        if name == _INSTANCE_UP:
            values = dict(labels)
            found.setdefault(values["role"], []).append(values["url"])
    return found


def router_stages(before: Reading, after: Reading) -> list[Stage]:
    """Return the stages that a router knows, of requests that were disaggregated.

    What follows the prefill leg is known to it as one: the hand-over, the queue of the
    decode instance and its first step. Parts of that are known of some requests.
    """
    both = before, after
    found = _named(both, _LEGS)
    total = _named(both, {_TOTAL: ("first_bytes_seconds", {"path": "disaggregated"})})
    if total and any(stage.name == _PREFILL_LEG for stage in found):
        known = sum(stage.mean_ms for stage in found)
        found.append(Stage(_REST, total[0].mean_ms - known, total[0].count, "router"))
    return [*found, *_named(both, _WITHIN_REST), *total]


def _named(
    readings: tuple[Reading, Reading], metrics: Mapping[str, tuple[str, Mapping[str, str]]]
) -> list[Stage]:
    """Return those of a router's stages that were timed."""
    stages = (
        _stage("router", name, _ROUTER + metric, labels, readings)
        for name, (metric, labels) in metrics.items()
    )
    return [stage for stage in stages if stage is not None]


def instance_stages(role: str, readings: Sequence[tuple[Reading, Reading]]) -> list[Stage]:
    """Return the stages that instances of one role know, all of them together.

    vLLM's queue on the decode side includes the wait for KV cache, so the hand-over is
    taken off it. What is left includes the prefill where the router sent the decode leg
    before that had ended.

    Args:
        role: ``prefill`` or ``decode``.
        readings: of each instance, before and after.
    """
    queue = _stage(role, "queue in the engine", "vllm:request_queue_time_seconds", {}, *readings)
    if role == "prefill":
        metric = "vllm:request_prefill_time_seconds"
        run = _stage(role, "prefill in the engine", metric, {}, *readings)
        return [stage for stage in (queue, run) if stage]
    fetch = _stage(role, "hand-over (fetch of KV cache)", "vllm_pd:kv_fetch_seconds", {}, *readings)
    if queue and fetch:
        wait = queue.mean_ms - fetch.mean_ms * fetch.count / queue.count
        queue = Stage("queue in the engine, beside the hand-over", wait, queue.count, role)
    return [stage for stage in (fetch, queue) if stage]


def _stage(
    source: str,
    name: str,
    metric: str,
    labels: Mapping[str, str],
    *readings: tuple[Reading, Reading],
) -> Stage | None:
    grown = [_growth(metric, labels, *pair) for pair in readings]
    total = sum(seconds for seconds, _ in grown)
    count = sum(num for _, num in grown)
    if count < 1:
        return None
    return Stage(name, total / count * 1e3, int(count), source)


def _growth(
    metric: str, labels: Mapping[str, str], before: Reading, after: Reading
) -> tuple[float, float]:
    """Return by how many seconds and observations a histogram grew.

    One that has shrunk is of a process that was started again meanwhile: everything in it is new.
    """
    seconds = count = 0.0
    for (sample, its_labels), num in after.items():
        if sample != f"{metric}_count" or not labels.items() <= dict(its_labels).items():
            continue
        now = after.get((f"{metric}_sum", its_labels), 0.0), num
        then = tuple(before.get((f"{metric}_{part}", its_labels), 0.0) for part in ("sum", "count"))
        is_new = now[0] < then[0] or now[1] < then[1]
        seconds += now[0] - (0.0 if is_new else then[0])
        count += now[1] - (0.0 if is_new else then[1])
    return seconds, count
