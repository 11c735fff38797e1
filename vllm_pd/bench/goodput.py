"""The highest rate at which a service meets its objectives. Pure: it asks, somebody measures.

Goodput is DistServe's: "the maximum request rate that can be served adhering to the SLO
attainment goal (say, 90%)" (OSDI 2024), with both objectives met by the same request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_pd.bench.stats import LEVEL, Interval, ratio, wilson
from vllm_pd.errors import ConfigError

_FACTOR = 2.0
_MAX_BRACKET = 12
"""Doublings or halvings before the search gives up."""

_NUM_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured at one rate.

    Attributes:
        rate: requests per second.
        attainment: part of the requests of all seeds that met the objectives.
        num_independent: how many independent requests would say as much.
        is_stable: whether the service kept pace in every run.
    """

    rate: float
    attainment: float
    num_independent: float
    is_stable: bool = True

    @property
    def interval(self) -> Interval:
        """The attainment with its confidence interval."""
        return wilson(self.attainment, self.num_independent)

    def is_enough(self, target: float) -> bool:
        """Return whether the requests would do for the target if all of them met it."""
        return wilson(1.0, self.num_independent).low >= target

    def passes(self, target: float) -> bool:
        """Return whether the lower confidence bound reaches the target, in steady runs."""
        return self.is_stable and self.interval.low >= target


@dataclass(slots=True)
class Search:
    """Brackets by doubling or halving, then bisects.

    Ask ``next_rate``, measure it, ``tell`` the trial, until ``next_rate`` is None.

    Attributes:
        start: first rate to try, requests per second.
        target: part of the requests that must meet the objectives.
        tolerance: the bracket ends at most this much apart, relative to the lower one.
        trials: what was measured so far.
    """

    start: float
    target: float = 0.9
    tolerance: float = 0.05
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.start < math.inf:
            raise ConfigError(f"rate {self.start:g} to start with is not positive")
        if not 0 < self.target < 1:
            raise ConfigError(f"attainment {self.target:g} is not between 0 and 1")

    @property
    def best(self) -> float:
        """Highest rate that passed below every rate that failed; 0 if none did."""
        return max((t.rate for t in self._passed() if t.rate < self._limit()), default=0.0)

    @property
    def is_over(self) -> bool:
        """Whether there is no rate left to measure."""
        return self.next_rate() is None

    @property
    def has_passed(self) -> bool:
        """Whether the goodput has a lower bound: a rate that passed."""
        return self.best > 0

    @property
    def has_failed(self) -> bool:
        """Whether it has an upper bound: a rate that failed."""
        return math.isfinite(self._limit())

    def next_rate(self) -> float | None:
        """Return the rate to measure next, or None: the search is over."""
        low, high = self.best, self._limit()
        if not self.trials:
            return self.start
        if math.isinf(high):
            return low * _FACTOR if len(self.trials) <= _MAX_BRACKET else None
        if not low:
            return high / _FACTOR if len(self.trials) <= _MAX_BRACKET else None
        return math.sqrt(low * high) if high / low > 1 + self.tolerance else None

    def tell(self, trial: Trial) -> None:
        """Take note of what was measured."""
        self.trials.append(trial)

    def _passed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.passes(self.target)]

    def _limit(self) -> float:
        """Return the lowest rate that failed."""
        failed = [trial.rate for trial in self.trials if not trial.passes(self.target)]
        return min(failed, default=math.inf)


def search(measure: Callable[[float], Trial], plan: Search) -> Search:
    """Run a search to its end."""
    while (rate := plan.next_rate()) is not None:
        plan.tell(measure(rate))
    return plan


def crossing(points: Mapping[float, float], target: float) -> float:
    """Return the rate at which attainment falls to the target, by linear interpolation.

    Attainment is taken to fall with the rate, so what is above a lower rate's is cut.

    Args:
        points: attainment by rate.
        target: to cross.

    Returns:
        The lowest rate times ``attainment / target`` if not even that one reaches the
        target, the highest one if all do.
    """
    rates = sorted(points)
    shares = np.minimum.accumulate([points[rate] for rate in rates])
    if shares[0] < target:
        return rates[0] * float(shares[0]) / target
    for (low, above), (high, below) in zip(
        zip(rates, shares, strict=True), zip(rates[1:], shares[1:], strict=True), strict=False
    ):
        if below < target:
            return float(low + (high - low) * (above - target) / (above - below))
    return rates[-1]


def goodput_interval(trials: Sequence[Trial], target: float, *, seed: int) -> Interval:
    """Return the rate where attainment crosses the target, with its interval."""
    return _interval(_crossing_of(trials, target), _drawn(trials, target, seed))


def goodput_ratio(
    ours: Sequence[Trial], theirs: Sequence[Trial], target: float, *, seed: int
) -> Interval:
    """Return the ratio of two goodputs, first over second, with its interval.

    A rate must have passed in both.
    """
    value = ratio(_crossing_of(ours, target), _crossing_of(theirs, target))
    return _interval(value, _drawn(ours, target, seed) / _drawn(theirs, target, seed + 1))


def _crossing_of(trials: Sequence[Trial], target: float) -> float:
    """Return the goodput, with an attainment of 0 where the queue grows as long as one asks.

    What was measured there only shows how long the run was.
    """
    return crossing({t.rate: t.attainment if t.is_stable else 0.0 for t in trials}, target)


def _drawn(trials: Sequence[Trial], target: float, seed: int) -> npt.NDArray[np.float64]:
    """Return goodputs that the trials leave possible.

    Attainments are drawn by what is known of each one after its trial (Jeffreys' beta), so that
    a rate at which nothing was missed is not taken for one at which nothing can be.
    """
    rng = np.random.default_rng(seed)
    shares = {
        trial.rate: rng.beta(
            trial.attainment * trial.num_independent + 0.5,
            (1 - trial.attainment) * trial.num_independent + 0.5,
            _NUM_DRAWS,
        )
        if trial.is_stable
        else np.zeros(_NUM_DRAWS)
        for trial in trials
    }
    points = ({rate: float(shares[rate][n]) for rate in shares} for n in range(_NUM_DRAWS))
    return np.asarray([crossing(one, target) for one in points])


def _interval(value: float, draws: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return Interval(value, float(low), float(high))
