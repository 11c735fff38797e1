"""What the router costs: requests per second and latency in front of null backends.

    python benchmarks/router_overhead.py [--quick] [--json FILE] [--streams]

Every request has two upstream legs. The backends answer them at once, so all that is
measured is the router, one process of it, and the load generator's own small cost:

  unary_c1      one client, whole answers: the latency that a router adds
  unary_c16     16 clients, whole answers
  stream64_c16  16 clients, streams of 64 chunks, each sent by itself

  direct        no router: the load generator sends both legs itself
  vllm-pd       this project's router
  vllm-router   the router of the vLLM project (Rust, all cores)
  xpyd-proxy    a proxy in Python (own environment for both, made on first use)

in alternating rounds, so that the ratios are of the same minute of the same machine.
With --streams also 2,000 streams at once with 5 chunks per second each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

from rich.console import Console  # noqa: E402

from benchmarks.options import Parser, positive  # noqa: E402
from benchmarks.reporting import Report, write  # noqa: E402
from benchmarks.router import load, paced, report, routers  # noqa: E402
from benchmarks.rows import router_rows  # noqa: E402
from benchmarks.transfer import peers  # noqa: E402
from benchmarks.transfer import report as machine  # noqa: E402
from benchmarks.transfer.pair import BenchError  # noqa: E402

SHAPES = {
    report.UNARY_C1: (1, False),
    report.UNARY_C16: (16, False),
    report.STREAM_C16: (16, True),
}
"""Clients and whether they stream, by scenario."""

NUM_STREAMS = 2000
CHUNK_INTERVAL_S = 0.2
RAMP_S = 8.0
WARM_UP_S = 0.3
LOAD_TIMEOUT_S = 300.0
TABLE_WIDTH = 120


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    proxies: tuple[str, ...]
    num_rounds: int
    seconds: float
    streams_s: float | None
    json_file: Path | None
    report_file: Path | None


def parse_options(argv: Sequence[str]) -> Options:
    """Check the command line; bad input ends the program with one line."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    wanted = args.proxy or routers.PROXIES
    if args.no_peers:
        wanted = [name for name in wanted if name not in routers.FOREIGN]
    for path in (args.json, args.report):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{path} is not a file that can be written")
    return Options(
        proxies=tuple(name for name in routers.PROXIES if name in wanted),
        num_rounds=args.rounds or (2 if args.quick else 5),
        seconds=1.0 if args.quick else 3.0,
        streams_s=(12.0 if args.quick else 30.0) if args.streams else None,
        json_file=args.json,
        report_file=args.report,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    _allow_connections()
    try:
        python = _find_peers(options, console)
        if python is None:
            names = tuple(name for name in options.proxies if name not in routers.FOREIGN)
            options = replace(options, proxies=names)
        environment = _describe(options, argv, console)
        with tempfile.TemporaryDirectory(prefix="router-overhead-") as folder:
            rows = _measure(options, Path(folder), python, console)
    except BenchError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return _write(options, rows, environment)


def _find_peers(options: Options, console: Console) -> Path | None:
    """Return the Python of the peers' environment, made if it is missing; None without one."""
    if not any(name in routers.FOREIGN for name in options.proxies):
        return None
    try:
        if (python := peers.find_environment(routers.PEERS)) is None:
            console.print(f"installing into {routers.PEERS.folder.relative_to(REPO)}, once")
            python = peers.make_environment(routers.PEERS)
    except BenchError as exc:
        console.print(f"{' and '.join(routers.FOREIGN)}: not measured, not installed: {exc}")
        return None
    return python


def _describe(options: Options, argv: Sequence[str], console: Console) -> dict[str, str]:
    packages = peers.describe_packages(routers.PEERS).split(", ")
    named = [text for text in packages if text.split()[0] in options.proxies]
    environment = machine.describe_environment(", ".join(named) or "none")
    environment["command"] = shlex.join(["python", "benchmarks/router_overhead.py", *argv])
    for key, value in environment.items():
        console.print(f"{key + ':':9} {value}")
    return environment


def _measure(
    options: Options, folder: Path, python: Path | None, console: Console
) -> list[report.Row]:
    with routers.backends(folder) as behind, contextlib.ExitStack() as stack:
        targets = [
            target
            for proxy in options.proxies
            for target in _start(stack, proxy, behind, folder, python, console)
        ]
        rows = _measure_rates(options, targets, console)
        if options.streams_s is not None:
            for target in (one for one in targets if one.proxy not in routers.FOREIGN):
                rows.append(_measure_streams(target, options.streams_s, console))
    return rows


def _start(
    stack: contextlib.ExitStack,
    proxy: str,
    behind: routers.Backends,
    folder: Path,
    python: Path | None,
    console: Console,
) -> Iterator[routers.Target]:
    """Start and warm up a proxy; a peer that does not start is left out."""
    try:
        target = stack.enter_context(routers.started(proxy, behind, folder, python))
    except BenchError as exc:
        if proxy not in routers.FOREIGN:
            raise
        console.print(f"{proxy}: not measured: {exc}")
        return
    _load(load.Plan(target.ports, 16, WARM_UP_S, stream=True))
    yield target


def _measure_rates(
    options: Options, targets: Sequence[routers.Target], console: Console
) -> list[report.Row]:
    rounds: dict[tuple[str, str], list[report.Round]] = {}
    for _ in range(options.num_rounds):
        for scenario, (num_clients, stream) in SHAPES.items():
            for target in targets:
                plan = load.Plan(target.ports, num_clients, options.seconds, stream)
                with console.status(f"{scenario}: {target.proxy}"):
                    found = report.Round(**_load(plan))
                rounds.setdefault((scenario, target.proxy), []).append(found)
    rows = [report.make_row(proxy, scenario, found) for (scenario, proxy), found in rounds.items()]
    console.print(report.throughput_table(rows))
    if (added := report.added_ms(rows, report.UNARY_C1)) is not None:
        limits = ", ".join(f"{name} <= {limit:g}" for name, limit in report.ADDED_MS.items())
        console.print(
            f"added at one connection: {added['p50']:.2f} ms at the median, "
            f"{added['p99']:.2f} ms at P99 (wanted: {limits})"
        )
    return rows


def _measure_streams(target: routers.Target, seconds: float, console: Console) -> report.Row:
    num_chunks = round(seconds / CHUNK_INTERVAL_S)
    plan = paced.Plan(target.ports, NUM_STREAMS, num_chunks, CHUNK_INTERVAL_S, RAMP_S)
    with console.status(f"{report.STREAMS}: {target.proxy}"):
        found = _run("paced", asdict(plan))
    row = report.make_row(
        target.proxy,
        report.STREAMS,
        [report.Round(found["seconds"], found["delays_ms"], found["errors"])],
    )
    row["req_per_s"] = round(NUM_STREAMS / found["seconds"], 1)
    memory = "" if target.pid is None else f", {routers.memory_len(target.pid) / 1e6:.0f} MB"
    console.print(
        f"{report.STREAMS}, {target.proxy}: {len(found['delays_ms'])} chunks, delay "
        f"{row['p50_ms']:.2f} ms at the median, {row['p99_ms']:.2f} ms at P99, "
        f"{row['errors']} streams failed{memory}"
    )
    return row


def _load(plan: load.Plan) -> dict[str, Any]:
    return _run("load", asdict(plan))


def _run(module: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Run a load generator in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.router.{module}", json.dumps(plan)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=LOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise BenchError(f"the load generator does not end within {LOAD_TIMEOUT_S:g} s") from exc
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise BenchError(f"the load generator ended: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _allow_connections() -> None:
    """Raise the limit on open files, for this process and those that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write(options: Options, rows: Sequence[report.Row], environment: dict[str, str]) -> int:
    try:
        if options.json_file is not None:
            write(options.json_file, json.dumps(list(rows), indent=1) + "\n")
        if options.report_file is not None:
            found = Report("router_overhead", environment, router_rows(rows))
            found.write_json(options.report_file)
    except BenchError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    return 0


def _make_parser() -> Parser:
    parser = Parser(
        prog="router_overhead.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and shorter rounds: under 50 s in all")
    add("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    add("--report", type=Path, metavar="FILE", help="write them as all benchmarks do, as JSON")
    add(
        "--proxy",
        choices=routers.PROXIES,
        action="append",
        metavar="NAME",
        help=f"measure only this; repeatable [{' '.join(routers.PROXIES)}]",
    )
    add("--no-peers", action="store_true", help="leave out what is installed on first use")
    add("--rounds", type=positive, metavar="N", help="rounds of every scenario [5, quick 2]")
    add("--streams", action="store_true", help=f"{NUM_STREAMS} streams at once, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
