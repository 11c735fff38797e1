"""What was measured, cell by cell, and what follows from it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.reporting import Row, number
from benchmarks.serving.figures import Figures, make_rows
from benchmarks.serving.load import Run
from vllm_pd.bench.intervals import intervals
from vllm_pd.bench.records import Record, metric_values
from vllm_pd.bench.slo import Objectives, attainment
from vllm_pd.bench.stats import Interval, mean
from vllm_pd.bench.steady import Regime, answer_rates, judge
from vllm_pd.bench.tails import tail
from vllm_pd.bench.verdict import (
    ATTAINMENT,
    THROUGHPUT,
    Finding,
    Verdict,
    compare,
    compare_attainment,
    compare_throughput,
    is_answered_alike,
)

UNITS = {THROUGHPUT: "req/s", ATTAINMENT: "share"}
"""Of differences; those of latencies are in milliseconds."""

METRICS = ("ttft", "second", "tpot", "itl", "stall", "e2el")


@dataclass(frozen=True, slots=True)
class Level:
    """A load.

    Attributes:
        share: of the capacity of the reference; None: a rate was given.
        rate: requests per second; ``inf``: all at once.
    """

    share: float | None
    rate: float

    @property
    def name(self) -> str:
        """For people."""
        if math.isinf(self.rate):
            return "saturation"
        if self.share is None:
            return f"{self.rate:g} req/s"
        return f"{self.share:.0%} of capacity"

    @property
    def slug(self) -> str:
        """For names of files."""
        if math.isinf(self.rate):
            return "saturation"
        return f"{self.rate:g}rps" if self.share is None else f"{self.share * 100:.0f}percent"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a cell.

    Attributes:
        seed: of what was asked; each round has its own.
        run: what came of it.
        figures: what is reported of it.
        stolen: part of the machine's CPU time that a hypervisor gave to others; None: not known.
    """

    seed: int
    run: Run
    figures: Figures
    stolen: float | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One deployment under one load.

    Attributes:
        deployment: its name.
        workload: what was asked.
        level: how often.
        samples: one for each seed, at least one.
    """

    deployment: str
    workload: str
    level: Level
    samples: tuple[Sample, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """What came of each run."""
        return tuple(sample.run for sample in self.samples)

    @property
    def figures(self) -> tuple[Figures, ...]:
        """What is reported of each run."""
        return tuple(sample.figures for sample in self.samples)

    @property
    def stolen(self) -> float | None:
        """Largest part of the CPU time that was stolen in a run; None: not known."""
        return max((one.stolen for one in self.samples if one.stolen is not None), default=None)

    @property
    def is_interrupted(self) -> bool:
        """Whether a run is not complete."""
        return any(run.is_interrupted for run in self.runs)

    @property
    def labels(self) -> dict[str, str]:
        """For rows."""
        return {"deployment": self.deployment, "workload": self.workload, "load": self.level.name}

    @property
    def records(self) -> list[list[Record]]:
        """Requests of the part that is compared, for each seed.

        It is cut by when requests were due, so it has the same ones in every
        deployment: all but the first tenth, or all if they came at once.
        """
        found = []
        for run in self.runs:
            window = judge(run.records)
            found.append([record for record in run.records if window.contains(record)])
        return found

    @property
    def regime(self) -> Regime:
        """The worst of all runs."""
        regimes = {figures.steadiness.regime for figures in self.figures}
        order = (Regime.UNSTABLE, Regime.SHORT, Regime.STEADY)
        return next(regime for regime in order if regime in regimes)

    @property
    def window_rate(self) -> float:
        """Mean throughput of all runs without start and drain; NaN if all came at once."""
        return sum(figures.window_request_rate for figures in self.figures) / len(self.figures)

    @property
    def objectives(self) -> Objectives | None:
        """What requests had to meet."""
        return self.figures[0].objectives

    @property
    def attainment(self) -> Interval | None:
        """Part of the requests that are compared that met it."""
        return attainment(self.records, self.objectives) if self.objectives else None

    @property
    def request_rate(self) -> float:
        """Mean request throughput of all runs, the drain included."""
        return sum(figures.request_rate for figures in self.figures) / len(self.figures)

    @property
    def count(self) -> int:
        """Requests of all runs."""
        return sum(figures.count for figures in self.figures)

    @property
    def failed(self) -> int:
        """Requests of all runs that failed."""
        return sum(figures.failed for figures in self.figures)


@dataclass(frozen=True, slots=True)
class Duel:
    """One deployment against another under the same load."""

    ours: Cell
    theirs: Cell
    findings: tuple[Finding, ...]

    def named(self, verdict: Verdict) -> list[Finding]:
        """Return the findings with a verdict."""
        return [finding for finding in self.findings if finding.verdict is verdict]

    def sentence(self) -> str:
        """Return the verdict in plain language."""
        parts = [
            f"{verdict.value}: {', '.join(_brief(one) for one in found)}"
            for verdict in (Verdict.BETTER, Verdict.WORSE)
            if (found := self.named(verdict))
        ]
        parts += [
            f"{verdict.value}: {', '.join(one.name for one in found)}"
            for verdict in (Verdict.OPEN, Verdict.FEW)
            if (found := self.named(verdict))
        ]
        names = f"{self.ours.deployment} against {self.theirs.deployment}"
        text = f"{names} is {'; '.join(parts)}" if parts else f"{names}: {Verdict.WITHHELD.value}"
        if parts and self.named(Verdict.WITHHELD):
            text += f"; all else: {Verdict.WITHHELD.value}"
        if self.ours.failed or self.theirs.failed:
            text += " (failed: " + ", ".join(
                f"{cell.failed} of {cell.count} requests of {cell.deployment}"
                for cell in (self.ours, self.theirs)
            )
            text += "; latencies are those of the others)"
        regimes = {cell.deployment: cell.regime for cell in (self.ours, self.theirs)}
        if set(regimes.values()) != {Regime.STEADY}:
            named = ", ".join(f"{name} {regime.value}" for name, regime in regimes.items())
            text += f" (no steady state: {named}; the ratios may depend on the duration)"
        return text + "."


def merge(cells: Iterable[Cell]) -> list[Cell]:
    """Return one cell for each deployment under each load, with the runs of all rounds by seed.

    A run that was interrupted is left out where there is a complete one.
    """
    found: dict[tuple[str, str, Level], list[Sample]] = {}
    for cell in cells:
        found.setdefault((cell.deployment, cell.workload, cell.level), []).extend(cell.samples)
    merged = []
    for key, samples in found.items():
        complete = [sample for sample in samples if not sample.run.is_interrupted]
        kept = sorted(complete or samples, key=lambda sample: sample.seed)
        merged.append(Cell(*key, tuple(kept)))
    return merged


def duels(cells: Sequence[Cell], ours: str, theirs: str | None = None) -> list[Duel]:
    """Compare one deployment with others, wherever both were asked the same.

    Only seeds are compared of which both have a complete run.

    Args:
        cells: what was measured.
        ours: the deployment.
        theirs: the other one; None: each other one.
    """
    found = []
    for cell in (cell for cell in cells if cell.deployment == ours):
        for other in cells:
            is_same = (other.workload, other.level) == (cell.workload, cell.level)
            is_wanted = other is not cell and theirs in (None, other.deployment)
            if is_same and is_wanted and (pair := _paired(cell, other)) is not None:
                found.append(Duel(*pair, tuple(_findings(*pair))))
    return found


def _findings(cell: Cell, other: Cell) -> list[Finding]:
    ours, theirs = cell.records, other.records
    found = compare(ours, theirs, METRICS)
    rates = [[answer_rates(run.records) for run in one.runs] for one in (cell, other)]
    found.append(compare_throughput(*rates, is_paired=is_answered_alike(ours, theirs)))
    if cell.objectives is not None:
        found.append(compare_attainment(ours, theirs, cell.objectives))
    return found


def cell_rows(cells: Iterable[Cell]) -> list[Row]:
    """Return what was measured, with intervals over seeds and requests."""
    rows: list[Row] = []
    for cell in cells:
        for sample in cell.samples:
            rows += make_rows(sample.figures, **cell.labels, run=str(sample.seed))
        labels = {**cell.labels, "regime": cell.regime.value}
        if cell.stolen is not None:
            rows.append(Row(labels, "steal", cell.stolen, "share"))
        for metric in METRICS:
            runs = [metric_values(records, metric) for records in cell.records]
            (found,) = intervals(runs, (mean,))
            for name, estimate in (("mean", found), ("p99", tail(runs, 99))):
                labelled = {**labels, "is_enough": _yes_or_no(is_yes=estimate.is_enough)}
                figure, of = f"compared_{metric}_{name}", estimate.interval
                rows.append(Row(labelled, figure, of.value, "ms", of.low, of.high))
        if (share := cell.attainment) is not None:
            figure, bounds = "compared_slo_attainment", (share.low, share.high)
            rows.append(Row(labels, figure, share.value, "share", *bounds))
    return rows


def duel_rows(fought: Iterable[Duel]) -> list[Row]:
    """Return ratios and differences; of SLO attainments no ratio, as it may be one to nothing."""
    rows: list[Row] = []
    for duel in fought:
        labels = {
            **duel.ours.labels,
            "regime": duel.ours.regime.value,
            "against": duel.theirs.deployment,
            "regime of that": duel.theirs.regime.value,
        }
        for one in duel.findings:
            labelled = {
                **labels,
                "verdict": one.verdict.value,
                "is_enough": _yes_or_no(is_yes=one.comparison.is_enough),
            }
            of = one.comparison.difference
            figure, unit = f"difference of {one.name}", UNITS.get(one.name, "ms")
            rows.append(Row(labelled, figure, of.value, unit, of.low, of.high))
            if not one.is_difference:
                of = one.comparison.ratio
                rows.append(Row(labelled, f"ratio of {one.name}", of.value, "x", of.low, of.high))
    return rows


def _yes_or_no(*, is_yes: bool) -> str:
    return "yes" if is_yes else "no"


def _paired(one: Cell, other: Cell) -> tuple[Cell, Cell] | None:
    """Return both with the runs of which each has the same requests; None: there are none."""
    others = {sample.seed: sample for sample in other.samples}
    pairs = [
        (sample, others[sample.seed])
        for sample in one.samples
        if sample.seed in others and _are_alike(sample.run, others[sample.seed].run)
    ]
    if not pairs:
        return None
    first, second = zip(*pairs, strict=True)
    return replace(one, samples=first), replace(other, samples=second)


def _are_alike(one: Run, other: Run) -> bool:
    is_complete = not (one.is_interrupted or other.is_interrupted)
    return is_complete and len(one.records) == len(other.records)


def shown(finding: Finding) -> str:
    """Return a ratio, or the difference of an SLO attainment in points, with its interval."""
    found = finding.interval
    if finding.is_difference:
        return f"{_signed(100 * found.value)} points ({_range(found, 100)})"
    return f"{number(found.value)} x ({number(found.low)} to {number(found.high)})"


def in_short(finding: Finding) -> str:
    """Return what can be said, then the ratio, or of an SLO attainment the difference."""
    value = finding.interval.value
    text = f"{_signed(100 * value)} points" if finding.is_difference else f"{number(value)} x"
    match finding.verdict:
        case Verdict.OPEN:
            return f"same? {text}"
        case Verdict.FEW:
            return f"{text}, too few"
        case Verdict.WITHHELD:
            return f"{text}, other requests failed"
        case verdict:
            return f"{verdict.value} {text}"


def shown_difference(finding: Finding) -> str:
    """Return the difference behind a ratio with its interval; nothing where that is shown."""
    if finding.is_difference:
        return ""
    found, unit = finding.comparison.difference, UNITS.get(finding.name, "ms")
    return f"{_signed(found.value)} {unit} ({_range(found)})"


def _range(interval: Interval, scale: float = 1) -> str:
    return f"{_signed(scale * interval.low)} to {_signed(scale * interval.high)}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def _brief(finding: Finding) -> str:
    return f"{finding.name} {shown(finding)}"
