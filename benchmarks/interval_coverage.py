"""How often the intervals of ``compare.py`` cover the truth, in simulated services.

    python benchmarks/interval_coverage.py

Prints the table of docs/performance.md. Means are those of two queues with one server and the
same arrivals, of which one is shifted so that their true means are equal: every verdict is false.
P50 and P99 are those of two such queues as they are. P99 of the time between tokens is that
of a service in which each arrival stalls all streams, against one that never stalls. Takes some
minutes on one core.
"""

from __future__ import annotations

import argparse
import bisect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

import numpy as np  # noqa: E402

from benchmarks.options import Parser, positive  # noqa: E402
from benchmarks.reporting import markdown_table  # noqa: E402
from vllm_pd.bench.arrivals import gamma_arrivals  # noqa: E402
from vllm_pd.bench.intervals import Comparison, paired  # noqa: E402
from vllm_pd.bench.stats import Run, Values, mean, percentile  # noqa: E402
from vllm_pd.bench.tails import paired_tail  # noqa: E402

_FILLING = 200
"""Requests before those that count: the queue fills up."""

_FIRST_SEED = 10_000
_STEP_MS, _TOKENS = 20.0, 64
_HEADER = (
    *("figure", "service", "requests", "runs", "covered", "with a verdict allowed"),
    "of these not covered",
)


@dataclass(frozen=True, slots=True)
class Queue:
    """Two queues with one server, Poisson arrivals and equal service times (M/D/1).

    Attributes:
        loads: of both.
    """

    loads: tuple[float, float]

    @property
    def name(self) -> str:
        """For people."""
        return "queues at {:.0%} and {:.0%} load".format(*self.loads)

    def pair(self, seed: int, count: int) -> tuple[Values, Values]:
        """Return latencies in units of the mean gap between arrivals."""
        gaps = np.diff(
            gamma_arrivals(count + _FILLING, 1.0, 1.0, np.random.default_rng(seed)), prepend=0.0
        )
        first, second = (_latencies(gaps, load)[_FILLING:] for load in self.loads)
        return first, second

    def equal_means(self, seed: int, count: int) -> tuple[Run, Run]:
        """Return the same with the first one shifted, so that the true means are equal."""
        first, second = self.pair(seed, count)
        shift = _mean_latency(self.loads[1]) - _mean_latency(self.loads[0])
        return _run(first + shift), _run(second)


@dataclass(frozen=True, slots=True)
class Stalls:
    """A service in which each arrival stalls all streams, as a colocated one does.

    Attributes:
        rate: arrivals per second.
        prefill_ms: of each prompt; of several one is drawn.
    """

    rate: float
    prefill_ms: tuple[float, ...]

    @property
    def name(self) -> str:
        """For people."""
        lengths = ", ".join(f"{one:g}" for one in self.prefill_ms)
        return f"stalls of {lengths} ms at {self.rate:g} req/s"

    def run(self, seed: int, count: int) -> list[Values]:
        """Return the gaps between tokens of each request, in milliseconds."""
        rng = np.random.default_rng(seed)
        arrivals = (1e3 * gamma_arrivals(count, self.rate, 1.0, rng)).tolist()
        stalls = (rng.choice(self.prefill_ms, count) * rng.uniform(0.95, 1.05, count)).tolist()
        return [
            _gaps(one, arrivals, stalls, (_STEP_MS * rng.uniform(0.95, 1.1, _TOKENS)).tolist())
            for one in arrivals
        ]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was found in simulations.

    Attributes:
        covered: part of all in which the interval covers the truth.
        enough: part in which there would be a verdict if it excluded equality.
        missed: part of the latter in which it does not cover the truth.
    """

    covered: float
    enough: float
    missed: float


def of_means(queue: Queue, count: int, runs: int, simulations: int) -> Coverage:
    """Return how often the ratio of equal means covers 1."""

    def compare(seeds: Sequence[int]) -> Comparison:
        pairs = [queue.equal_means(seed, count) for seed in seeds]
        return paired([one for one, _ in pairs], [two for _, two in pairs], [mean])[0]

    return _coverage(compare, 1.0, runs, simulations)


def of_latencies(
    queue: Queue, count: int, runs: int, simulations: int, *, level: float
) -> Coverage:
    """Return how often the ratio of a percentile of the latencies covers the truth.

    Args:
        queue: of both services.
        count: requests of a run.
        runs: of each simulation.
        simulations: how many.
        level: 50 or 99.
    """
    take = percentile(level)
    first, second = queue.pair(0, 200_000)

    def compare(seeds: Sequence[int]) -> Comparison:
        pairs = [queue.pair(seed, count) for seed in seeds]
        ours, theirs = [_run(one) for one, _ in pairs], [_run(two) for _, two in pairs]
        if level == 99:
            return paired_tail(ours, theirs, level)
        return paired(ours, theirs, [take])[0]

    return _coverage(compare, take(first) / take(second), runs, simulations)


def of_stalls(stalls: Stalls, count: int, runs: int, simulations: int) -> Coverage:
    """Return how often the ratio of the gaps' P99 to that of no stalls covers the truth."""
    p99 = percentile(99)
    true = p99(np.concatenate(stalls.run(0, 20_000))) / _STEP_MS

    def compare(seeds: Sequence[int]) -> Comparison:
        ours = [stalls.run(seed, count) for seed in seeds]
        theirs = [[np.full(one.size, _STEP_MS) for one in run] for run in ours]
        return paired_tail(ours, theirs, 99)

    return _coverage(compare, true, runs, simulations)


def _coverage(
    compare: Callable[[Sequence[int]], Comparison],
    true: float,
    runs: int,
    simulations: int,
) -> Coverage:
    covered = enough = missed = 0
    for number in range(_FIRST_SEED, _FIRST_SEED + simulations):
        found = compare(range(number * runs, (number + 1) * runs))
        is_covered = found.ratio.low <= true <= found.ratio.high
        covered += is_covered
        enough += found.is_enough
        missed += found.is_enough and not is_covered
    return Coverage(covered / simulations, enough / simulations, missed / max(enough, 1))


def _latencies(gaps: Values, service: float) -> Values:
    """Return latencies by Lindley's recursion."""
    latency, found = 0.0, []
    for gap in gaps.tolist():
        latency = max(latency - gap, 0.0) + service
        found.append(latency)
    return np.asarray(found)


def _mean_latency(load: float) -> float:
    """Return the mean latency by Pollaczek and Khinchine."""
    return load * (1 + load / (2 * (1 - load)))


def _run(values: Values) -> Run:
    return [np.asarray([value]) for value in values]


def _gaps(
    arrived: float, arrivals: Sequence[float], stalls: Sequence[float], steps: Sequence[float]
) -> Values:
    """Return the gaps of a stream that begins five steps after its arrival.

    Args:
        arrived: when it came.
        arrivals: when all came.
        stalls: how long each of these stalls what streams then.
        steps: of its decoding without stalls.
    """
    now, gaps = arrived + 5 * _STEP_MS, []
    upcoming = bisect.bisect_right(arrivals, now)
    for step in steps:
        end = now + step
        while upcoming < len(arrivals) and arrivals[upcoming] <= end:
            end += stalls[upcoming]
            upcoming += 1
        gaps.append(end - now)
        now = end
    return np.asarray(gaps)


MEANS = [
    (Queue(loads), *size)
    for loads in ((0.28, 0.35), (0.56, 0.7), (0.7, 0.84))
    for size in ((40, 1), (640, 1), (320, 2), (20, 3), (60, 3), (160, 3))
]
MEDIANS = [(Queue((0.56, 0.7)), *size) for size in ((640, 1), (20, 3), (60, 3), (160, 3))]
FIRST_TOKENS = [(Queue((0.56, 0.7)), *size) for size in ((800, 1), (200, 3))]
STALLS = [
    (Stalls(rate, prefill_ms), *size)
    for rate, prefill_ms in ((1.0, (300.0,)), (0.5, (300.0,)), (1.0, (50.0, 100.0, 200.0, 400.0)))
    for size in ((640, 1), (20, 3), (40, 3), (100, 3), (200, 3))
]


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print the table; return the exit status."""
    parser = Parser(
        prog="interval_coverage.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--simulations", type=positive, default=200, metavar="N", help="of each row [200]"
    )
    num = parser.parse_args(argv).simulations
    rows = [_row("mean", case, of_means(*case, num)) for case in MEANS]
    rows += [_row("P50", case, of_latencies(*case, num, level=50)) for case in MEDIANS]
    rows += [_row("P99", case, of_latencies(*case, num, level=99)) for case in FIRST_TOKENS]
    rows += [_row("P99 of gaps", case, of_stalls(*case, num)) for case in STALLS]
    sys.stdout.write(markdown_table(_HEADER, rows) + "\n")
    return 0


def _row(figure: str, case: tuple[Queue | Stalls, int, int], found: Coverage) -> list[str]:
    service, count, runs = case
    missed = f"{found.missed:.0%}" if found.enough else "-"
    shares = f"{found.covered:.0%}", f"{found.enough:.0%}", missed
    return [figure, service.name, str(count), str(runs), *shares]


if __name__ == "__main__":
    sys.exit(main())
