"""The connector's metrics in vLLM's ``/metrics``, made through vLLM's own hooks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from vllm_pd.connector.stats import StatsData, WorkerState
from vllm_pd.protocol.state import LeaseEnd
from vllm_pd.session.stats import FetchRecord, Outcome
from vllm_pd.transport.registry import known_names

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT

logger = logging.getLogger(__name__)

_DROP_REASONS = (
    "malformed",
    "frame_count",
    "unexpected",
    "unsent",
    "wrong_key",
    "handshake",
    "oversized",
)
_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
_BYTES = tuple(2.0**power for power in range(14, 37, 2))  # 16 KiB to 64 GiB
_BYTES_PER_SECOND = (1e7, 3e7, 1e8, 3e8, 1e9, 2e9, 3e9, 5e9, 7e9, 1e10, 2e10, 5e10, 1e11)


class _Series:
    """The time series of one metric, by engine and by the labels that are ours."""

    def __init__(
        self,
        metric: Any,
        per_engine_labelvalues: Mapping[int, list[object]],
        known: Iterable[tuple[str, ...]],
    ) -> None:
        self._metric = metric
        self._per_engine_labelvalues = per_engine_labelvalues
        self._children: dict[tuple[int, tuple[str, ...]], Any] = {}
        for labels in known:  # they exist from the start, for rate() to see the first event
            for engine_idx in per_engine_labelvalues:
                self.of(engine_idx, *labels)

    def of(self, engine_idx: int, *labels: str) -> Any:
        """Return the series of an engine and labels."""
        key = (engine_idx, labels)
        if key not in self._children:
            values = [*self._per_engine_labelvalues[engine_idx], *labels]
            self._children[key] = self._metric.labels(*values)
        return self._children[key]


class PDPromMetrics(KVConnectorPromMetrics):
    """The connector's metrics in an API server, beside vLLM's own.

    Args:
        vllm_config: of the engine.
        metric_types: classes for Prometheus' ones, e.g. Ray's.
        labelnames: vLLM's labels.
        per_engine_labelvalues: their values, by engine.
    """

    _registered: ClassVar[list[Any]] = []

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._unregister_previous()
        self._shown_transports: dict[int, set[tuple[str, str, str]]] = {}
        self._make_counters()
        self._make_gauges()
        self._make_histograms()

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record what happened in one step of an engine; never raises.

        An exception here would end vLLM's output loop, and with it all requests.
        """
        try:
            data = msgspec.convert(transfer_stats_data, StatsData)
            for fetch in data.fetches:
                self._observe_fetch(fetch, engine_idx)
            self._count(data, engine_idx)
            self._show(data.workers, engine_idx)
        except Exception:
            logger.exception("metrics of one step are lost")

    def _observe_fetch(self, fetch: FetchRecord, engine_idx: int) -> None:
        self._fetches.of(engine_idx, fetch.outcome.value).inc()
        self._saved_bytes.of(engine_idx).inc(fetch.num_bytes_saved)
        if fetch.transport:
            self._fetched_bytes.of(engine_idx, fetch.transport).inc(fetch.num_bytes)
        if fetch.outcome is not Outcome.OK:
            return
        timeline = fetch.timeline
        self._fetch_seconds.of(engine_idx).observe(timeline.total_s)
        self._handshake_seconds.of(engine_idx).observe(timeline.handshake_s)
        self._transfer_seconds.of(engine_idx).observe(timeline.transfer_s)
        self._verify_seconds.of(engine_idx).observe(timeline.verify_s)
        self._fetch_bytes.of(engine_idx).observe(fetch.num_bytes)
        if fetch.num_bytes and timeline.transfer_s > 0:
            self._bandwidth.of(engine_idx).observe(fetch.num_bytes / timeline.transfer_s)

    def _count(self, data: StatsData, engine_idx: int) -> None:
        self._saved_bytes.of(engine_idx).inc(data.num_bytes_saved)
        self._sent_bytes.of(engine_idx).inc(data.num_bytes_sent)
        self._leases_granted.of(engine_idx).inc(data.num_leases_granted)
        for series, counts in (
            (self._leases_ended, data.num_leases_ended),
            (self._handshake_failures, data.num_handshake_failures),
            (self._dropped_frames, data.num_dropped_frames),
        ):
            for reason, count in counts.items():
                series.of(engine_idx, reason).inc(count)

    def _show(self, workers: Mapping[str, WorkerState], engine_idx: int) -> None:
        if not workers:
            return
        states = workers.values()
        self._leases.of(engine_idx).set(sum(state.num_leases for state in states))
        self._blocks_held.of(engine_idx).set(sum(state.num_blocks_held for state in states))
        transports = {
            (name, mode, reason)
            for state in states
            for name, (mode, reason) in state.transports.items()
        }
        for gone in self._shown_transports.get(engine_idx, set()) - transports:
            self._transport_info.of(engine_idx, *gone).set(0)
        for labels in transports:
            self._transport_info.of(engine_idx, *labels).set(1)
        self._shown_transports[engine_idx] = transports

    def _make_counters(self) -> None:
        self._fetches = self._counter(
            "fetches",
            "Fetches of KV blocks that ended, by outcome. A request counts once for each worker.",
            "outcome",
            (outcome.value for outcome in Outcome),
        )
        self._fetched_bytes = self._counter(
            "fetched_bytes", "Bytes of KV cache fetched, by transport.", "transport", known_names()
        )
        self._sent_bytes = self._counter(
            "sent_bytes", "Bytes of KV cache that consumers fetched from here."
        )
        self._saved_bytes = self._counter(
            "saved_bytes", "Bytes of KV cache not fetched, because the prefix cache had them."
        )
        self._leases_granted = self._counter(
            "leases_granted",
            "Finished prefills kept for a consumer. A request counts once for each worker.",
        )
        self._leases_ended = self._counter(
            "leases_ended",
            "Leases that are over, by reason. A request counts once for each worker.",
            "reason",
            (reason.value for reason in LeaseEnd),
        )
        self._handshake_failures = self._counter(
            "handshake_failures",
            "Sessions between workers that did not come about, by reason.",
            "reason",
            (*(outcome.value for outcome in Outcome if outcome is not Outcome.OK), "refused"),
        )
        self._dropped_frames = self._counter(
            "dropped_frames",
            "Control frames and connections that were not accepted, by reason.",
            "reason",
            _DROP_REASONS,
        )

    def _make_gauges(self) -> None:
        self._leases = self._gauge(
            "leases", "Prefills kept for a consumer now, summed over the workers."
        )
        self._blocks_held = self._gauge(
            "blocks_held", "KV blocks kept for consumers now, summed over the workers."
        )
        self._transport_info = self._gauge(
            "transport_info",
            "1 for the mode that a transport works in now, and the reason if it is not the best.",
            ("transport", "mode", "reason"),
        )

    def _make_histograms(self) -> None:
        self._fetch_seconds = self._histogram(
            "fetch_seconds",
            "Seconds from the engine's order to the verified blocks, of successful fetches.",
            _SECONDS,
        )
        self._handshake_seconds = self._histogram(
            "handshake_seconds",
            "Seconds of successful fetches until their sessions were ready; 0 if they were.",
            _SECONDS,
        )
        self._transfer_seconds = self._histogram(
            "transfer_seconds",
            "Seconds of successful fetches from the producer's readiness to the last byte.",
            _SECONDS,
        )
        self._verify_seconds = self._histogram(
            "verify_seconds", "Seconds spent on digests, of successful fetches.", _SECONDS
        )
        self._bandwidth = self._histogram(
            "fetch_bandwidth_bytes_per_second",
            "Bytes per second of transfer, of successful fetches.",
            _BYTES_PER_SECOND,
        )
        self._fetch_bytes = self._histogram(
            "fetch_bytes", "Bytes of each successful fetch.", _BYTES
        )

    def _counter(
        self, name: str, documentation: str, label: str | None = None, known: Iterable[str] = ()
    ) -> _Series:
        labels = () if label is None else (label,)
        series = [(value,) for value in known] if label else [()]
        return self._made(self._counter_cls, name, documentation, labels, series)

    def _gauge(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> _Series:
        series = [] if labels else [()]
        # As vLLM's own gauges: with several API servers the last one to know is right.
        return self._made(
            self._gauge_cls, name, documentation, labels, series, multiprocess_mode="mostrecent"
        )

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> _Series:
        return self._made(self._histogram_cls, name, documentation, (), [()], buckets=list(buckets))

    def _made(
        self,
        kind: Any,
        name: str,
        documentation: str,
        labels: tuple[str, ...],
        known: Iterable[tuple[str, ...]],
        **options: Any,
    ) -> _Series:
        metric = kind(
            name=f"vllm_pd:kv_{name}",
            documentation=documentation,
            labelnames=[*self._labelnames, *labels],
            **options,
        )
        self._registered.append(metric)
        return _Series(metric, self.per_engine_labelvalues, known)

    @classmethod
    def _unregister_previous(cls) -> None:
        """Make way for a second engine in this process.

        0.32.0 unregisters only what is called ``vllm:``.
        """
        while cls._registered:
            with contextlib.suppress(KeyError):  # unregistered by vLLM, or never there
                REGISTRY.unregister(cls._registered.pop())
