"""PD against colocated deployments: the same devices, requests and arrival times for each.

    python benchmarks/compare.py --quick
    python benchmarks/compare.py --workload balanced --rate 0.7 --duration 120
    python benchmarks/compare.py --bar
    python benchmarks/compare.py --model Qwen/Qwen2.5-7B-Instruct --devices 0,1,2,3,4,5,6,7

Starts one deployment after the other and asks each the same, in rounds: each round starts every
deployment once, in another order, and asks one seed of every workload and load. So what changes on
the machine meanwhile differs from round to round, which intervals show from three rounds on.

  replicas   two instances with half of the devices each, behind our router: what PD has
             to beat, and what the loads are shares of the capacity of
  pd         one prefill and one decode instance with half of the devices each
  colocated  one instance on all devices
  chunked    as replicas, with prompts prefilled in chunks of 256 tokens (only if asked for)
  nixl       as pd, with vLLM's NixlConnector instead of ours (only if asked for)
  control    replicas once more, by --control: shows what is found where there is nothing

--bar asks replicas, pd and nixl in two rounds what this project's own goals are set for, and
reports which are met: balanced at 0.7 req/s with 40 requests, prefill-heavy at 0.25 req/s with 24.

Writes a report with tables, paired verdicts and plots (PNG, SVG), all figures as JSON and
every request. What is behind -- goes to every `vllm serve`.

Without --model it is an untrained model of 41 million parameters, for which the objectives are
ttft:3000 tpot:40 if --goodput gives no others: twice what a prompt of 2000 tokens and a decode step
take on one core of the machine in docs/performance.md. On two cores all of it, 81 runs, is meant
to take 75 to 90 minutes (an estimate), and --quick less than a quarter of an hour; --quick has one
round, so mostly ratios without verdicts. Ctrl-C stops everything and reports the runs that are
complete.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

from rich.console import Console  # noqa: E402

from benchmarks.benchmark_serving import rate  # noqa: E402
from benchmarks.comparing import bar  # noqa: E402
from benchmarks.comparing import options as site_options  # noqa: E402
from benchmarks.comparing.cells import Cell, Level, merge  # noqa: E402
from benchmarks.comparing.deployments import (  # noqa: E402
    CHUNKED,
    COLOCATED,
    CONTROL,
    NIXL,
    PD,
    REPLICAS,
    TITLES,
    Site,
    deployed,
)
from benchmarks.comparing.measuring import Effort, Subject, measure_cells  # noqa: E402
from benchmarks.interrupting import interruptible, uninterrupted  # noqa: E402
from benchmarks.options import Parser, positive  # noqa: E402
from benchmarks.reporting import describe_environment  # noqa: E402
from benchmarks.service.servers import MODEL_NAME  # noqa: E402
from benchmarks.serving.target import find_target  # noqa: E402
from benchmarks.transfer.pair import BenchError  # noqa: E402
from vllm_pd.bench.slo import Objectives, parse_objectives  # noqa: E402
from vllm_pd.bench.workload import SHAPES  # noqa: E402
from vllm_pd.errors import ConfigError  # noqa: E402

ORDER = (REPLICAS, PD, COLOCATED, CHUNKED, NIXL)
"""The reference first, because the loads depend on it."""

OWN_OBJECTIVES = ("ttft:3000", "tpot:40")
"""For the untrained model."""

USUAL = (REPLICAS, PD, COLOCATED)
WORKLOADS = ("prefill-heavy", "balanced", "decode-heavy")
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Task:
    """What to ask of one workload.

    Attributes:
        workload: its name.
        loads: shares of the capacity; ``inf``: all at once.
        rates: requests per second instead.
        effort: how much of each.
    """

    workload: str
    loads: tuple[float, ...]
    rates: tuple[float, ...]
    effort: Effort


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked.

    Attributes:
        deployments: the reference first.
        tasks: what each of them is asked.
        rounds: in each of which every deployment is started once and asked one seed.
        objectives: to be met together; None: unknown.
        output: folder of the report.
        goals: what is to be reached.
    """

    deployments: tuple[str, ...]
    tasks: tuple[Task, ...]
    rounds: int
    objectives: Objectives | None
    output: Path
    goals: tuple[bar.Goal, ...] = ()


@dataclass(slots=True)
class Findings:
    """What there is so far.

    Attributes:
        cells: of each round its own.
        capacity: of the reference, by workload, in requests per second.
        environment: what a reader must know.
    """

    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    capacity: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


class Comparison:
    """Measures all deployments round by round.

    Args:
        options: what to do.
        site: where.
        console: gets the progress.
    """

    def __init__(self, options: Options, site: Site, console: Console) -> None:
        self._options = options
        self._site = site
        self._console = console
        self._began = time.monotonic()
        self._left_out: set[str] = set()
        self.found = Findings()

    def run(self) -> None:
        """Measure everything; what was measured is in ``found``, also after an exception.

        Raises:
            KeyboardInterrupt: the user ended it early.
        """
        names = self._options.deployments
        for number in range(1, self._options.rounds + 1):
            first = (number - 1) % len(names)
            for name in (*names[first:], *names[:first]):
                if name not in self._left_out:
                    self._visit(name, number)

    def _visit(self, name: str, number: int) -> None:
        """Start a deployment, ask it everything once, and stop it.

        One that fails is left out from then on; what there is of it and the others is kept.
        """
        where = f"round {number} of {self._options.rounds}"
        self._tell(f"{where}: starting {name}: {TITLES[name]}")
        try:
            with deployed(name, self._site) as url:
                self._tell(f"{where}: {name} is ready")
                subject = Subject(name, find_target(url, MODEL_NAME))
                for task in self._options.tasks:
                    self._measure(subject, task, number)
                self._tell(f"{where}: stopping {name}")
        except BenchError as exc:
            self._left_out.add(name)
            self.found.notes.append(f"{name} was not measured to the end of {where}: {exc}")
            self._tell(self.found.notes[-1])

    def _measure(self, subject: Subject, task: Task, seed: int) -> None:
        """Ask a deployment one seed; the very first one is asked for its capacity before."""
        workload, capacity = task.workload, self.found.capacity
        if any(map(math.isfinite, task.loads)) and workload not in capacity:
            capacity[workload] = self._capacity(subject, task)
        levels = [Level(None, value) for value in task.rates]
        levels += [
            Level(load, load * capacity[workload]) if math.isfinite(load) else Level(None, load)
            for load in task.loads
        ]
        cells, is_interrupted = self._ask(subject, task, levels, seed)
        self.found.cells += cells
        if is_interrupted:
            raise KeyboardInterrupt

    def _capacity(self, subject: Subject, task: Task) -> float:
        """Return how much it answers at most, in requests per second.

        By a run that is not reported and whose requests do not come again, so that every
        deployment is asked the same loads in the same order.
        """
        (cell,), is_interrupted = self._ask(subject, task, [Level(None, math.inf)], seed=0)
        if is_interrupted:
            raise KeyboardInterrupt
        if not cell.request_rate:
            raise BenchError(f"it answered no request of {task.workload}")
        return cell.request_rate

    def _ask(
        self, subject: Subject, task: Task, levels: Sequence[Level], seed: int
    ) -> tuple[list[Cell], bool]:
        effort = replace(task.effort, seeds=1, first_seed=seed)
        objectives = self._options.objectives
        return measure_cells(subject, task.workload, levels, effort, self._console, objectives)

    def _tell(self, text: str) -> None:
        self._console.print(f"[{time.monotonic() - self._began:5.0f} s] {text}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.load and args.rate:
        parser.error("--load and --rate exclude each other")
    if args.bar and (excluded := _excluded_by_bar(args)):
        parser.error(f"--bar and --{excluded[0]} exclude each other")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is not installed: pip install matplotlib")
    try:
        options = _options(args)
    except ConfigError as exc:
        parser.error(str(exc))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    command = shlex.join(["python", "benchmarks/compare.py", *argv])
    try:
        return _compare(args, options, command, console)
    except (BenchError, ConfigError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1


def _compare(args: argparse.Namespace, options: Options, command: str, console: Console) -> int:
    site_options.make_output(options.output)
    with tempfile.TemporaryDirectory(prefix="vllm-pd-compare-", ignore_cleanup_errors=True) as name:
        site = site_options.make_site(args, Path(name))
        comparison = Comparison(options, site, console)
        for warning in site_options.warnings_of(site):
            console.print(f"warning: {warning}")
            comparison.found.notes.append(warning)
        status = _run(comparison)
        with uninterrupted():
            reported = _report(comparison.found, site, options, command, console)
    return status or reported


def _run(comparison: Comparison) -> int:
    try:
        with interruptible():
            comparison.run()
    except KeyboardInterrupt:
        comparison.found.notes.append("It was interrupted: this is what there was until then.")
        return INTERRUPTED
    return 0


def _report(found: Findings, site: Site, options: Options, command: str, console: Console) -> int:
    from benchmarks.comparing.report import write_report  # needs matplotlib

    cells, output = merge(found.cells), options.output
    if not cells:
        reasons = "; ".join(found.notes) or "there was nothing to ask"
        sys.stderr.write(f"error: nothing was measured: {reasons}\n")
        return 1
    environment = describe_environment("none") | site_options.describe_site(site)
    capacities = ", ".join(f"{name} {rate:.3g} req/s" for name, rate in found.capacity.items())
    if capacities:
        environment["capacity"] = f"of {cells[0].deployment}, all at once, once: {capacities}"
    if (objectives := cells[0].objectives) is not None:
        environment["objectives"] = str(objectives)
    environment["command"] = command
    console.print("writing the report")
    write_report(output, cells, environment, found.notes, options.goals)
    console.print(f"the report is {output / 'report.md'}")
    return 0


def _options(args: argparse.Namespace) -> Options:
    usual = bar.DEPLOYMENTS if args.bar else USUAL
    deployments = site_options.chosen(ORDER, args.deployment or usual)
    if args.control and REPLICAS not in deployments:
        raise ConfigError("--control is replicas once more: add --deployment replicas")
    goodput = args.goodput or (OWN_OBJECTIVES if args.model is None else None)
    return Options(
        deployments=(*deployments, *([CONTROL] if args.control else [])),
        tasks=tuple(_bar_tasks() if args.bar else _tasks(args)),
        rounds=args.seeds or (2 if args.bar else 1 if args.quick else 3),
        objectives=parse_objectives(goodput) if goodput else None,
        output=args.output or site_options.default_output("compare"),
        goals=bar.GOALS if args.bar else (),
    )


def _tasks(args: argparse.Namespace) -> list[Task]:
    quick: bool = args.quick
    usual_loads = [] if args.rate else [0.7] if quick else [0.25, 0.7, math.inf]
    effort = Effort(
        seeds=1,
        duration_s=args.duration or (30 if quick else 45),
        at_once=args.at_once or (16 if quick else 24),
    )
    loads, rates = tuple(args.load or usual_loads), tuple(args.rate or ())
    return [Task(name, loads, rates, effort) for name in args.workload or WORKLOADS]


def _bar_tasks() -> list[Task]:
    return [
        Task(name, (), (rate,), Effort(1, count / rate, count, exactly=count))
        for name, (rate, count) in bar.RUNS.items()
    ]


def _excluded_by_bar(args: argparse.Namespace) -> list[str]:
    """Return the options that are given although the bar sets what they do."""
    names = ("quick", "deployment", "workload", "load", "rate", "duration", "at-once")
    return [name for name in names if getattr(args, name.replace("-", "_"))]


def _make_parser() -> Parser:
    parser = site_options.make_parser("compare.py", __doc__ or "")
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and shorter runs: see above")
    add("--bar", action="store_true", help="the runs of this project's own goals: see above")
    add("--deployment", choices=ORDER, action="append", help="only this; repeatable")
    add("--control", action="store_true", help="measure the baseline twice: see above")
    add(
        "--goodput",
        nargs="+",
        metavar="KEY:MS",
        help="objectives that a request must meet together: ttft, tpot, e2el [see above]",
    )
    add(
        "--workload",
        choices=tuple(SHAPES),
        action="append",
        metavar="NAME",
        help=f"repeatable [{' '.join(WORKLOADS)}]",
    )
    add(
        "--load",
        type=site_options.share,
        action="append",
        metavar="X",
        help="share of the reference's capacity, or inf: all at once; repeatable [0.25 0.7 inf]",
    )
    add("--rate", type=rate, action="append", metavar="R", help="req/s instead; repeatable")
    add("--seeds", type=positive, metavar="N", help="rounds, of one seed each [3, quick 1, bar 2]")
    add("--duration", type=site_options.seconds, metavar="S", help="of a run [45, quick 30]")
    add("--at-once", type=positive, metavar="N", help="requests that come at once [24, quick 16]")
    add("--output", type=Path, metavar="DIR", help="[benchmarks/results/DATE-MACHINE/compare]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
