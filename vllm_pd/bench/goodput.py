"""The highest rate at which a service meets its objectives. Pure: it asks, somebody measures.

Goodput is DistServe's: "the maximum request rate that can be served adhering to the SLO
attainment goal (say, 90%)" (OSDI 2024), with both objectives met by the same request.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_pd.bench.stats import LEVEL, Interval, ratio, wilson
from vllm_pd.errors import ConfigError

_FACTOR = 2.0
_MAX_DOUBLINGS, _MAX_HALVINGS = 12, 4
"""Before the search gives up. What fails at a sixteenth fails for another reason than the rate."""

_NUM_DRAWS = 2000


class Outcome(enum.Enum):
    """What a trial says of its rate."""

    PASSED = "passes"
    FAILED = "fails"
    UNKNOWN = "may pass or fail"


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured at one rate.

    Attributes:
        rate: requests per second.
        attainment: part of the requests of all seeds that met the objectives.
        num_independent: how many independent requests would say as much.
        is_stable: whether the service kept pace in every run; None: the runs were too short
            to tell.
        is_idle: whether most requests found the service idle, so that a lower rate helps little.
    """

    rate: float
    attainment: float
    num_independent: float
    is_stable: bool | None = True
    is_idle: bool = False

    @property
    def interval(self) -> Interval:
        """The attainment with its confidence interval."""
        return wilson(self.attainment, self.num_independent)

    def is_enough(self, target: float) -> bool:
        """Return whether the requests would do for the target if all of them met it."""
        return wilson(1.0, self.num_independent).low >= target

    def outcome(self, target: float) -> Outcome:
        """Return whether the confidence interval lies on one side of the target.

        Where the queue grows, the rate fails. Want of evidence is neither.
        """
        if self.is_stable is None:
            return Outcome.UNKNOWN
        if not self.is_stable or self.interval.high < target:
            return Outcome.FAILED
        return Outcome.PASSED if self.interval.low >= target else Outcome.UNKNOWN


@dataclass(slots=True)
class Search:
    """Brackets by doubling or halving, then bisects; what is unknown bounds nothing.

    Ask ``next_rate``, measure it, ``tell`` the trial, until ``next_rate`` is None.

    Attributes:
        start: first rate to try, requests per second.
        target: part of the requests that must meet the objectives.
        tolerance: rates that are tried are at least this much apart, relative to the lower one.
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
        limit = self.limit
        return max((rate for rate in self._rates(Outcome.PASSED) if rate < limit), default=0.0)

    @property
    def limit(self) -> float:
        """Lowest rate that failed; infinite if none did."""
        return min(self._rates(Outcome.FAILED), default=math.inf)

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
        return math.isfinite(self.limit)

    def next_rate(self) -> float | None:
        """Return the rate to measure next, or None: the search is over."""
        if not self.trials:
            return self.start
        rates = [trial.rate for trial in self.trials]
        low, high = self.best, self.limit
        if not low:
            return min(rates) / _FACTOR if self._may_halve(min(rates)) else None
        if math.isinf(high):
            is_given_up = max(rates) >= self.start * _FACTOR**_MAX_DOUBLINGS
            return None if is_given_up else max(rates) * _FACTOR
        between = sorted(rate for rate in rates if low < rate < high)
        steps = ((low, between[0]), (between[-1], high)) if between else ((low, high),)
        return next((math.sqrt(a * b) for a, b in steps if b / a > 1 + self.tolerance), None)

    def tell(self, trial: Trial) -> None:
        """Take note of what was measured."""
        self.trials.append(trial)

    def _may_halve(self, lowest: float) -> bool:
        is_idle = any(
            trial.is_idle and trial.outcome(self.target) is Outcome.FAILED for trial in self.trials
        )
        return not is_idle and lowest > self.start / _FACTOR**_MAX_HALVINGS

    def _rates(self, outcome: Outcome) -> list[float]:
        return [trial.rate for trial in self.trials if trial.outcome(self.target) is outcome]


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
    """Return the rate where attainment crosses the target, with its interval.

    Args:
        trials: of which one passed and one failed.
        target: to cross.
        seed: of what is drawn.
    """
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
    points = {t.rate: t.attainment if t.is_stable else 0.0 for t in _telling(trials)}
    return crossing(points, target)


def _telling(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose runs were long enough to say something."""
    return [trial for trial in trials if trial.is_stable is not None]


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
        for trial in _telling(trials)
    }
    points = ({rate: float(shares[rate][n]) for rate in shares} for n in range(_NUM_DRAWS))
    return np.asarray([crossing(one, target) for one in points])


def _interval(value: float, draws: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return Interval(value, float(low), float(high))
