"""What the hand-over costs in the running service.

    python benchmarks/service_overhead.py [--quick] [--peer nixl] [--json FILE]

Starts one prefill and one decode instance of real vLLM with ``vllm-pd up``, and a plain
``vllm serve`` without any connector on the core of the decode instance, all with an
untrained model of 41 million parameters whose blocks of 128 tokens are 256 KiB in each
of 12 layers. Then asks them one request at a time, in alternating rounds, with random
prompts that no cache has seen:

  time to first token   through the router, of the prefill instance alone, and without PD
  decode step           of the decode instance, through the router, and without a connector
  stages of a fetch     both legs sent by hand, with the decode instance's own timeline
  idle CPU, memory      of every engine process, beside those of the plain instance

With --peer nixl the same of two instances with vLLM's NixlConnector behind the same
router, after ours have ended: its idle threads spin, and would disturb them. Its plain
figures are those of the first part.

Before that every block of the KV caches is used once, unless --cold is given: the pages
of memory that is shared come into being on first use. Before every request all are idle
for a little more than a second, because a worker of vLLM spins for a second after its last
step and leaves its core to nobody; --gap 0 asks without a pause.

Everything it starts ends with it. Takes about 12 minutes, 12 more with the peer; with
--quick 4 and 5.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

from rich.console import Console  # noqa: E402

from benchmarks.options import Parser, positive, read_number  # noqa: E402
from benchmarks.service import client, nixl, report, servers  # noqa: E402
from benchmarks.service.figures import HANDSHAKE_LIMIT_MS, Limit, kv_block_len  # noqa: E402
from benchmarks.service.prompts import Prompts  # noqa: E402
from benchmarks.service.rounds import BLOCK_SIZE, Baseline, Bench, Effort, Measured  # noqa: E402
from benchmarks.transfer import peers  # noqa: E402
from benchmarks.transfer.pair import BenchError  # noqa: E402
from vllm_pd.config import ConnectorConfig, from_mapping  # noqa: E402
from vllm_pd.demo.checkpoint import VOCAB_SIZE  # noqa: E402
from vllm_pd.demo.model import Geometry, write_untrained_model  # noqa: E402
from vllm_pd.errors import ConfigError  # noqa: E402
from vllm_pd.launcher.devices import find_pool  # noqa: E402

OURS = "vllm-pd"
PLAIN = "plain"
GEOMETRY = Geometry(hidden_size=512, num_layers=12, num_heads=8, num_kv_heads=8, head_size=64)
MAX_PROMPT_LEN = 4000
MAX_GAP_S = 60.0
TABLE_WIDTH = 160
FULL = Effort(
    {64: 40, 1000: 20, 3500: 12}, step_rounds=10, num_steps=160, stage_rounds=8, idle_s=10.0
)
QUICK = Effort({64: 8, 1000: 4, 3500: 2}, step_rounds=3, num_steps=128, stage_rounds=2, idle_s=3.0)


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    effort: Effort
    connector: dict[str, Any]
    cores: tuple[int, int]
    kv_gib: int
    seed: int
    with_nixl: bool
    json_file: Path | None
    folder: Path | None


def parse_options(argv: Sequence[str]) -> Options:
    """Check the command line; bad input ends the program with one line."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    effort = QUICK if args.quick else FULL
    if args.prompt_len:
        usual = effort.rounds
        longest = max(usual)
        rounds = {n: usual.get(n, usual[longest]) for n in sorted(set(args.prompt_len))}
        effort = replace(effort, rounds=rounds)
    effort = replace(effort, fill=not args.cold, gap_s=args.gap)
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"{args.json} is not a file that can be written")
    return Options(
        effort=effort,
        connector=args.connector,
        cores=args.cores or _choose_cores(),
        kv_gib=args.kv_gib,
        seed=args.seed,
        with_nixl=args.peer is not None,
        json_file=args.json,
        folder=args.folder,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()

    def tell(text: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {text}")

    try:
        packages = _find_nixl(tell) if options.with_nixl else None
        environment = report.describe_environment(peers.describe_packages() if packages else "none")
        environment["model"] = _describe(GEOMETRY, _dtype())
        environment["cores"] = "prefill {}, decode and plain {}".format(*options.cores)
        environment["command"] = shlex.join(["python", "benchmarks/service_overhead.py", *argv])
        for key, value in environment.items():
            console.print(f"{key + ':':9} {value}")
        if options.cores[0] == options.cores[1]:
            console.print("one core for everything: the instances disturb each other")
        measured = _measure(options, packages, tell)
    except BenchError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    tell("done")
    _print(console, measured)
    return _write(options.json_file, environment, measured)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM like Ctrl-C, so that a time limit around this leaves nothing behind."""
    raise KeyboardInterrupt


def _find_nixl(tell: Callable[[str], None]) -> Path | None:
    """Return the peer's packages, installed if they are missing; None if that fails."""
    try:
        if peers.find_environment() is None:
            tell(f"installing NIXL into {peers.FOLDER.relative_to(REPO)}, once")
        return nixl.find_packages()
    except BenchError as exc:
        tell(f"nixl: not measured, it cannot be installed: {exc}")
        return None


def _measure(
    options: Options, packages: Path | None, tell: Callable[[str], None]
) -> list[tuple[str, Measured]]:
    with _folder(options.folder) as folder:
        engine = servers.Engine(folder / "model", options.kv_gib, folder)
        _write_model(engine.model)
        ours = _measure_ours(options, engine, tell)
        measured = [(OURS, ours)]
        if packages is not None:
            try:
                theirs = _measure_nixl(options, engine, ours.baseline, packages, tell)
            except BenchError as exc:  # ours are not to be lost
                tell(f"nixl: not measured: {exc}")
            else:
                measured.append((nixl.NAME, theirs))
    return measured


def _measure_ours(
    options: Options, engine: servers.Engine, tell: Callable[[str], None]
) -> Measured:
    tell("starting an instance without a connector")
    with servers.served(engine, PLAIN, options.cores[1]) as plain:
        tell("starting vllm-pd")
        with servers.deployed(engine, options.cores, options.connector) as service:
            bench = _bench(options, service, plain, tell)
            measured = bench.run(_kv_len(engine, plain), timelines=True)
            tell("stopping")
    return measured


def _measure_nixl(
    options: Options,
    engine: servers.Engine,
    baseline: Baseline,
    packages: Path,
    tell: Callable[[str], None],
) -> Measured:
    tell("starting two instances with NixlConnector, and the router")
    with nixl.deployed(engine, options.cores, packages) as service:
        bench = _bench(options, service, baseline, tell)
        measured = bench.run(_kv_len(engine, service.decode), timelines=False)
        tell("stopping")
    return measured


def _bench(
    options: Options,
    service: servers.Service,
    plain: servers.Instance | Baseline,
    tell: Callable[[str], None],
) -> Bench:
    prompts = Prompts(VOCAB_SIZE, options.seed)
    return Bench(service, plain, options.effort, prompts, seed=options.seed, tell=tell)


def _kv_len(engine: servers.Engine, instance: servers.Instance) -> int:
    config = json.loads((engine.model / "config.json").read_text())
    config["dtype"] = _dtype()
    return client.num_blocks(instance.url) * kv_block_len(config, BLOCK_SIZE)


def _write_model(folder: Path) -> None:
    try:
        if not (folder / "config.json").exists():  # in a folder of the user's, from another run
            write_untrained_model(folder, GEOMETRY)
    except ConfigError as exc:
        raise BenchError(str(exc)) from exc


@contextlib.contextmanager
def _folder(named: Path | None) -> Iterator[Path]:
    """Yield a folder for model and logs: the user's, or one that is removed at the end."""
    if named is not None:
        try:
            named.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise BenchError(f"cannot make {named}: {exc.strerror}") from exc
        yield named.resolve()
        return
    with tempfile.TemporaryDirectory(
        prefix="service-overhead-", ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


def _print(console: Console, measured: Sequence[tuple[str, Measured]]) -> None:
    for table in report.tables(measured, ours=OURS):
        console.print(table)
    handshake_ms = measured[0][1].handshake_ms
    if handshake_ms is not None:
        verdict = report.verdict(Limit(handshake_ms, HANDSHAKE_LIMIT_MS, "ms"))
        console.print(f"first handshake with a new peer: {handshake_ms:.1f} ms ({verdict})")


def _write(
    path: Path | None, environment: dict[str, str], measured: Sequence[tuple[str, Measured]]
) -> int:
    if path is None:
        return 0
    content = {
        "environment": environment,
        "rows": report.make_rows(measured, ours=OURS),
        "measured": report.extra(measured),
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as exc:
        sys.stderr.write(f"error: cannot write {path}: {exc.strerror}\n")
        return 1
    return 0


def _dtype() -> str:
    """Return what engines compute in."""
    return (GEOMETRY.dtype, *servers.dtype_args())[-1]


def _describe(geometry: Geometry, dtype: str) -> str:
    return (
        f"untrained, {geometry.num_layers} layers, hidden {geometry.hidden_size}, "
        f"{geometry.num_kv_heads} KV heads of {geometry.head_size}, {dtype}"
    )


def _choose_cores() -> tuple[int, int]:
    """Return the first two cores that the launcher would use, or the only one twice."""
    cores = [int(core) for core in find_pool("cpu", os.environ)]
    return cores[0], cores[min(1, len(cores) - 1)]


def _make_parser() -> Parser:
    parser = Parser(
        prog="service_overhead.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few requests: only to see that it works")
    add("--cold", action="store_true", help="do not use every block of the KV cache once before")
    add("--peer", choices=(nixl.NAME,), help="measure vLLM's NixlConnector, too")
    add("--json", type=Path, metavar="FILE", help="write figures, limits and samples as JSON")
    add(
        "--connector",
        type=_connector,
        default={},
        metavar="JSON",
        help='options of our connector, e.g. \'{"transport": "tcp"}\'',
    )
    add(
        "--prompt-len",
        type=_prompt_len,
        action="append",
        metavar="N",
        help="tokens of a prompt; repeatable [64 1000 3500]",
    )
    add(
        "--gap", type=_seconds, default=FULL.gap_s, metavar="S", help="idle before a request [1.15]"
    )
    add("--cores", type=_cores, metavar="P,D", help="of prefill and decode [the first 2]")
    add("--kv-gib", type=positive, default=1, metavar="N", help="KV cache of an instance [1]")
    add("--seed", type=int, default=1, metavar="N", help="of prompts and order [1]")
    add("--folder", type=Path, metavar="DIR", help="keep model and logs here [a temporary one]")
    return parser


def _connector(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
        from_mapping(ConnectorConfig, values, source="options")
    except json.JSONDecodeError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {exc}") from None
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return values


def _prompt_len(text: str) -> int:
    value = positive(text)
    if value > MAX_PROMPT_LEN:
        raise argparse.ArgumentTypeError(f"{value} tokens are more than {MAX_PROMPT_LEN}")
    return value


def _seconds(text: str) -> float:
    value = read_number(text)
    if not 0 <= value <= MAX_GAP_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 to {MAX_GAP_S:g} seconds")
    return value


def _cores(text: str) -> tuple[int, int]:
    usable = find_pool("cpu", os.environ)
    parts = text.split(",")
    if len(parts) != 2 or not all(part in usable for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not two of the cores {','.join(usable)}")
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    sys.exit(main())
