"""Measures a service with the OpenAI API, by ``vllm bench serve``.

    python benchmarks/benchmark_serving.py --base-url http://127.0.0.1:8000 \
        --workload azure-conversation --request-rate 2 --num-prompts 500 \
        --goodput ttft:500 tpot:50 --json result.json

The load is upstream's: everything that is not below is passed on to ``vllm bench serve``
(--dataset-name, --ramp-up-strategy, --backend, --endpoint, ...). What is
added: latencies from the moment a request was to be sent, the client's own lag, time to
second token, longest stall, the part of requests that met all objectives with its
interval, whether the run was in a steady state, and, behind the router of this project,
where the time went.

Workloads are drawn here, without network, and the same for the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

from rich.console import Console  # noqa: E402

from benchmarks.interrupting import interruptible, uninterrupted  # noqa: E402
from benchmarks.options import Parser, positive, read_number  # noqa: E402
from benchmarks.reporting import Report, check_writable, describe_environment, write  # noqa: E402
from benchmarks.serving import tables  # noqa: E402
from benchmarks.serving.figures import Figures, as_data, make_figures, make_rows  # noqa: E402
from benchmarks.serving.load import Load, Run, run_loads  # noqa: E402
from benchmarks.serving.progress import Progress  # noqa: E402
from benchmarks.serving.target import (  # noqa: E402
    Marks,
    Target,
    find_target,
    read_marks,
    stages_between,
)
from benchmarks.transfer.pair import BenchError  # noqa: E402
from vllm_pd.bench.slo import Objectives, parse_objectives  # noqa: E402
from vllm_pd.bench.trace import read_trace  # noqa: E402
from vllm_pd.bench.workload import (  # noqa: E402
    SHAPES,
    Workload,
    cap_lengths,
    make_workload,
    shape_of,
)
from vllm_pd.errors import ConfigError  # noqa: E402

TABLE_WIDTH = 120
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked.

    Attributes:
        burstiness: of the workload's arrivals; None: its own.
        upstream: arguments that are passed on.
    """

    base_url: str
    model: str | None
    count: int
    rate: float
    seed: int
    workload: str | None
    burstiness: float | None
    trace: Path | None
    warm_up: int
    goodput: tuple[str, ...]
    objectives: Objectives | None
    json_file: Path | None
    markdown_file: Path | None
    upstream: tuple[str, ...]


def parse_options(argv: Sequence[str]) -> Options:
    """Check the command line; bad input ends the program with one line."""
    parser = _make_parser()
    args, upstream = parser.parse_known_args(argv)
    try:
        objectives = parse_objectives(args.goodput) if args.goodput else None
        if args.workload is not None:
            shape_of(args.workload)
        for path in (args.json, args.markdown):
            if path is not None:
                check_writable(path)
        if args.dataset_path is not None:
            check_dataset(args.dataset_path)
            upstream += ["--dataset-path", str(args.dataset_path)]
    except (ConfigError, BenchError) as exc:
        parser.error(str(exc))
    if args.workload and args.trace:
        parser.error("--workload and --trace exclude each other")
    if (args.workload or args.trace) and args.dataset_path:
        parser.error("--dataset-path is for --dataset-name; a trace is given by --trace")
    if args.burstiness and args.trace:
        parser.error("--burstiness is for arrivals that are drawn; a trace has its own")
    return Options(
        base_url=args.base_url or f"http://{args.host}:{args.port}",
        model=args.model,
        count=args.num_prompts,
        rate=args.request_rate,
        seed=args.seed,
        workload=args.workload,
        burstiness=args.burstiness,
        trace=args.trace,
        warm_up=args.warm_up,
        goodput=tuple(args.goodput or ()),
        objectives=objectives,
        json_file=args.json,
        markdown_file=args.markdown,
        upstream=(*_burstiness_args(args), *upstream),
    )


def _burstiness_args(args: argparse.Namespace) -> list[str]:
    """Return what upstream is told of arrivals that it draws."""
    if args.burstiness is None or args.workload:
        return []
    return ["--burstiness", str(args.burstiness)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    try:
        with interruptible():
            target = find_target(options.base_url, options.model)
            run, figures = _measure(options, target, console)
    except (BenchError, ConfigError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything was measured\n")
        return INTERRUPTED
    command = shlex.join(["python", "benchmarks/benchmark_serving.py", *argv])
    with uninterrupted():
        _show(console, figures)
        status = _write(options, _report(command, target, run, figures), figures)
    if run.is_interrupted:
        sys.stderr.write(f"interrupted: these are the {figures.count} requests until then\n")
        return INTERRUPTED
    if figures.failed == figures.count:
        sys.stderr.write(f"error: every request failed: {next(iter(figures.errors))}\n")
        return 1
    return status


def check_dataset(path: Path) -> None:
    """Check that a file of JSON or of JSON lines can be read, as upstream does not name the line.

    Raises:
        BenchError: it cannot.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise BenchError(f"cannot read {path}: {exc}") from exc
    if path.suffix == ".json":
        parts = [(0, text)]
    elif path.suffix == ".jsonl":
        parts = list(enumerate(text.splitlines()))
    else:
        return
    for offset, part in parts:
        try:
            json.loads(part)
        except json.JSONDecodeError as exc:
            raise BenchError(f"{path}, line {offset + exc.lineno}: {exc.msg}") from exc


def _measure(options: Options, target: Target, console: Console) -> tuple[Run, Figures]:
    workload = _workload(options, target)
    count = len(workload.requests) if workload else options.count
    load = Load(target, count, _upstream_args(options), workload)
    warm_up = min(options.warm_up, count)
    phases = [*([("warming up", warm_up)] if warm_up else []), ("measuring", count)]
    marks: list[Marks] = []
    (run,) = run_loads(
        [load],
        warm_up=warm_up,
        tell_progress=Progress(console, phases),
        between=lambda: marks.append(read_marks(target.base_url)),
    )
    stages = stages_between(*marks) if len(marks) == 2 else []
    return run, make_figures(run, options.objectives, stages)


def _workload(options: Options, target: Target) -> Workload | None:
    """Return what is asked, cut to what the model takes; None: a dataset of upstream's."""
    if options.trace is not None:
        rate = None if math.isinf(options.rate) else options.rate
        workload = read_trace(options.trace, count=options.count, rate=rate)
    elif options.workload is not None:
        shape = shape_of(options.workload)
        if options.burstiness is not None:  # the shape of the gamma law, as upstream's
            shape = replace(shape, cv=1 / math.sqrt(options.burstiness))
        workload = make_workload(
            options.workload, shape, count=options.count, rate=options.rate, seed=options.seed
        )
    else:
        return None
    return workload if target.max_len is None else cap_lengths(workload, target.max_len)


def _upstream_args(options: Options) -> tuple[str, ...]:
    args = ["--seed", str(options.seed)]
    if options.workload is None and options.trace is None:
        args += ["--request-rate", str(options.rate)]
    if options.goodput:
        args += ["--goodput", *options.goodput]
    return (*args, *options.upstream)


def _report(command: str, target: Target, run: Run, figures: Figures) -> Report:
    environment = describe_environment("none") | {
        "service": f"{target.model} at {target.base_url}",
        "command": command,
    }
    return Report(
        "benchmark_serving",
        environment,
        make_rows(figures),
        notes=figures.warnings,
        measured={
            "figures": as_data(figures),
            "is_interrupted": run.is_interrupted,
            "upstream_goodput": run.goodput,
            "requests": [asdict(record) for record in run.records],
        },
    )


def _show(console: Console, figures: Figures) -> None:
    for table in tables.tables(figures):
        console.print(table)
    for warning in figures.warnings:
        console.print(f"note: {warning}")


def _write(options: Options, report: Report, figures: Figures) -> int:
    try:
        if options.json_file is not None:
            report.write_json(options.json_file)
        if options.markdown_file is not None:
            write(options.markdown_file, tables.markdown(figures))
    except BenchError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    return 0


def _make_parser() -> Parser:
    parser = Parser(
        prog="benchmark_serving.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is not known is upstream's
    )
    add = parser.add_argument
    add("--base-url", metavar="URL", help="of any server with the OpenAI API")
    add("--host", default="127.0.0.1", help="instead of --base-url [127.0.0.1]")
    add("--port", type=positive, default=8000, help="instead of --base-url [8000]")
    add("--model", metavar="NAME", help="as the server names it [its first one]")
    add("--num-prompts", type=positive, default=200, metavar="N", help="requests [200]")
    add(
        "--request-rate",
        type=rate,
        default=math.inf,
        metavar="R",
        help="per second, or inf: all at once, a trace as recorded [inf]",
    )
    add(
        "--burstiness",
        type=burstiness,
        metavar="X",
        help="of drawn arrivals: 1 is Poisson, less comes in bursts [1, or the workload's own]",
    )
    add("--seed", type=int, default=1, metavar="N", help="of prompts and arrivals [1]")
    add("--workload", metavar="NAME", help=f"drawn here: {', '.join(SHAPES)}")
    add("--trace", type=Path, metavar="FILE", help="replay this: Mooncake's JSONL or Azure's CSV")
    add("--dataset-path", type=Path, metavar="FILE", help="for upstream's --dataset-name")
    add("--warm-up", type=count, default=8, metavar="N", help="requests before, 0: none [8]")
    add(
        "--goodput",
        nargs="+",
        metavar="KEY:MS",
        help="objectives that a request must meet together: ttft, tpot, e2el",
    )
    add("--json", type=Path, metavar="FILE", help="write figures and all requests as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    return parser


def rate(text: str) -> float:
    """Read a rate per second; ``inf`` is one.

    Raises:
        argparse.ArgumentTypeError: it is not positive.
    """
    value = read_number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive rate")
    return value


def burstiness(text: str) -> float:
    """Read the shape of a gamma law.

    Raises:
        argparse.ArgumentTypeError: it is not positive, or not finite.
    """
    value = read_number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def count(text: str) -> int:
    """Read a number of at least 0.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
