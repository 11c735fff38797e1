"""What a run's figures look like to people: for the terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.reporting import markdown_table, number
from benchmarks.serving.figures import Figures
from vllm_pd.bench.records import METRICS
from vllm_pd.bench.stats import Interval, Summary

_LATENCY_HEADER = ("ms", "mean", "median", "P90", "P99")


def tables(figures: Figures) -> list[Table]:
    """Return the tables for the terminal."""
    made = [_table("Serving benchmark", ("", ""), _throughput(figures))]
    made += [
        _table(title, _LATENCY_HEADER, _latency(found))
        for title, found in _latencies(figures).items()
    ]
    if figures.stages:
        header = ("stage (mean of what was timed)", "clock", "ms", "count")
        made.append(_table("Where the time went", header, _stages(figures)))
    return made


def markdown(figures: Figures) -> str:
    """Return the same as Markdown."""
    parts = [
        *(f"**{warning}**" for warning in figures.warnings),
        markdown_table(("figure", "value"), _throughput(figures)),
    ]
    for title, found in _latencies(figures).items():
        parts += [f"{title}:", markdown_table(_LATENCY_HEADER, _latency(found))]
    if figures.stages:
        header = ("stage (mean of what was timed)", "clock", "ms", "count")
        parts += ["Where the time went:", markdown_table(header, _stages(figures))]
    return "\n\n".join(parts) + "\n"


def _latencies(figures: Figures) -> dict[str, Mapping[str, Summary]]:
    """Return latencies by title, which says whether they are those of a steady service."""
    regime = figures.steadiness.regime.value
    return {
        f"Latency of all requests, from the intended arrival ({regime})": figures.latencies,
        f"Latency without the first tenth of the arrivals ({regime})": figures.window,
    }


def _throughput(figures: Figures) -> list[tuple[str, str]]:
    lines = [
        ("requests", str(figures.count)),
        ("failed", str(figures.failed)),
        ("duration, s", number(figures.duration_s)),
        ("request throughput, req/s", number(figures.request_rate)),
        ("the same without start and drain", number(figures.window_request_rate)),
        ("output throughput, tok/s", number(figures.output_rate)),
        ("total throughput, tok/s", number(figures.total_rate)),
        ("regime", figures.steadiness.regime.value),
    ]
    if figures.is_scheduled:
        lag = f"{number(figures.lag.p50)} / {number(figures.lag.p99)}"
        lines.append(("lag of the client, median / P99, ms", lag))
    if (found := figures.attainment) is not None:
        share = f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
        lines.append((f"met {figures.objectives}", share))
        lines.append(("goodput without start and drain, req/s", number(_goodput(figures, found))))
    return lines


def _goodput(figures: Figures, attainment: Interval) -> float:
    """Return answers per second that met the objectives; of a backlog the drain is all there is."""
    rate = figures.window_request_rate
    if math.isnan(rate):
        rate = figures.request_rate
    answered = max(figures.count - figures.failed, 1)
    return rate * attainment.value * figures.count / answered


def _latency(latencies: Mapping[str, Summary]) -> list[tuple[str, ...]]:
    return [
        (METRICS[metric], *(number(value) for value in (s.mean, s.p50, s.p90, s.p99)))
        for metric, s in latencies.items()
    ]


def _stages(figures: Figures) -> list[tuple[str, ...]]:
    return [
        (stage.name, stage.source, number(stage.mean_ms), str(stage.count))
        for stage in figures.stages
    ]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
