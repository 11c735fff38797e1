"""From the records of a run to what is reported of it. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.reporting import Row
from benchmarks.serving.load import Run
from vllm_pd.bench.records import METRICS, Record, pooled
from vllm_pd.bench.slo import Objectives, attainment
from vllm_pd.bench.stages import Stage
from vllm_pd.bench.stats import FEW_FOR_P99, Interval, Summary, summarize
from vllm_pd.bench.steady import Regime, Steadiness, judge

LATE_MS = 10.0
"""A client that is later than this at P99 is part of what it measures."""

MERGED = 1.01
"""Tokens per chunk above which ITL is not that of tokens."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is reported of one run.

    Attributes:
        count: requests that were sent.
        failed: requests that were not answered.
        errors: how often each error occurred.
        duration_s: from the first arrival to the last answer, the drain included.
        request_rate: answered requests per second of that.
        output_rate: generated tokens per second of that.
        total_rate: prompt and generated tokens per second of that.
        window_request_rate: answers per second of the window, without the drain.
        latencies: of all requests, by metric, in milliseconds.
        window: the same of requests that were due in the window, which is steady if
            ``steadiness`` says so.
        steadiness: whether latencies say something about the service.
        lag: of the client, in milliseconds.
        is_scheduled: whether the lag is known, and latencies count from the intended
            arrival.
        tokens_per_chunk: more than 1 if the server sends several tokens at once.
        objectives: what was required; None: nothing.
        attainment: part of the requests that met it.
        stages: where the time went, if a router of this project served.
        is_interrupted: whether the user ended the run early.
    """

    count: int
    failed: int
    errors: Mapping[str, int]
    duration_s: float
    request_rate: float
    output_rate: float
    total_rate: float
    window_request_rate: float
    latencies: Mapping[str, Summary]
    window: Mapping[str, Summary]
    steadiness: Steadiness
    lag: Summary
    is_scheduled: bool
    tokens_per_chunk: float
    objectives: Objectives | None = None
    attainment: Interval | None = None
    stages: Sequence[Stage] = ()
    is_interrupted: bool = False

    @property
    def warnings(self) -> list[str]:
        """What must be said beside the figures."""
        found = []
        if self.is_interrupted:
            found.append(
                f"interrupted: these are the {self.count} requests that were over by then; those "
                "under way, which are the long ones, are left out"
            )
        if self.steadiness.regime is not Regime.STEADY:
            found.append(f"{self.steadiness.regime.value}: {self.steadiness.reason}")
        if self.failed:
            share = self.failed / self.count
            causes = "; ".join(f"{count} x {error}" for error, count in self.errors.items())
            found.append(
                f"{self.failed} of {self.count} requests failed ({share:.1%}): {causes}. "
                "Latencies are those of the others"
            )
        if not self.is_scheduled:
            found.append(
                "it is not known when requests were to be sent: latencies count from when the "
                "client released them, and its lag is not known"
            )
        elif self.lag.p99 > LATE_MS:
            found.append(
                f"the client was late by {self.lag.p99:.0f} ms at P99: it is part of what was "
                "measured. Give it more CPU, or a lower rate"
            )
        if self.tokens_per_chunk > MERGED:
            found.append(
                f"a chunk has {self.tokens_per_chunk:.2f} tokens on average: ITL is that of chunks"
            )
        if self.count < FEW_FOR_P99:
            found.append(
                f"P99 of {self.count} requests rests on {math.ceil(self.count / 100)} of them"
            )
        return found


def make_figures(
    run: Run, objectives: Objectives | None = None, stages: Sequence[Stage] = ()
) -> Figures:
    """Compute everything that is reported of a run."""
    records = run.records
    answered = [record for record in records if record.is_ok]
    steadiness = judge(records)
    in_window = [record for record in records if steadiness.contains(record)]
    duration_s = max(run.duration_s, 1e-9)
    output_tokens = sum(record.output_len for record in answered)
    prompt_tokens = sum(record.prompt_len for record in answered)
    errors = Counter(record.error for record in records if not record.is_ok)
    return Figures(
        count=len(records),
        failed=len(records) - len(answered),
        errors=dict(errors.most_common()),
        duration_s=run.duration_s,
        request_rate=len(answered) / duration_s,
        output_rate=output_tokens / duration_s,
        total_rate=(output_tokens + prompt_tokens) / duration_s,
        window_request_rate=_rate_in(steadiness, answered),
        latencies=_latencies(records),
        window=_latencies(in_window),
        steadiness=steadiness,
        lag=summarize([record.lag_s * 1e3 for record in records]),
        is_scheduled=run.is_scheduled,
        tokens_per_chunk=_tokens_per_chunk(answered),
        objectives=objectives,
        attainment=attainment([records], objectives) if objectives else None,
        stages=stages,
        is_interrupted=run.is_interrupted,
    )


def make_rows(figures: Figures, **labels: str) -> list[Row]:
    """Return the figures one by one, with the regime; ``labels`` say of what."""
    rows: list[Row] = []
    labelled = {**labels, "regime": figures.steadiness.regime.value}

    def add(figure: str, value: float, unit: str, interval: Interval | None = None) -> None:
        bounds = (interval.low, interval.high) if interval else (None, None)
        rows.append(Row(labelled, figure, value, unit, *bounds))

    add("duration", figures.duration_s, "s")
    add("request_throughput", figures.request_rate, "req/s")
    add("window_request_throughput", figures.window_request_rate, "req/s")
    add("output_throughput", figures.output_rate, "tok/s")
    add("total_throughput", figures.total_rate, "tok/s")
    for prefix, latencies in (("", figures.latencies), ("window_", figures.window)):
        for metric, summary in latencies.items():
            for name in ("mean", "p50", "p90", "p99"):
                add(f"{prefix}{metric}_{name}", getattr(summary, name), "ms")
    add("client_lag_p99", figures.lag.p99, "ms")
    add("failed", figures.failed, "requests")
    if figures.attainment is not None:
        add("slo_attainment", figures.attainment.value, "share", figures.attainment)
    for stage in figures.stages:
        add(f"stage: {stage.source}: {stage.name}", stage.mean_ms, "ms")
    return rows


def as_data(figures: Figures) -> dict[str, Any]:
    """Return the figures as plain data for JSON."""
    data = asdict(figures)
    data["steadiness"]["regime"] = figures.steadiness.regime.value
    data["warnings"] = figures.warnings
    return data


def _latencies(records: Sequence[Record]) -> dict[str, Summary]:
    return {metric: summarize(pooled(records, metric)) for metric in METRICS}


def _rate_in(steadiness: Steadiness, answered: Sequence[Record]) -> float:
    length_s = steadiness.end_s - steadiness.start_s
    if length_s <= 0:
        return math.nan
    ended = [r for r in answered if steadiness.start_s < r.ended_s <= steadiness.end_s]
    return len(ended) / length_s


def _tokens_per_chunk(answered: Sequence[Record]) -> float:
    chunks = sum(1 + len(record.gaps_s) for record in answered)
    return sum(record.output_len for record in answered) / chunks if chunks else 1.0
