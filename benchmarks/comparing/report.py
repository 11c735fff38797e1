"""The report of a comparison: Markdown with the pictures, JSON with every figure."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.comparing.bar import Goal, bar_lines
from benchmarks.comparing.cells import (
    Cell,
    Duel,
    cell_rows,
    duel_rows,
    duels,
    in_short,
    shown,
    shown_difference,
)
from benchmarks.comparing.deployments import CONTROL, PD, REPLICAS, TITLES
from benchmarks.comparing.plots import draw_all
from benchmarks.reporting import Report, Row, markdown_table, number, write
from benchmarks.serving.figures import LATE_MS
from benchmarks.transfer.pair import BenchError
from vllm_pd.bench.records import METRICS, Record, pooled
from vllm_pd.bench.stats import FEW_FOR_P99, Interval, summarize
from vllm_pd.bench.tails import FEW_WITH_MANY
from vllm_pd.bench.verdict import ATTAINMENT, THROUGHPUT, Finding, Verdict

_HEADER = (
    *("deployment", "req/s", "req/s without drain", "TTFT mean", "TTFT P99", "TPOT mean"),
    *("TPOT P99", "ITL mean", "ITL P99", "max stall P99", "met objectives", "client lag P99"),
    *("steal", "failed", "regime"),
)
_AT_A_GLANCE = (
    *("TTFT mean", "TTFT P99", "TPOT mean", "TPOT P99", "ITL mean", "ITL P99"),
    *("Max stall mean", "Max stall P99", THROUGHPUT, ATTAINMENT),
)
_MAIN = ("TTFT mean", "TPOT mean", "ITL P99", "Max stall mean", THROUGHPUT, ATTAINMENT)
_MUCH_STOLEN = 0.05
"""Part of the CPU time, beyond which a run says as much of the hypervisor as of the service."""

_ABOUT_SHORT = (
    "PD against each other deployment: its figure as a multiple of the other's, of SLO attainment "
    "the difference. `same?`: not distinguishable. `too few`: too few runs or requests for a "
    "verdict."
)
_HOW_TO_READ = (
    "Latencies are milliseconds from the moment a request was to be sent, "
    "of the requests of all seeds that were due after the first tenth of a run. Every deployment "
    "had the same devices and got the same requests at the same times, so ratios are paired. "
    "Intervals are meant to cover the truth in 95 % of the cases. Of three runs or more each is a "
    "block of its own, fewer are cut into blocks of neighbouring requests, as those wait for each "
    "other; for P99 parts of runs are, to which is added what runs differ by beyond that. In "
    "simulated services, where there is a verdict, "
    "those of means and medians did so in 92 to 98 %, of P99 in 90 to 97 % "
    "(`benchmarks/interval_coverage.py`). A ratio counts if its interval excludes 1, and a "
    "difference of SLO attainments if it excludes 0. Where there are fewer than three runs and "
    "these are short, or short against the memory of their queue, and for P99 of fewer than "
    f"{FEW_FOR_P99} requests ({FEW_WITH_MANY} for ITL, of which each has many) or where hardly one "
    "lies beyond, there is a ratio but no verdict. "
    "Throughput is compared over the time in which requests came: below capacity every deployment "
    "answers what it is asked. `req/s` also counts the drain, so it falls with the length of the "
    "last answers and is no capacity. Where all come at once the two are the same, and the "
    "verdict is over seeds alone. Deployments ran one after the other, in rounds: each round "
    "started every one once, in another order, and asked one seed. So what changed on the machine "
    "between them "
    "(clock, heat, other programs) differs from round to round and is in the intervals where there "
    "are three rounds or more; with one or two it is in the ratios and in no interval. `steal` is "
    "the part of the CPU time that a hypervisor gave to others, of the worst run. **What this does "
    "not mean.** `control`, where it was run, is the baseline once more, "
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
    folder: Path,
    cells: Sequence[Cell],
    environment: Mapping[str, str],
    notes: Sequence[str],
    goals: Sequence[Goal] = (),
) -> str:
    """Write everything into a folder; return the Markdown.

    Args:
        folder: where.
        cells: what was measured, one for each deployment under each load.
        environment: what a reader must know.
        notes: what must be said beside it.
        goals: what is to be reached.

    Raises:
        BenchError: a file cannot be written.
    """
    for name in ("plots", "raw"):
        (folder / name).mkdir(exist_ok=True)
    _write_raw(cells, folder / "raw")
    compared = [cell for cell in cells if cell.deployment != CONTROL]
    found = [*duels(compared, PD), *duels(cells, CONTROL, REPLICAS)]
    rows = [*cell_rows(cells), *duel_rows(found)]
    _write_json(Report("compare", environment, rows, notes), folder / "report.json")
    head = _head(found, notes, bar_lines(goals, found))
    text = head + _markdown(cells, found, environment, draw_all(cells, folder / "plots"))
    write(folder / "report.md", text)
    return text


def _head(found: Sequence[Duel], notes: Sequence[str], bar: Sequence[Sequence[str]]) -> str:
    """Return what is to be read first."""
    parts = ["# PD against colocated deployments"]
    if short := [duel for duel in found if duel.ours.deployment == PD]:
        parts += ["## In short", _ABOUT_SHORT, _in_short(short)]
    parts += [f"**{note}**" for note in notes]
    if bar:
        header = ("figure", "aimed", "found", "met or missed")
        parts += ["## The bar", markdown_table(header, bar)]
    return "\n\n".join(parts) + "\n\n"


def _in_short(fought: Sequence[Duel]) -> str:
    rows = []
    for duel in fought:
        found = {finding.name: finding for finding in duel.findings}
        cells = [in_short(found[name]) if name in found else "-" for name in _MAIN]
        regimes = f"{duel.ours.regime.value} / {duel.theirs.regime.value}"
        named = (duel.ours.workload, duel.ours.level.name, duel.theirs.deployment, regimes)
        rows.append((*named, *cells))
    return markdown_table(("workload", "load", "PD against", "regimes", *_MAIN), rows)


def _markdown(
    cells: Sequence[Cell],
    found: Sequence[Duel],
    environment: Mapping[str, str],
    plots: Sequence[str],
) -> str:
    parts = ["## How to read this", _HOW_TO_READ]
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
        parts += [f"**{cell.deployment}: {text}.**" for cell in group for text in _warnings(cell)]
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


def _warnings(cell: Cell) -> list[str]:
    """Return what must be said beside the figures."""
    found = []
    if cell.is_interrupted:
        found.append("the run was interrupted; what was under way, the long ones, is left out")
    if cell.failed:
        found.append(f"{cell.failed} requests failed: {_causes(cell)}")
    if (lag := max(figures.lag.p99 for figures in cell.figures)) > LATE_MS:
        found.append(
            f"the client was late by {number(lag)} ms at P99, which is part of what was measured"
        )
    if (stolen := cell.stolen) is not None and stolen > _MUCH_STOLEN:
        found.append(
            f"a hypervisor took {stolen:.1%} of the CPU time in a run, which is part of what was "
            "measured"
        )
    return found


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
        "-" if cell.stolen is None else f"{cell.stolen:.1%}",
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


def _write_json(report: Report, path: Path) -> None:
    """Write a report with one row a line, as there are thousands."""
    head = {key: value for key, value in asdict(report).items() if key != "rows"}
    rows = ",\n".join(json.dumps(_plain_row(row), allow_nan=False) for row in report.rows)
    write(path, json.dumps(head)[:-1] + ', "rows": [\n' + rows + "\n]}\n")


def _plain_row(row: Row) -> dict[str, object]:
    return {key: _round(value) for key, value in asdict(row).items()}


def _write_raw(cells: Sequence[Cell], folder: Path) -> None:
    for cell in cells:
        for sample in cell.samples:
            name = f"{cell.workload}-{cell.level.slug}-{cell.deployment}-{sample.seed}.json.gz"
            lines = [json.dumps(_plain_record(record)) for record in sample.run.records]
            text = "[\n" + ",\n".join(lines) + "\n]\n"
            _write_bytes(folder / name, gzip.compress(text.encode(), mtime=0))


def _write_bytes(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise BenchError(f"cannot write {path}: {exc.strerror}") from exc


def _plain_record(record: Record) -> dict[str, object]:
    """Return a record with microseconds, and with tenths of milliseconds for the many gaps."""
    found = {key: _round(value) for key, value in asdict(record).items() if key != "gaps_s"}
    return {**found, "gaps_ms": [round(1e3 * gap, 1) for gap in record.gaps_s]}


def _round(value: object) -> object:
    """Return microseconds of seconds, and nothing that JSON has no word for."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
