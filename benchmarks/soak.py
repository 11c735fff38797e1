"""Does the router stand it: clients of all kinds for minutes, while instances are killed.

    python benchmarks/soak.py [--seconds N] [--kill-percent X] [--json FILE]

Four prefill and four decode instances without a model, each a process of its own, of
which every one is killed (SIGKILL) with a chance of 1 % per second and started again.
Clients ask for whole and streamed answers, leave at any time, read slowly, stop reading
for good, and send bodies of up to 16 MiB. In the end nothing may be lost or left:

  - every request that had got no byte of its answer was answered all the same; a stream
    that had broke off with an error event, and only if the very process that had sent
    its beginning was killed
  - no answer is wrong: each names its request, and each prompt has a checksum
  - the router holds as many descriptors and tasks as before, and no open request
  - its memory was flat after a warm-up

The exit status is 1 if one of these does not hold, and 2 if an option is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

import aiohttp  # noqa: E402
import uvloop  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.endurance import fleet, judge  # noqa: E402
from benchmarks.endurance.clients import CLIENT_TIMEOUT_S, Client, Tally  # noqa: E402
from benchmarks.endurance.judge import Rest, Sample, Soak  # noqa: E402
from benchmarks.options import Parser, positive  # noqa: E402
from benchmarks.service.servers import free_ports, running  # noqa: E402
from benchmarks.transfer import report as machine  # noqa: E402
from benchmarks.transfer.pair import BenchError  # noqa: E402

NUM_INSTANCES = 4  # of each role
NUM_CLIENTS = 24
SAMPLE_S = 0.5
REST_TIMEOUT_S = 30.0
TELL_S = 30.0
_REQUESTS = ("vllm_pd:router_requests_in_flight", "vllm_pd:router_instance_in_flight")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    seconds: float
    kill_chance: float
    seed: int
    json_file: Path | None


@dataclass(frozen=True, slots=True)
class Router:
    """The router that is watched.

    Attributes:
        url: its address.
        pid: its process.
        log: where it writes.
    """

    url: str
    pid: int
    log: Path

    async def usable_urls(self) -> set[str]:
        """Return the instances that it sends requests to."""
        found = json.loads(await _get(f"{self.url}/ready"))
        return {one["url"] for one in found["instances"] if one["healthy"]}

    def sample(self, at_s: float) -> Sample:
        """Look at its process."""
        statm = Path(f"/proc/{self.pid}/statm").read_text().split()
        memory_len = int(statm[1]) * os.sysconf("SC_PAGE_SIZE")
        return Sample(at_s, memory_len, len(os.listdir(f"/proc/{self.pid}/fd")))

    async def rest(self) -> Rest:
        """Return what it holds; to be asked when nobody else asks for anything."""
        text = await _get(f"{self.url}/metrics")
        values = dict.fromkeys((*_REQUESTS, "vllm_pd:router_tasks"), 0.0)
        for name, value in re.findall(r"^(\S+?)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            if name in values:
                values[name] += float(value)
        num_requests = sum(values[name] for name in _REQUESTS)
        num_tasks = int(values["vllm_pd:router_tasks"])
        return Rest(self.sample(0.0).num_fds, num_tasks, int(num_requests))

    def num_tracebacks(self) -> int:
        """Return how many errors it has logged that it had not foreseen."""
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)")


def parse_options(argv: Sequence[str]) -> Options:
    """Check the command line; bad input ends the program with one line."""
    parser = Parser(
        prog="soak.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seconds", type=positive, default=600, metavar="N", help="how long clients ask [600]")
    add(
        "--kill-percent",
        type=positive,
        default=1,
        metavar="X",
        help="chance per second of each instance to be killed [1]",
    )
    add("--seed", type=positive, default=1, metavar="N", help="of everything random [1]")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON")
    args = parser.parse_args(argv)
    if args.kill_percent > 100:
        parser.error(f"--kill-percent {args.kill_percent} is more than 100")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"{args.json} is not a file that can be written")
    return Options(args.seconds, args.kill_percent / 100, args.seed, args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for key, value in machine.describe_environment("none").items():
        console.print(f"{key + ':':9} {value}")
    console.print(f"command:  {shlex.join(['python', 'benchmarks/soak.py', *argv])}")
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            soak = uvloop.run(_soak(options, Path(folder), console))
    except (BenchError, ExceptionGroup) as exc:
        sys.stderr.write(f"error: {_first(exc)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    report = judge.report(soak)
    console.print(json.dumps(report, indent=1))
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["failures"] else 0


def _first(exc: Exception) -> Exception:
    """Return an error itself, or what a group of tasks failed by."""
    while isinstance(exc, ExceptionGroup):
        exc = exc.exceptions[0]
    return exc


async def _soak(options: Options, folder: Path, console: Console) -> Soak:
    async with fleet.running(NUM_INSTANCES, NUM_INSTANCES) as instances:
        with _routed(instances, folder) as router:
            return await _watch(options, instances, router, console)


async def _watch(
    options: Options, instances: fleet.Fleet, router: Router, console: Console
) -> Soak:
    before = await _settle(router, Rest(0, 0, 0), wait_s=3.0)
    tally, samples = Tally(), list[Sample]()
    began = time.monotonic()
    until = began + options.seconds
    async with asyncio.TaskGroup() as group:
        for number in range(NUM_CLIENTS):
            rng = random.Random(f"{options.seed} {number}")
            client = Client(router.url, tally, rng, instances.kills)
            group.create_task(client.run(until))
        rng = random.Random(options.seed)
        group.create_task(
            instances.kill_at_random(options.kill_chance, until, rng, router.usable_urls)
        )
        told_at = began
        while (now := time.monotonic()) < until:
            samples.append(router.sample(now - began))
            if now >= told_at + TELL_S:
                told_at = now
                _tell(console, samples[-1], tally, instances)
            await asyncio.sleep(SAMPLE_S)
    after = await _settle(router, before, wait_s=REST_TIMEOUT_S)
    kills = Counter(instances.kills.values())
    return Soak(
        options.seconds, tally, dict(kills), samples, before, after, router.num_tracebacks()
    )


@contextlib.contextmanager
def _routed(instances: fleet.Fleet, folder: Path) -> Iterator[Router]:
    (port,) = free_ports(1)
    command = [sys.executable, "-P", "-m", "vllm_pd.cli", "router", "--port", str(port)]
    for role in (fleet.PREFILL, fleet.DECODE):
        for url in instances.urls(role):
            command += [f"--{role}", url]
    command += ["--options", json.dumps({"client_timeout_s": CLIENT_TIMEOUT_S})]
    url, log = f"http://127.0.0.1:{port}", folder / "router.log"
    with running(log, command, f"{url}/ready", {"PYTHONPATH": str(REPO)}) as pid:
        yield Router(url, pid, log)


async def _settle(router: Router, limit: Rest, *, wait_s: float) -> Rest:
    """Return the least that the router holds, but do not wait longer than for ``limit``."""
    deadline = time.monotonic() + wait_s
    least = await router.rest()
    while not least.is_within(limit) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        now = await router.rest()  # probes hold a descriptor for a moment
        least = Rest(
            min(least.num_fds, now.num_fds),
            min(least.num_tasks, now.num_tasks),
            min(least.num_requests, now.num_requests),
        )
    return least


def _tell(console: Console, sample: Sample, tally: Tally, instances: fleet.Fleet) -> None:
    num_requests = sum(sum(counter.values()) for counter in tally.outcomes.values())
    console.print(
        f"{sample.at_s:5.0f} s: {num_requests} requests, {tally.num_lost} lost, "
        f"{len(instances.kills)} kills, {sample.memory_len / 1e6:.0f} MB, "
        f"{sample.num_fds} descriptors"
    )


async def _get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        text: str = await response.text()
        return text


if __name__ == "__main__":
    sys.exit(main())
