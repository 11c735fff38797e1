"""One page of metrics from those of several workers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Labels = tuple[tuple[str, str], ...]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One number."""

    name: str
    labels: Labels
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """One metric with all of its samples."""

    name: str
    kind: str
    documentation: str
    samples: tuple[Sample, ...]


Page = tuple[Family, ...]


def page_of(registry: Collector) -> Page:
    """Return what a registry shows now."""
    return tuple(
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            tuple(
                Sample(one.name, tuple(sorted(one.labels.items())), one.value)
                for one in metric.samples
            ),
        )
        for metric in registry.collect()
    )


def merge(pages: Iterable[Page], *, least_of: Iterable[str] = ()) -> Page:
    """Return the sums of all samples over the pages.

    Args:
        pages: of the workers.
        least_of: names of gauges of which the lowest value counts instead.
    """
    merged: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, Labels], float]] = {}
    lowest = frozenset(least_of)
    for family in (family for page in pages for family in page):
        merged.setdefault(family.name, family)
        known = values.setdefault(family.name, {})
        # Of the times at which counters were made the first is that of their sum.
        for sample in family.samples:
            takes_least = family.name in lowest or sample.name.endswith("_created")
            join: Callable[[float, float], float] = min if takes_least else _add
            key = (sample.name, sample.labels)
            known[key] = join(known[key], sample.value) if key in known else sample.value
    return tuple(
        msgspec.structs.replace(
            family, samples=tuple(Sample(*key, value) for key, value in values[name].items())
        )
        for name, family in merged.items()
    )


def what_stays(page: Page) -> Page:
    """Return what of a worker's page still counts when it is gone: no gauges."""
    return tuple(family for family in page if family.kind != "gauge")


def render(page: Page) -> bytes:
    """Return a page in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Shown(page))
    return generate_latest(registry)


class _Shown(Collector):
    """Lets prometheus_client write a page."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def collect(self) -> Sequence[Metric]:
        metrics = []
        for family in self._page:
            metric = Metric(family.name, family.documentation, family.kind)
            for sample in family.samples:
                metric.add_sample(sample.name, dict(sample.labels), sample.value)
            metrics.append(metric)
        return metrics


def _add(one: float, other: float) -> float:
    return one + other
