"""The report of a comparison: Markdown with the pictures, JSON with every figure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.comparing.cells import (
    Cell,
    Duel,
    cell_rows,
    duel_rows,
    duels,
    shown,
    shown_difference,
)
from benchmarks.comparing.deployments import CONTROL, PD, REPLICAS, TITLES
from benchmarks.comparing.plots import draw_all
from benchmarks.reporting import Report, markdown_table, number, write
from benchmarks.serving.figures import LATE_MS
from vllm_pd.bench.records import METRICS, pooled
from vllm_pd.bench.stats import FEW_FOR_P99, Interval, summarize
from vllm_pd.bench.verdict import ATTAINMENT, THROUGHPUT, Finding, Verdict

_HEADER = (
    *("deployment", "req/s", "req/s without drain", "TTFT mean", "TTFT P99", "TPOT mean"),
    *("TPOT P99", "ITL mean", "ITL P99", "max stall P99", "met objectives", "client lag P99"),
    *("failed", "regime"),
)
_AT_A_GLANCE = (
    *("TTFT mean", "TTFT P99", "TPOT mean", "TPOT P99", "ITL mean", "ITL P99"),
    *(THROUGHPUT, ATTAINMENT),
)
_HOW_TO_READ = (
    "**How to read this.** Latencies are milliseconds from the moment a request was to be sent, "
    "of the requests of all seeds that were due after the first tenth of a run. Every deployment "
    "had the same devices and got the same requests at the same times, so ratios are paired. "
    "Intervals are meant to cover the truth in 95 % of the cases, over blocks of neighbouring "
    "requests, as those wait for each other; in simulated services, where there is a verdict, "
    "those of means and medians did so in 92 to 98 %, of P99 in 90 to 97 % "
    "(`benchmarks/interval_coverage.py`). A ratio counts if its interval excludes 1, and a "
    "difference of SLO attainments if it excludes 0. Where there are fewer than three runs and "
    "these are short, or short against the memory of their queue, and for P99 of fewer than "
    f"{FEW_FOR_P99} requests or where hardly one lies beyond, there is a ratio but no verdict. "
    "Throughput is compared over the time in which requests came: below capacity every deployment "
    "answers what it is asked. `req/s` also counts the drain, so it falls with the length of the "
    "last answers and is no capacity. Where all come at once the two are the same, and the "
    "verdict is over seeds alone. **What this does not mean.** Deployments ran one after the "
    "other, each once, so what changed on the machine between them (clock, heat, other programs) "
    "is in the ratios and in no interval; `control`, where it was run, is the baseline once more, "
    "and what is found there has no cause. Of many intervals some exclude 1 by chance. Latencies "
    "of a run that is not steady depend on how long it was. Ratios hold for this model, these "
    "lengths, arrivals and devices: on a CPU, scheduling and queueing are real, while the times "
    "of prefills and decode steps are not those of an accelerator."
)
_ABOUT_RATIOS = (
    "The first deployment's figure as a multiple of the second's (bold where it counts as better "
    "or worse) and the difference of both, each with its interval; of SLO attainment the "
    "difference in points. Of runs that are not steady the ratios may depend on the duration."
)


def write_report(
    folder: Path, cells: Sequence[Cell], environment: Mapping[str, str], notes: Sequence[str]
) -> str:
    """Write everything into a folder; return the Markdown.

    Raises:
        BenchError: a file cannot be written.
    """
    for name in ("plots", "raw"):
        (folder / name).mkdir(exist_ok=True)
    _write_raw(cells, folder / "raw")
    compared = [cell for cell in cells if cell.deployment != CONTROL]
    found = [*duels(compared, PD), *duels(cells, CONTROL, REPLICAS)]
    rows = [*cell_rows(cells), *duel_rows(found)]
    Report("compare", environment, rows, notes).write_json(folder / "report.json")
    text = _markdown(cells, found, environment, notes, draw_all(cells, folder / "plots"))
    write(folder / "report.md", text)
    return text


def _markdown(
    cells: Sequence[Cell],
    found: Sequence[Duel],
    environment: Mapping[str, str],
    notes: Sequence[str],
    plots: Sequence[str],
) -> str:
    parts = ["# PD against colocated deployments", _HOW_TO_READ]
    parts += [f"**{note}**" for note in notes]
    parts.append("\n".join(f"- {key}: {value}" for key, value in environment.items()))
    named = dict.fromkeys(cell.deployment for cell in cells)
    parts.append("\n".join(f"- `{name}`: {TITLES[name]}" for name in named))
    if found:
        parts += ["## Ratios", _ABOUT_RATIOS, _ratios(found)]
    for workload, level in dict.fromkeys((cell.workload, cell.level) for cell in cells):
        group = [c for c in cells if (c.workload, c.level) == (workload, level)]
        parts.append(f"## {workload}, {level.name}")
        parts.append(_about(group))
        parts.append(markdown_table(_HEADER, [_line(cell) for cell in group]))
        parts += [
            f"**{cell.deployment}: {cell.failed} requests failed: {_causes(cell)}.**"
            for cell in group
            if cell.failed
        ]
        parts += [
            f"**{cell.deployment}: the client was late by {number(lag)} ms at P99, which is part "
            "of what was measured.**"
            for cell in group
            if (lag := max(figures.lag.p99 for figures in cell.figures)) > LATE_MS
        ]
        fought = [d for d in found if (d.ours.workload, d.ours.level) == (workload, level)]
        parts += [_sentence(duel) for duel in fought]
        if stages := _stages(group):
            parts.append(stages)
        slug = f"{workload}-{level.slug}-"
        parts += [_image(name) for name in plots if name.startswith(slug)]
    curves = [name for name in plots if name.endswith("throughput-latency.png")]
    if curves:
        parts += ["## Latency over throughput", *(_image(name) for name in curves)]
    return "\n\n".join(parts) + "\n"


def _ratios(fought: Sequence[Duel]) -> str:
    header = ("workload", "load", "deployments", "regimes", *_AT_A_GLANCE)
    rows = []
    for duel in fought:
        found = {finding.name: finding for finding in duel.findings}
        cells = [_marked(found[name]) if name in found else "" for name in _AT_A_GLANCE]
        names = f"{duel.ours.deployment} / {duel.theirs.deployment}"
        regimes = f"{duel.ours.regime.value} / {duel.theirs.regime.value}"
        rows.append((duel.ours.workload, duel.ours.level.name, names, regimes, *cells))
    return markdown_table(header, rows)


def _marked(finding: Finding) -> str:
    is_told_apart = finding.verdict in (Verdict.BETTER, Verdict.WORSE)
    text = f"**{shown(finding)}**" if is_told_apart else shown(finding)
    return ", ".join(filter(None, [text, shown_difference(finding)]))


def _about(group: Sequence[Cell]) -> str:
    first = group[0]
    seeds = len(first.runs)
    count = sum(len(run.records) for run in first.runs)
    rate = number(first.level.rate)
    when = "all at once" if rate == "-" else f"at {rate} req/s on average"
    return f"{count} requests in {seeds} run{'s' if seeds > 1 else ''}, {when}."


def _line(cell: Cell) -> list[str]:
    found = {
        metric: summarize([v for records in cell.records for v in pooled(records, metric)])
        for metric in METRICS
    }
    values = [cell.request_rate, cell.window_rate]
    for metric in ("ttft", "tpot", "itl"):
        values += [found[metric].mean, found[metric].p99]
    values.append(found["stall"].p99)
    lag = max(figures.lag.p99 for figures in cell.figures)
    return [
        *(cell.deployment, *map(number, values), _share(cell.attainment), number(lag)),
        *(str(cell.failed), cell.regime.value),
    ]


def _share(found: Interval | None) -> str:
    return "-" if found is None else f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"


def _causes(cell: Cell) -> str:
    causes: Counter[str] = Counter()
    for figures in cell.figures:
        causes.update(figures.errors)
    return "; ".join(f"{count} x {error}" for error, count in causes.most_common(3))


def _sentence(duel: Duel) -> str:
    text = duel.sentence()
    has_won = {verdict: bool(duel.named(verdict)) for verdict in Verdict}
    if has_won[Verdict.BETTER] == has_won[Verdict.WORSE] or has_won[Verdict.WITHHELD]:
        return text
    word = "better" if has_won[Verdict.BETTER] else "worse"
    return f"{text} In all: {word} wherever there is a verdict."


def _stages(group: Sequence[Cell]) -> str:
    rows = [
        (cell.deployment, stage.name, stage.source, number(stage.mean_ms), str(stage.count))
        for cell in group
        for stage in cell.figures[0].stages
    ]
    if not rows:
        return ""
    header = ("deployment", "stage (mean, first run)", "clock", "ms", "count")
    return "Where the time went:\n\n" + markdown_table(header, rows)


def _image(name: str) -> str:
    return f"![{name.removesuffix('.png')}](plots/{name})"


def _write_raw(cells: Sequence[Cell], folder: Path) -> None:
    for cell in cells:
        for number_, run in enumerate(cell.runs, 1):
            name = f"{cell.workload}-{cell.level.slug}-{cell.deployment}-{number_}.json"
            lines = [json.dumps(_rounded(asdict(record))) for record in run.records]
            write(folder / name, "[\n" + ",\n".join(lines) + "\n]\n")


def _rounded(record: Mapping[str, object]) -> dict[str, object]:
    """Return a record with microseconds, and nothing that JSON has no word for."""
    return {key: _round(value) for key, value in record.items()}


def _round(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_round(item) for item in value]
    return value
