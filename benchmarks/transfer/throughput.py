"""Throughput of all transports in alternating rounds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Self, TypeVar

from benchmarks.transfer.child import CONSUMER
from benchmarks.transfer.pair import BenchError, Command, Pair
from benchmarks.transfer.plan import Plan
from vllm_pd.config import Digests

T = TypeVar("T")

MEMMOVE = "memmove"
FOREIGN = ("nixl", "ucx-tcp")
"""Transports that come from the peers' environment, and may be missing."""

_PEERS = {"shm": ("nixl",), "tcp": ("socket", "ucx-tcp")}
OURS = tuple(_PEERS)
VARIANTS = tuple(f"{name}+{digests.value}" for name in OURS for digests in Digests)
"""Our transports with another than the default share of bytes that are verified."""

SLOW = {"ucx-tcp": 3}
"""Transports that are measured in every n-th round only, as they take most of the time."""


@dataclass(frozen=True, slots=True)
class Samples:
    """All rounds of one transport at one block length.

    Attributes:
        num_bytes: moved per round.
        seconds: of each round.
    """

    transport: str
    block_len: int
    num_bytes: int
    seconds: tuple[float, ...]

    @property
    def median_gb_per_s(self) -> float:
        """In 1e9 bytes per second."""
        return self.num_bytes / statistics.median(self.seconds) / 1e9

    @property
    def best_gb_per_s(self) -> float:
        """In 1e9 bytes per second."""
        return self.num_bytes / min(self.seconds) / 1e9


def peers_of(transport: str) -> tuple[str, ...]:
    """Return what a transport is compared with."""
    return _PEERS.get(transport.partition("+")[0], ())


def make_command(name: str, python: str, peers_python: str | None) -> Command | None:
    """Return how to start a transport; None if its environment is missing."""
    if name in FOREIGN:
        if peers_python is None:
            return None
        env = {"NIXL_LOG_LEVEL": "WARN", "UCX_WARN_UNUSED_ENV_VARS": "n"}
        if name == "ucx-tcp":
            env |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
        return Command(name, peers_python, env)
    roles = {"roles": (CONSUMER,)} if name == MEMMOVE else {}
    return Command(name, python, {}, **roles)


def rounds_order(names: Sequence[str], num_rounds: int, seed: int) -> list[list[str]]:
    """Return who is measured in each round, in an order that changes from round to round."""
    rng = random.Random(seed)
    order = []
    for index in range(num_rounds):
        names_now = [name for name in names if index % SLOW.get(name, 1) == 0]
        order.append(rng.sample(names_now, len(names_now)))
    return order


class Throughput:
    """Holds the pairs of all transports; one pair runs at a time, the others are stopped.

    A peer that fails is left out from then on; anything else that fails is an error.

    Args:
        commands: one per transport.
        cores: of producers and of consumers.
        capacity: bytes of the greatest plan to be measured.
        warn: told of a peer that is left out, in one line.

    Raises:
        BenchError: one of our transports, or a reference, cannot be started.
    """

    def __init__(
        self,
        commands: Iterable[Command],
        cores: tuple[int, int],
        capacity: int,
        warn: Callable[[str], None],
    ) -> None:
        self._capacity, self._warn = capacity, warn
        self._pairs: dict[str, Pair] = {}
        try:
            for command in commands:
                if pair := self._try(command.name, lambda c=command: Pair(c, cores)):  # type: ignore[misc]
                    self._pairs[command.name] = pair
                    pair.pause()
        except BaseException:
            self.close()
            raise

    def measure(self, plan: Plan, num_rounds: int) -> list[Samples]:
        """Measure one block length: a round to warm up, then the ones that count.

        Raises:
            BenchError: a transport fails, or bytes arrive wrong.
        """
        for name in list(self._pairs):
            self._use(name, lambda pair: self._warm_up(pair, plan))
        seconds: dict[str, list[float]] = {name: [] for name in self._pairs}
        for names in rounds_order(list(self._pairs), num_rounds, plan.seed):
            for name in names:
                taken = self._use(name, lambda pair: float(pair.call("run")))
                if taken is not None:
                    seconds[name].append(taken)
        for name in list(self._pairs):
            self._use(name, _check)
        return [
            Samples(name, plan.block_len, plan.num_bytes, tuple(seconds[name]))
            for name in self._pairs
        ]

    def close(self) -> None:
        """End all processes."""
        for pair in self._pairs.values():
            pair.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _warm_up(self, pair: Pair, plan: Plan) -> None:
        """Set everything up, and run once: the first transfer of a pair connects it."""
        pair.call("prepare", plan=asdict(plan), capacity=self._capacity)
        pair.call("run")
        pair.consumer.call("spoil")

    def _use(self, name: str, action: Callable[[Pair], T]) -> T | None:
        """Let one pair run while something is done with it."""
        if (pair := self._pairs.get(name)) is None:
            return None
        pair.resume()
        done = self._try(name, lambda: (action(pair),))
        if done is None:
            self._pairs.pop(name).close()
            return None
        pair.pause()
        return done[0]

    def _try(self, name: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except BenchError as exc:
            if name not in FOREIGN:
                raise
            self._warn(f"{name} is not measured: {exc}")
            return None


def _check(pair: Pair) -> None:
    if not pair.consumer.call("verify"):
        raise BenchError(f"{pair.name}: bytes arrived wrong")
