from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from vllm_pd.bench.stages import (
    Reading,
    Stage,
    instance_stages,
    instances,
    parse_metrics,
    router_stages,
)
from vllm_pd.config import Role
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.metrics import Metrics, Outcome


async def is_there(_base_url: str) -> bool:
    return True


class Clocked:
    """A router's metrics that are told how long things took."""

    def __init__(self, *urls: str) -> None:
        self._metrics = Metrics()
        self._pool = InstancePool(urls[:1], urls[1:], probe=is_there, health_interval_s=3600.0)

    def serve(self, prefill_s: float, queued_s: float) -> None:
        self._metrics.note_queue(Role.PREFILL, queued_s)
        self._metrics.note_queue(Role.DECODE, 0.0)
        self._metrics.note_prefill(prefill_s)
        self._metrics.note_decode_start(0.05)
        self._metrics.note_first_bytes(Outcome(path="disaggregated"), streamed=True)

    async def read(self) -> Reading:
        return parse_metrics(self._metrics.render(self._pool).decode())


def stage(stages: list[Stage], name: str) -> Stage:
    (found,) = [one for one in stages if one.name == name]
    return found


def engine_reading(**seconds: list[float]) -> Reading:
    registry = CollectorRegistry()
    for name, values in seconds.items():
        metric = Histogram(name.replace("__", ":"), "", ["engine"], registry=registry)
        for value in values:
            metric.labels("0").observe(value)
    return parse_metrics(generate_latest(registry).decode())


async def test_stages_are_means_of_what_was_added_meanwhile() -> None:
    router = Clocked("http://p", "http://d")
    router.serve(prefill_s=50.0, queued_s=0.0)
    before = await router.read()
    router.serve(prefill_s=0.2, queued_s=0.1)
    router.serve(prefill_s=0.4, queued_s=0.1)
    stages = router_stages(before, await router.read())
    assert stage(stages, "prefill leg").mean_ms == pytest.approx(300.0)
    assert stage(stages, "prefill leg").count == 2
    assert stage(stages, "queue for prefill").mean_ms == pytest.approx(100.0)
    start = stage(stages, "of it: decode leg of a stream, to its first bytes")
    assert start.mean_ms == pytest.approx(50.0)


async def test_what_the_router_cannot_tell_apart_is_the_rest() -> None:
    router = Clocked("http://p", "http://d")
    before = await router.read()
    router.serve(prefill_s=0.0, queued_s=0.0)
    stages = router_stages(before, await router.read())
    total = stage(stages, "to first bytes, in all").mean_ms
    rest = stage(stages, "hand-over, decode queue and first step").mean_ms
    assert rest == pytest.approx(total)


async def test_idle_router_has_no_stages() -> None:
    router = Clocked("http://p", "http://d")
    assert router_stages(await router.read(), await router.read()) == []


async def test_router_names_its_instances() -> None:
    found = instances(await Clocked("http://p", "http://d", "http://e").read())
    assert found == {"prefill": ["http://p"], "decode": ["http://d", "http://e"]}


def test_plain_server_has_no_instances() -> None:
    assert instances(engine_reading(vllm__request_queue_time_seconds=[1.0])) == {}


def test_hand_over_is_taken_off_the_queue_of_the_decode_instance() -> None:
    reading = engine_reading(
        vllm__request_queue_time_seconds=[0.3, 0.5], vllm_pd__kv_fetch_seconds=[0.1, 0.2]
    )
    stages = instance_stages("decode", [({}, reading)])
    assert stage(stages, "hand-over (fetch of KV cache)").mean_ms == pytest.approx(150.0)
    rest = stage(stages, "queue in the engine, beside the hand-over")
    assert rest.mean_ms == pytest.approx(250.0)


def test_instances_of_a_role_are_taken_together() -> None:
    readings = [engine_reading(vllm__request_queue_time_seconds=[s]) for s in (0.1, 0.3)]
    stages = instance_stages("prefill", [({}, reading) for reading in readings])
    (found,) = stages
    assert (found.count, found.source) == (2, "prefill")
    assert found.mean_ms == pytest.approx(200.0)


def test_instance_that_was_started_again_counts_from_zero() -> None:
    before = engine_reading(vllm__request_queue_time_seconds=[5.0, 5.0, 5.0])
    after = engine_reading(vllm__request_queue_time_seconds=[0.1, 0.3])
    (found,) = instance_stages("prefill", [(before, after)])
    assert found.count == 2
    assert found.mean_ms == pytest.approx(200.0)


def test_instance_that_served_more_since_its_start_than_before_counts_from_zero() -> None:
    before = engine_reading(vllm__request_queue_time_seconds=[5.0])
    after = engine_reading(vllm__request_queue_time_seconds=[0.1, 0.3])
    (found,) = instance_stages("prefill", [(before, after)])
    assert found.count == 2
