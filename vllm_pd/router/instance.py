"""One instance as the router knows it: address, role, health, use."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field

from vllm_pd.config import Role, RoleLabel
from vllm_pd.router.addresses import Address, instance_id
from vllm_pd.router.forecast import PrefillForecast
from vllm_pd.router.health import Breaker, Health, ProbeHistory
from vllm_pd.router.loads import Ledger
from vllm_pd.router.policy import InstanceView


class State(enum.Enum):
    """Where an instance is in its life, for people and programs."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


@dataclass(slots=True, eq=False)
class Instance:
    """One running vLLM server.

    Attributes:
        base_url: address in its one form.
        role: what the router may use it for.
        control: its control endpoint; None: unknown.
        probes: what the health probes found.
        breaker: stops requests while they fail there.
        draining: whether it gets no new requests and is removed once it is idle.
        engine_id: of the running engine, another one after a restart; None: unknown.
        fingerprint: equal for instances that can exchange KV cache; None: unknown.
        heard: another address of a control endpoint, by an answer of the instance; None: no.
        several_engines: whether its prefills were found at another engine than ``engine_id``.
        model_name: by its metrics; ``""`` if they do not tell.
        num_failed: requests that broke there.
        last_failure: how the last of them did, in one line; ``""``: none did.
        failed_at: when that was, on the monotonic clock.
        ledger: what the router has open there, and its load by its own metrics.
        forecast: how long its prefills take.
        probed: set once the first probe has been answered or failed.
        probe_now: set when the next probe must not wait.
        learn_now: set when the next look at metrics and drain must not wait.
    """

    base_url: str
    role: RoleLabel
    control: Address | None
    probes: ProbeHistory
    breaker: Breaker
    draining: bool = False
    engine_id: str | None = None
    fingerprint: str | None = None
    heard: Address | None = None
    several_engines: bool = False
    model_name: str = ""
    num_failed: int = 0
    last_failure: str = ""
    failed_at: float | None = None
    ledger: Ledger = field(default_factory=Ledger)
    forecast: PrefillForecast = field(default_factory=PrefillForecast)
    probed: asyncio.Event = field(default_factory=asyncio.Event)
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)
    learn_now: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def in_flight(self) -> int:
        """Requests that the router has open there."""
        return self.ledger.in_flight

    @property
    def instance_id(self) -> str:
        """Its name in ``/admin``."""
        return instance_id(self.base_url)

    @property
    def healthy(self) -> bool:
        """Whether it is there, as far as probes and requests have shown."""
        return self.probes.health is Health.HEALTHY

    @property
    def state(self) -> State:
        """Where it is in its life."""
        if self.draining:
            return State.DRAINING
        if self.probes.health is Health.STARTING:
            return State.STARTING
        return State.HEALTHY if self.healthy else State.UNHEALTHY

    def note_failure(self, cause: BaseException, now: float) -> None:
        """Remember how a request broke there, for people."""
        self.num_failed += 1
        self.last_failure, self.failed_at = describe(cause), now

    def view(self, now: float) -> InstanceView:
        """Return the instance as it is now."""
        return InstanceView(
            self.base_url,
            self.healthy,
            not self.draining and self.breaker.admits(now),
            self.fingerprint,
            self.ledger.outstanding,
            self.ledger.scrape,
        )

    def accepts(self, now: float) -> bool:
        """Return whether new requests may go there."""
        return self.healthy and not self.draining and self.breaker.admits(now)

    def serves(self, role: Role) -> bool:
        """Return whether it is used for a role."""
        return self.role.serves(role)


def describe(cause: BaseException) -> str:
    """Return an exception in one line; many of aiohttp's have no text of their own."""
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
