"""How fast KV blocks move between two processes, and what the control plane costs.

    python benchmarks/kv_transfer.py [--quick] [--json FILE] [--json-extra FILE]

Two real processes, each pinned to a core of its own, move the blocks of a KV cache of
12 regions in random order. Measured in alternating rounds, so that the ratios are of
the same minute of the same machine:

  memmove  the limit: the same blocks inside one process, from private to private memory
  shm,tcp  this project's transports, driven through select and poll like a session does
  nixl     NIXL with UCX's defaults, a READ of the same blocks (own environment,
           benchmarks/.venv-peers, made on first use from benchmarks/requirements.txt);
           without the consumer's progress thread, which would halve its speed
  ucx-tcp  the same with UCX_TLS=tcp and the thread; in every third round, as it is slow
  socket   a bare sendmsg / recv_into pair on loopback

Then sessions without vLLM: handshakes, fetches of one block, idle CPU, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

from rich.console import Console  # noqa: E402

from benchmarks.options import Parser, positive  # noqa: E402
from benchmarks.reporting import Report, write  # noqa: E402
from benchmarks.rows import transfer_rows  # noqa: E402
from benchmarks.transfer import peers, report  # noqa: E402
from benchmarks.transfer.pair import BenchError  # noqa: E402
from benchmarks.transfer.plan import make_plan  # noqa: E402
from benchmarks.transfer.sessions import Effort, SessionFigures, measure_sessions  # noqa: E402
from benchmarks.transfer.throughput import (  # noqa: E402
    FOREIGN,
    MEMMOVE,
    OURS,
    VARIANTS,
    Samples,
    Throughput,
    make_command,
)

BLOCK_LENS = (16 << 10, 64 << 10, 256 << 10, 1 << 20)
TRANSPORTS = (MEMMOVE, "shm", "nixl", "tcp", "socket", "ucx-tcp")
PAGE_LEN = 4096
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    block_lens: tuple[int, ...]
    transports: tuple[str, ...]
    num_rounds: int
    num_bytes: int
    seed: int
    cores: tuple[int, int]
    effort: Effort | None
    json_file: Path | None
    extra_file: Path | None
    report_file: Path | None


def parse_options(argv: Sequence[str]) -> Options:
    """Check the command line; bad input ends the program with one line."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    quick: bool = args.quick
    transports = args.transport or TRANSPORTS
    if args.no_peers:
        transports = [name for name in transports if name not in FOREIGN]
    effort = Effort(10, 200, 1.0) if quick else Effort(40, 2000, 10.0)
    for path in (args.json, args.json_extra, args.report):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            parser.error(f"{path} is a folder")
    return Options(
        block_lens=tuple(dict.fromkeys(args.block_len or BLOCK_LENS)),
        transports=tuple(
            name for name in (*TRANSPORTS, *VARIANTS) if name in {MEMMOVE, *transports}
        ),
        num_rounds=args.rounds or (5 if quick else 30),
        num_bytes=args.mib * MIB,
        seed=args.seed,
        cores=args.cores or _choose_cores(),
        effort=None if args.no_sessions else effort,
        json_file=args.json,
        extra_file=args.json_extra,
        report_file=args.report,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        peers_python = _find_peers(options, console)
        environment = report.describe_environment(
            peers.describe_packages() if peers_python else "none"
        )
        environment["command"] = shlex.join(["python", "benchmarks/kv_transfer.py", *argv])
        for key, value in environment.items():
            console.print(f"{key + ':':9} {value}")
        samples = _measure_throughput(options, peers_python, console)
        figures = _measure_sessions(options, console)
    except BenchError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    rows = report.make_rows(samples)
    console.print(report.throughput_table(samples, rows))
    if figures:
        console.print(report.session_table(figures))
    found = Report("kv_transfer", environment, transfer_rows(rows), (), _extra(samples, figures))
    return _write_files(options, rows, found)


def _find_peers(options: Options, console: Console) -> str | None:
    """Return the Python of the peers' environment, made if it is missing; None without one."""
    if not (wanted := [name for name in options.transports if name in FOREIGN]):
        return None
    try:
        if (python := peers.find_environment()) is None:
            console.print(f"installing NIXL into {peers.FOLDER.relative_to(REPO)}, once")
            python = peers.make_environment()
    except BenchError as exc:
        names = " and ".join(wanted)
        console.print(f"{names}: not measured, NIXL cannot be installed: {exc}")
        return None
    return str(python)


def _measure_throughput(
    options: Options, peers_python: str | None, console: Console
) -> list[Samples]:
    if options.cores[0] == options.cores[1]:
        console.print(f"both processes share core {options.cores[0]}: the ratios mean little")
    made = [make_command(name, sys.executable, peers_python) for name in options.transports]
    commands = [command for command in made if command is not None]
    samples: list[Samples] = []
    plans = [
        make_plan(block_len, num_bytes=options.num_bytes, seed=options.seed)
        for block_len in options.block_lens
    ]
    capacity = max(plan.num_bytes for plan in plans)
    with Throughput(commands, options.cores, capacity, console.print) as throughput:
        for plan in plans:
            with console.status(f"blocks of {report.format_len(plan.block_len)}"):
                samples += throughput.measure(plan, options.num_rounds)
    return samples


def _measure_sessions(options: Options, console: Console) -> list[SessionFigures]:
    if options.effort is None:
        return []
    figures = []
    for name in (name for name in options.transports if name in OURS):
        with console.status(f"sessions over {name}"):
            figures.append(
                measure_sessions(name, sys.executable, options.cores, options.effort, options.seed)
            )
    return figures


def _extra(samples: Sequence[Samples], figures: Sequence[SessionFigures]) -> dict[str, Any]:
    return {
        "sessions": [asdict(found) for found in figures],
        "rounds": [asdict(found) for found in samples],
    }


def _write_files(options: Options, rows: Sequence[report.Row], found: Report) -> int:
    extra = {"environment": found.environment, **found.measured}
    contents: list[tuple[Path | None, Any]] = [
        (options.json_file, list(rows)),
        (options.extra_file, extra),
    ]
    try:
        for path, content in contents:
            if path is not None:
                write(path, json.dumps(content, indent=1) + "\n")
        if options.report_file is not None:
            found.write_json(options.report_file)
    except BenchError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    return 0


def _choose_cores() -> tuple[int, int]:
    """Return the first two cores that this process may use, or the only one twice."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[min(1, len(cores) - 1)]


def _make_parser() -> Parser:
    parser = Parser(
        prog="kv_transfer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rounds: under 40 s in all")
    add("--json", type=Path, metavar="FILE", help="write the throughput rows as a JSON list")
    add("--report", type=Path, metavar="FILE", help="write all of it as all benchmarks do, as JSON")
    add(
        "--json-extra",
        type=Path,
        metavar="FILE",
        help="write environment, sessions and the seconds of every round as JSON",
    )
    add(
        "--block-len",
        type=_block_len,
        action="append",
        metavar="N",
        help="bytes of a block, e.g. 65536 or 64KiB; repeatable [16KiB 64KiB 256KiB 1MiB]",
    )
    add(
        "--transport",
        choices=(*TRANSPORTS, *VARIANTS),
        action="append",
        metavar="NAME",
        help="measure only this and memmove; repeatable. Our transports may be followed "
        f"by +off, +sampled or +always: how much is verified [{' '.join(TRANSPORTS)}]",
    )
    add("--no-peers", action="store_true", help="leave out NIXL, which is installed on first use")
    add("--no-sessions", action="store_true", help="leave out handshakes, fetches, idle CPU")
    add("--rounds", type=positive, metavar="N", help="rounds per block length [30, quick 5]")
    add("--mib", type=positive, default=256, metavar="N", help="MiB per round and side [256]")
    add("--seed", type=int, default=1, metavar="N", help="of the block order [1]")
    add("--cores", type=_cores, metavar="P,C", help="cores of producer and consumer [the first 2]")
    return parser


def _block_len(text: str) -> int:
    try:
        value = report.parse_len(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length such as 64KiB") from None
    if value <= 0 or value % PAGE_LEN:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of {PAGE_LEN} bytes")
    return value


def _cores(text: str) -> tuple[int, int]:
    usable = os.sched_getaffinity(0)
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) in usable for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not two of the cores {','.join(map(str, sorted(usable)))}"
        )
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    sys.exit(main())
