"""The highest rate at which 90 % of the requests meet TTFT and TPOT objectives together.

    python benchmarks/goodput.py --goodput ttft:1000 tpot:50 --workload balanced
    python benchmarks/goodput.py --goodput ttft:1000 tpot:50 --base-url http://host:8000

Without --base-url it starts each deployment of ``compare.py`` on the same devices, one
after the other, and reports the ratio of PD's goodput to that of each other one. The
search doubles or halves the rate until it knows one that passes and one that fails, then
bisects. A rate passes if the runs show that the service kept pace and the lower bound of
the 95 % interval of the part of requests that met both objectives, over all seeds, reaches
90 %; it fails if the service did not keep pace or the upper bound is below 90 %. Anything
between, and runs too short to tell, bound nothing. The search goes down four times at most,
and not below a rate that fails although most requests find the service idle. All
deployments get the same requests, and every rate gets others. What is behind --
goes to every `vllm serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

from rich.console import Console  # noqa: E402

from benchmarks.benchmark_serving import rate  # noqa: E402
from benchmarks.comparing import options as site_options  # noqa: E402
from benchmarks.comparing.cells import Level  # noqa: E402
from benchmarks.comparing.deployments import (  # noqa: E402
    CHUNKED,
    COLOCATED,
    NIXL,
    PD,
    REPLICAS,
    TITLES,
    deployed,
)
from benchmarks.comparing.measuring import Effort, Subject, measure_cells  # noqa: E402
from benchmarks.interrupting import interruptible, uninterrupted  # noqa: E402
from benchmarks.options import Parser, positive, read_number  # noqa: E402
from benchmarks.reporting import (  # noqa: E402
    Report,
    Row,
    check_writable,
    describe_environment,
    number,
    write,
)
from benchmarks.service.servers import MODEL_NAME  # noqa: E402
from benchmarks.serving.target import find_target  # noqa: E402
from benchmarks.transfer.pair import BenchError  # noqa: E402
from vllm_pd.bench.goodput import (  # noqa: E402
    Search,
    Trial,
    goodput_interval,
    goodput_ratio,
)
from vllm_pd.bench.slo import (  # noqa: E402
    Objectives,
    attainment,
    num_independent,
    parse_objectives,
)
from vllm_pd.bench.steady import Regime, is_idle  # noqa: E402
from vllm_pd.bench.workload import SHAPES  # noqa: E402
from vllm_pd.errors import ConfigError  # noqa: E402

ORDER = (REPLICAS, PD, COLOCATED, CHUNKED, NIXL)
USUAL = (REPLICAS, PD, COLOCATED)
INTERRUPTED = 130
_MIN_COUNT = 108
"""Requests at a rate, over all seeds: three times as many as independent ones would have to be
for a lower bound of 90 % without a miss, as those that wait for each other say less."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search.

    Attributes:
        workload: what to ask.
        objectives: to be met together.
        start: first rate, requests per second.
        target: part of the requests that must meet them.
        tolerance: of the rate that is found, relative.
        effort: runs at each rate, and how long they are.
    """

    workload: str
    objectives: Objectives
    start: float
    target: float
    tolerance: float
    effort: Effort


@dataclass(slots=True)
class Found:
    """What there is so far: a search for each deployment, and what must be said."""

    searches: dict[str, Search] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the searches; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _make_parser()
    args = parser.parse_args(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    found = Found()
    status = 0
    try:
        plan = _plan(args)
        for path in filter(None, (args.json, args.markdown)):
            check_writable(path)
        environment = describe_environment("none")
        try:
            with interruptible():
                _search_all(args, plan, found, environment, console)
        except KeyboardInterrupt:
            found.notes.append("It was interrupted: this is what there was until then.")
            status = INTERRUPTED
        environment["command"] = shlex.join(["python", "benchmarks/goodput.py", *argv])
        with uninterrupted():
            _report(args, make_report(plan, found, environment), console)
    except (BenchError, ConfigError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return status or 1
    return status


def _report(args: argparse.Namespace, report: Report, console: Console) -> None:
    console.print(report.markdown())
    if args.json is not None:
        report.write_json(args.json)
    if args.markdown is not None:
        write(args.markdown, report.markdown())


def make_report(plan: Plan, found: Found, environment: dict[str, str]) -> Report:
    """Return goodputs and the ratios of PD's to the others'.

    Raises:
        BenchError: nothing was measured.
    """
    if not found.searches:
        reasons = "; ".join(found.notes) or "there was nothing to ask"
        raise BenchError(f"nothing was measured: {reasons}")
    rows: list[Row] = []
    notes = list(found.notes)
    for name, search in found.searches.items():
        labels = {"deployment": name, "workload": plan.workload, "search": _state(search)}
        rows.append(Row(labels, "highest rate that passed", search.best, "req/s"))
        if _is_known(search):
            crossing = goodput_interval(search.trials, plan.target, seed=1)
            bounds = (crossing.low, crossing.high)
            rows.append(Row(labels, "goodput", crossing.value, "req/s", *bounds))
        else:
            notes.append(_unknown(name, search))
    for name, search in found.searches.items():
        if name == PD or PD not in found.searches:
            continue
        ours = found.searches[PD]
        if _is_known(ours) and _is_known(search):
            ratio = goodput_ratio(ours.trials, search.trials, plan.target, seed=1)
            labels = {"deployment": PD, "workload": plan.workload, "against": name}
            rows.append(Row(labels, "ratio of goodputs", ratio.value, "x", ratio.low, ratio.high))
            notes.append(_sentence(name, ratio.low, ratio.high))
        else:
            notes.append(f"PD against {name}: no ratio, as not both goodputs are known")
    trials = {name: [_plain(trial) for trial in s.trials] for name, s in found.searches.items()}
    objective = f"{plan.target:.0%} of the requests with {plan.objectives}"
    return Report("goodput", {**environment, "objective": objective}, rows, notes, trials)


def _is_known(search: Search) -> bool:
    """Return whether a search ended between a rate that passed and one that failed."""
    return search.is_over and search.has_passed and search.has_failed


def _state(search: Search) -> str:
    if not search.is_over:
        return "unfinished"
    return "over" if _is_known(search) else "without a bound"


def _unknown(name: str, search: Search) -> str:
    """Say what a search that found no goodput has found."""
    if not search.is_over:
        found = f"at least {number(search.best)} req/s" if search.has_passed else "unknown"
        return f"the search of {name} is unfinished: its goodput is {found}"
    if search.has_passed:
        least = f"its goodput is at least {number(search.best)} req/s"
        return f"{name} failed at no rate that was tried: {least}"
    text = f"{name} is not known to meet the objectives at any rate that was tried"
    if search.has_failed:
        return f"{text}: its goodput is less than {number(search.limit)} req/s"
    return f"{text}, nor to miss them: its goodput is unknown"


def _sentence(name: str, low: float, high: float) -> str:
    bounds = f"{number(low)} to {number(high)} x" if math.isfinite(high) else f">= {number(low)} x"
    if low > 1:
        return f"PD has more goodput than {name} ({bounds})"
    if high < 1:
        return f"PD has less goodput than {name} ({bounds})"
    return f"PD and {name} are not distinguishable ({bounds})"


def _plain(trial: Trial) -> dict[str, object]:
    return {
        "rate": trial.rate,
        "is_stable": trial.is_stable,
        "is_idle": trial.is_idle,
        "attainment": asdict(trial.interval),
        "independent requests": trial.num_independent,
    }


def _search_all(
    args: argparse.Namespace,
    plan: Plan,
    found: Found,
    environment: dict[str, str],
    console: Console,
) -> None:
    if args.base_url is not None:
        environment["service"] = args.base_url
        subject = Subject("service", find_target(args.base_url, None))
        _search(subject, plan, found, console)
        return
    with tempfile.TemporaryDirectory(
        prefix="vllm-pd-goodput-", ignore_cleanup_errors=True
    ) as folder:
        site = site_options.make_site(args, Path(folder))
        environment |= site_options.describe_site(site)
        for name in site_options.chosen(ORDER, args.deployment or USUAL):
            console.print(f"starting {name}: {TITLES[name]}")
            with _noting(name, found, console), deployed(name, site) as url:
                subject = Subject(name, find_target(url, MODEL_NAME))
                _search(subject, plan, found, console)


def _search(subject: Subject, plan: Plan, found: Found, console: Console) -> None:
    search = Search(plan.start, plan.target, plan.tolerance)
    while (next_rate := search.next_rate()) is not None:
        level = Level(None, next_rate)
        cells, is_interrupted = measure_cells(
            subject, plan.workload, [level], plan.effort, console, plan.objectives
        )
        if is_interrupted:  # a part of a trial is none
            raise KeyboardInterrupt
        (cell,) = cells
        runs = [run.records for run in cell.runs]
        trial = Trial(
            next_rate,
            attainment(runs, plan.objectives).value,
            num_independent(runs, plan.objectives),
            is_stable=None if cell.regime is Regime.SHORT else cell.regime is Regime.STEADY,
            is_idle=all(is_idle(records) for records in runs),
        )
        search.tell(trial)
        if cell.regime is Regime.SHORT:
            found.notes.append(
                f"{subject.name}, {next_rate:.3g} req/s: the runs were too short to tell whether "
                "it kept pace, so the rate bounds nothing; use a longer --duration"
            )
        elif not trial.is_enough(plan.target):
            found.notes.append(
                f"{subject.name}, {next_rate:.3g} req/s: the requests say as much as "
                f"{trial.num_independent:.0f} independent ones, too few to pass even if all meet "
                "the objectives; use a longer --duration"
            )
        found.searches[subject.name] = search
        share = trial.interval
        verdict = trial.outcome(plan.target).value
        stability = "" if trial.is_stable else f", {cell.regime.value}"
        console.print(
            f"{subject.name}: {next_rate:.3g} req/s {verdict}: {share.value:.1%} "
            f"({share.low:.1%} to {share.high:.1%}) met the objectives{stability}"
        )


@contextlib.contextmanager
def _noting(name: str, found: Found, console: Console) -> Iterator[None]:
    """Go on with the next deployment if one fails: what the others did is not to be lost."""
    try:
        yield
    except BenchError as exc:
        found.notes.append(f"{name} was not measured to the end: {exc}")
        console.print(found.notes[-1])


def _plan(args: argparse.Namespace) -> Plan:
    return Plan(
        workload=args.workload,
        objectives=parse_objectives(args.goodput),
        start=args.start_rate,
        target=args.attainment,
        tolerance=args.tolerance,
        effort=Effort(
            args.seeds, args.duration, at_once=_MIN_COUNT, min_count=-(-_MIN_COUNT // args.seeds)
        ),
    )


def _make_parser() -> Parser:
    parser = site_options.make_parser("goodput.py", __doc__ or "")
    add = parser.add_argument
    add(
        "--goodput",
        nargs="+",
        required=True,
        metavar="KEY:MS",
        help="the objectives: ttft, tpot, e2el",
    )
    add("--base-url", metavar="URL", help="search only this service, which runs already")
    add("--deployment", choices=ORDER, action="append", help="only this; repeatable")
    add("--workload", choices=tuple(SHAPES), default="balanced", metavar="NAME", help="[balanced]")
    add("--attainment", type=_share, default=0.9, metavar="X", help="part that must meet [0.9]")
    add("--tolerance", type=_share, default=0.05, metavar="X", help="of the rate [0.05]")
    add("--start-rate", type=rate, default=1.0, metavar="R", help="first rate, req/s [1]")
    add("--seeds", type=positive, default=3, metavar="N", help="runs at each rate [3]")
    add("--duration", type=site_options.seconds, default=120.0, metavar="S", help="of a run [120]")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write it as Markdown")
    return parser


def _share(text: str) -> float:
    value = read_number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
