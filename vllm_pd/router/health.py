"""When an instance is out of use: probes with hysteresis, and a circuit breaker. Pure.

The two answer different questions. Probes tell whether an instance is there; the
breaker counts requests that failed on an instance that answers its probes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Self

from vllm_pd.config import RouterConfig


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """How much it takes to change one's mind about an instance.

    Attributes:
        failures_to_leave: failed probes in a row that take it out of use.
        successes_to_return: good probes in a row that bring it back.
        breaker_failures: failed requests in a row that open the breaker.
        backoff_s: pause before the first trial; doubled after each one that fails.
        max_backoff_s: longest pause before a trial.
    """

    failures_to_leave: int
    successes_to_return: int
    breaker_failures: int
    backoff_s: float
    max_backoff_s: float

    @classmethod
    def of(cls, config: RouterConfig) -> Self:
        """Return those of a configuration."""
        return cls(
            config.health_failures,
            config.health_successes,
            config.breaker_failures,
            config.breaker_backoff_s,
            config.breaker_max_backoff_s,
        )


DEFAULT_LIMITS = HealthLimits.of(RouterConfig())


class Health(enum.Enum):
    """What the probes say of an instance."""

    STARTING = "starting"  # it has never answered
    HEALTHY = "healthy"
    SUSPECT = "suspect"  # a request failed on it; the next probe decides
    UNHEALTHY = "unhealthy"


class ProbeHistory:
    """Health of one instance from what its probes found.

    One lost probe does not take an instance out of use, and one good one does not
    bring it back. After a failed request the first probe alone decides: the instance
    is gone, or only that request broke and every instance is needed.
    """

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        self._streak = 0  # of probes that speak against ``health``
        self.health = Health.STARTING

    def note_probe(self, *, healthy: bool) -> None:
        """Take the result of a probe."""
        match self.health:
            case Health.STARTING if healthy:
                self._become(Health.HEALTHY)
            case Health.STARTING:
                pass
            case Health.SUSPECT:
                self._become(Health.HEALTHY if healthy else Health.UNHEALTHY)
            case Health.HEALTHY:
                self._count(not healthy, self._limits.failures_to_leave, Health.UNHEALTHY)
            case Health.UNHEALTHY:
                self._count(healthy, self._limits.successes_to_return, Health.HEALTHY)

    def note_failed_request(self) -> None:
        """Doubt an instance that seemed healthy."""
        if self.health is Health.HEALTHY:
            self._become(Health.SUSPECT)

    def _count(self, against: bool, limit: int, other: Health) -> None:  # noqa: FBT001
        self._streak = self._streak + 1 if against else 0
        if self._streak >= limit:
            self._become(other)

    def _become(self, health: Health) -> None:
        self.health = health
        self._streak = 0


class BreakerState(enum.Enum):
    """Whether requests may pass."""

    CLOSED = "closed"  # all of them
    OPEN = "open"  # none until the pause is over, then one, as a trial
    HALF_OPEN = "half-open"  # none but the trial that is under way


class Breaker:
    """Stops requests to an instance on which they fail one after the other.

    Every request takes a ticket from ``begin`` and reports once by it: ``succeed``,
    ``fail`` or ``abandon``. The ticket tells a trial from requests that are older than
    the last change of state; those no longer count.
    """

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        self._backoff_s = limits.backoff_s
        self._failures = 0
        self._trial_at = 0.0
        self._period = 1  # number of the current state
        self.state = BreakerState.CLOSED

    def admits(self, now: float) -> bool:
        """Return whether a request may begin."""
        match self.state:
            case BreakerState.CLOSED:
                return True
            case BreakerState.OPEN:
                return now >= self._trial_at
            case BreakerState.HALF_OPEN:
                return False

    def begin(self, now: float) -> int:
        """Let a request pass and return its ticket; after the pause, it is the trial."""
        if self.state is not BreakerState.CLOSED:
            if not self.admits(now):
                return 0  # whoever does not ask gets a ticket that counts for nothing
            self._enter(BreakerState.HALF_OPEN)
        return self._period

    def succeed(self, ticket: int) -> None:
        """The instance did what the request asked for."""
        if ticket != self._period:
            return
        self._failures = 0
        if self.state is BreakerState.HALF_OPEN:
            self._backoff_s = self._limits.backoff_s
            self._enter(BreakerState.CLOSED)

    def fail(self, ticket: int, now: float) -> None:
        """The request failed on this instance."""
        if ticket != self._period:
            return
        self._failures += 1
        if self.state is BreakerState.CLOSED and self._failures < self._limits.breaker_failures:
            return
        if self.state is BreakerState.HALF_OPEN:
            self._backoff_s = min(2 * self._backoff_s, self._limits.max_backoff_s)
        self._trial_at = now + self._backoff_s
        self._enter(BreakerState.OPEN)

    def trip(self, now: float) -> None:
        """Let no request pass for a while: they fail for others, who have counted."""
        if self.state is BreakerState.CLOSED:
            self._trial_at = now + self._backoff_s
            self._enter(BreakerState.OPEN)

    def abandon(self, ticket: int) -> None:
        """The request ended without telling anything; another may be the trial."""
        if ticket == self._period and self.state is BreakerState.HALF_OPEN:
            self._enter(BreakerState.OPEN)

    def _enter(self, state: BreakerState) -> None:
        self.state = state
        self._failures = 0
        self._period += 1
