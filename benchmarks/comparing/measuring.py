"""Asks a running deployment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.comparing.cells import Cell, Level, Sample
from benchmarks.serving.figures import make_figures
from benchmarks.serving.load import Load, Run, run_loads
from benchmarks.serving.machine import CpuTimes, read_cpu_times, stolen_between
from benchmarks.serving.progress import Progress
from benchmarks.serving.target import Marks, Target, read_marks, stages_between
from vllm_pd.bench.slo import Objectives
from vllm_pd.bench.workload import Workload, cap_lengths, make_workload, shape_of

if TYPE_CHECKING:
    from rich.console import Console

WARM_UP = 8


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to ask.

    Attributes:
        seeds: runs at each load, each with other requests.
        duration_s: of the arrivals of a run.
        at_once: requests of a run in which all come at once.
        min_count: least requests of any other run.
        first_seed: of the first run; the others follow.
        exactly: requests of every run instead; None: as many as said above.
    """

    seeds: int
    duration_s: float
    at_once: int
    min_count: int = 12
    first_seed: int = 1
    exactly: int | None = None

    def count(self, level: Level) -> int:
        """Return the requests of a run."""
        if self.exactly is not None:
            return self.exactly
        if math.isinf(level.rate):
            return self.at_once
        return max(self.min_count, round(level.rate * self.duration_s))


@dataclass(frozen=True, slots=True)
class Subject:
    """A deployment that answers.

    Attributes:
        name: of the deployment.
        target: its address and model.
    """

    name: str
    target: Target


@dataclass(frozen=True, slots=True)
class _Mark:
    """Counters between two runs: of the deployment, and of the machine."""

    metrics: Marks
    cpu: CpuTimes | None

    @classmethod
    def read(cls, base_url: str) -> _Mark:
        return cls(read_marks(base_url), read_cpu_times())


def measure_cells(
    subject: Subject,
    workload: str,
    levels: Sequence[Level],
    effort: Effort,
    console: Console,
    objectives: Objectives | None = None,
) -> tuple[list[Cell], bool]:
    """Ask a deployment at some loads, each with every seed.

    Returns:
        The loads that were measured, and whether the user ended it early; then the last
        run is not complete.

    Raises:
        BenchError: the load generator failed.
        KeyboardInterrupt: it was interrupted before the first request.
    """
    seeds = range(effort.first_seed, effort.first_seed + effort.seeds)
    asked = [(level, seed) for level in levels for seed in seeds]
    loads = []
    for level, seed in asked:
        made = requests_of(workload, level, effort, seed, subject.target.max_len)
        loads.append(Load(subject.target, len(made.requests), ("--seed", str(seed)), made))
    title = f"{subject.name}, {workload}"
    phases = [(f"{title}, warming up", WARM_UP)]
    phases += [
        (f"{title}, {level.name}, seed {seed}", load.count)
        for (level, seed), load in zip(asked, loads, strict=True)
    ]
    marks: list[_Mark] = []
    runs = run_loads(
        loads,
        warm_up=WARM_UP,
        tell_progress=Progress(console, phases),
        between=lambda: marks.append(_Mark.read(subject.target.base_url)),
    )
    measured: dict[Level, list[Sample]] = {}
    for number, ((level, seed), run) in enumerate(zip(asked, runs, strict=False)):
        sample = _sample(seed, run, marks[number : number + 2], objectives)
        measured.setdefault(level, []).append(sample)
    cells = [
        Cell(subject.name, workload, level, tuple(samples)) for level, samples in measured.items()
    ]
    return cells, runs[-1].is_interrupted


def _sample(seed: int, run: Run, around: Sequence[_Mark], objectives: Objectives | None) -> Sample:
    if len(around) < 2:  # of an interrupted run there is no mark behind
        return Sample(seed, run, make_figures(run, objectives))
    before, after = around
    stages = stages_between(before.metrics, after.metrics)
    stolen = stolen_between(before.cpu, after.cpu)
    return Sample(seed, run, make_figures(run, objectives, stages), stolen)


def requests_of(
    workload: str, level: Level, effort: Effort, seed: int, max_len: int | None
) -> Workload:
    """Return what a run asks: the same of every deployment, and no prompt of another run.

    Prompts that come again would be found in prefix caches, and by a router that knows who
    has them.

    Args:
        workload: its name.
        level: the load.
        effort: how much to ask.
        seed: of the run.
        max_len: tokens of prompt and output that the model takes; None: any number.
    """
    made = make_workload(
        workload,
        shape_of(workload),
        count=effort.count(level),
        rate=level.rate,
        seed=seed,
        salt=f"{workload} {level.rate!r}",
    )
    return made if max_len is None else cap_lengths(made, max_len)
