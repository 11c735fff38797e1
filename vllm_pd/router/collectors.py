"""Counters and histograms for Prometheus that cost next to nothing to fill.

Those of prometheus_client take a lock, look their labels up and walk through their
buckets, for each of the dozen values that a request leaves behind: a tenth of the time
that the router had for it. These are filled by one thread, the event loop's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from vllm_pd.router.spread import Spread


class Durations(Collector):
    """A histogram of durations.

    Args:
        name: of the metric.
        documentation: what it tells.
        bounds: upper bounds of the buckets that it shows, of ``spread.BOUNDS``.
        label: name of its label; None: it has none.
    """

    def __init__(
        self, name: str, documentation: str, bounds: Sequence[float], *, label: str | None = None
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = bounds
        self._label_names = () if label is None else (label,)
        self._spreads: dict[str, Spread] = {}
        if label is None:
            self._spreads[""] = Spread()

    def add(self, bucket: int, seconds: float, label: str = "") -> None:
        """Count one duration, given by ``bucket_of`` and itself."""
        spread = self._spreads.get(label)
        if spread is None:
            spread = self._spreads[label] = Spread()
        spread.add_one(bucket, seconds)

    def add_all(self, buckets: Collection[int], total_s: float) -> None:
        """Count durations, given by their buckets, and their sum; not with a label."""
        self._spreads[""].add(buckets, total_s)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the histogram as it is now."""
        family = HistogramMetricFamily(
            self._name, self._documentation, labels=self._label_names or None
        )
        for label, spread in self._spreads.items():
            counts = spread.cumulative(self._bounds)
            buckets = [
                (str(bound), count) for bound, count in zip(self._bounds, counts, strict=True)
            ]
            family.add_metric(
                (label,) if self._label_names else (),
                [*buckets, ("+Inf", spread.num)],
                spread.total_s,
            )
        yield family


class Counts(Collector):
    """A counter.

    Args:
        name: of the metric, without ``_total``.
        documentation: what it tells.
        label_names: of its labels, one at least.
    """

    def __init__(self, name: str, documentation: str, label_names: Sequence[str]) -> None:
        self._name = name
        self._documentation = documentation
        self._label_names = label_names
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, *labels: str) -> None:
        """Count one, with the values of its labels."""
        self._counts[labels] += 1

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Return the counter as it is now."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._label_names)
        for labels, count in self._counts.items():
            family.add_metric(labels, count)
        yield family
