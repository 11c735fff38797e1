from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from vllm_pd.router.collectors import Counts, Durations
from vllm_pd.router.spread import bucket_of

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

BOUNDS = (0.01, 0.1, 1.0)


def shown(collector: Collector) -> list[str]:
    registry = CollectorRegistry()
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_a_duration_is_in_all_buckets_that_it_does_not_exceed() -> None:
    durations = Durations("wait_seconds", "A wait.", BOUNDS)
    for seconds in (0.01, 0.05, 2.0):
        durations.add(bucket_of(seconds), seconds)

    assert shown(durations) == [
        'wait_seconds_bucket{le="0.01"} 1.0',
        'wait_seconds_bucket{le="0.1"} 2.0',
        'wait_seconds_bucket{le="1.0"} 2.0',
        'wait_seconds_bucket{le="+Inf"} 3.0',
        "wait_seconds_count 3.0",
        "wait_seconds_sum 2.06",
    ]


def test_many_durations_are_counted_at_once() -> None:
    durations = Durations("gap_seconds", "A gap.", BOUNDS)

    durations.add_all([bucket_of(0.05), bucket_of(0.5)], 0.55)

    assert "gap_seconds_count 2.0" in shown(durations)
    assert "gap_seconds_sum 0.55" in shown(durations)


def test_without_a_label_a_histogram_shows_that_there_is_nothing() -> None:
    assert "wait_seconds_count 0.0" in shown(Durations("wait_seconds", "A wait.", BOUNDS))


def test_labels_have_durations_of_their_own() -> None:
    durations = Durations("wait_seconds", "A wait.", BOUNDS, label="stage")
    durations.add(bucket_of(0.5), 0.5, "prefill")
    durations.add(bucket_of(0.25), 0.25, "decode")

    assert 'wait_seconds_sum{stage="prefill"} 0.5' in shown(durations)
    assert 'wait_seconds_bucket{le="0.1",stage="decode"} 0.0' in shown(durations)
    assert 'wait_seconds_bucket{le="1.0",stage="decode"} 1.0' in shown(durations)


def test_counts_are_shown_by_their_labels() -> None:
    counts = Counts("requests", "Requests.", ("path", "code"))
    for code in ("200", "200", "503"):
        counts.add("none", code)

    assert shown(counts) == [
        'requests_total{code="200",path="none"} 2.0',
        'requests_total{code="503",path="none"} 1.0',
    ]
