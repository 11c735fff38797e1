"""The instances behind the router: who belongs to it, and who may get a request now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from vllm_pd.config import InstanceSpec, Role, RoleLabel
from vllm_pd.router.addresses import base_url, control_address, instance_id
from vllm_pd.router.health import DEFAULT_LIMITS, Breaker, BreakerState, HealthLimits, ProbeHistory
from vllm_pd.router.instance import Instance, describe
from vllm_pd.router.loads import Ledger, Work
from vllm_pd.router.policy import InstanceView
from vllm_pd.router.watcher import Control, Probe, Scrape, Sources, Watcher
from vllm_pd.router.workers.board import Row

logger = logging.getLogger(__name__)

FIRST_PROBE_WAIT_S = 1.0
"""Longest wait for the first round of probes; instances may come up later."""

_NO_WORK = Work()


class Use:
    """One request on one instance, open there for the time of the context.

    It says how it went, at most once. A request that says nothing, as its client left
    or the instance refused it, speaks neither for nor against the instance.
    """

    def __init__(
        self, pool: InstancePool, instance: Instance, work: Work, clock: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._instance = instance
        self._work = work
        self._clock = clock
        self._breaker = instance.breaker  # the instance gets another one when it restarts
        self._is_open = False

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def begin(self) -> None:
        """Count the request; to be called once."""
        self._instance.ledger.begin(self._work, num_requests=1)
        self._ticket = self._breaker.begin(self._clock())
        self._is_open = True

    def end(self) -> None:
        """The request is over; idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        instance = self._instance
        instance.ledger.end(self._work, num_requests=1)
        self._breaker.abandon(self._ticket)
        if instance.draining:
            instance.learn_now.set()

    def succeeded(self) -> None:
        """The instance does what it was asked for; of a stream, it has sent the beginning."""
        self._breaker.succeed(self._ticket)

    def failed(self, cause: BaseException) -> None:
        """The instance is gone, broke off or was too slow: its next probe decides."""
        now = self._clock()
        was = self._breaker.state
        self._breaker.fail(self._ticket, now)
        self._instance.note_failure(cause, now)
        tripped = was is BreakerState.CLOSED and self._breaker.state is BreakerState.OPEN
        self._pool.mark_unhealthy(self._instance, cause, tripped=tripped)


class InstancePool:
    """Instances with their roles, watched in the background between ``start`` and ``stop``.

    All methods are to be called from the thread of the event loop. What they return
    holds until the next await.

    Args:
        prefill_urls: instances to prefill with.
        decode_urls: instances to decode with; one that is in both lists does both.
        probe: asks an instance for its health.
        health_interval_s: pause between two looks at an instance.
        scrape: asks an instance for its metrics; None: its load is not known.
        control: asks control endpoints; None: nobody is asked.
        limits: how much it takes to change the mind about an instance.
        row_of: where the workers of a router count what they have open on the instance at
            a base URL; None: there is one process.
        clock: a monotonic clock, in seconds.

    Raises:
        ConfigError: an address is none.
    """

    def __init__(  # noqa: PLR0913  # all that it cannot do by itself is given to it
        self,
        prefill_urls: Iterable[str],
        decode_urls: Iterable[str],
        *,
        probe: Probe,
        health_interval_s: float,
        scrape: Scrape | None = None,
        control: Control | None = None,
        limits: HealthLimits = DEFAULT_LIMITS,
        row_of: Callable[[str], Row] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._row_of = row_of
        self._sources = Sources(probe, scrape, control, health_interval_s)
        self._limits = limits
        self._clock = clock
        self._instances: dict[str, Instance] = {}  # by base URL
        self._watchers: dict[str, Watcher] = {}  # likewise
        self._stopping: set[asyncio.Task[None]] = set()
        self._on_lost: list[Callable[[Instance], None]] = []
        self._on_doubt: list[Callable[[str, bool], None]] = []
        self._running = False
        for url in prefill_urls:
            self.add(InstanceSpec(url=url, role=RoleLabel.PREFILL))
        for url in decode_urls:
            known = self.get(instance_id(base_url(url)))
            role = RoleLabel.BOTH if known and known.serves(Role.PREFILL) else RoleLabel.DECODE
            self.add(InstanceSpec(url=url, role=role))

    def __iter__(self) -> Iterator[Instance]:
        return iter(tuple(self._instances.values()))

    def get(self, name: str) -> Instance | None:
        """Return the instance with this id, or None if it does not belong here."""
        return next((one for one in self if one.instance_id == name), None)

    def subscribe(self, on_lost: Callable[[Instance], None]) -> None:
        """Call ``on_lost`` whenever an instance has lost what it cached, or is removed."""
        self._on_lost.append(on_lost)

    def subscribe_doubts(self, on_doubt: Callable[[str, bool], None]) -> None:
        """Call ``on_doubt`` with what ``doubt`` takes, whenever a request shows that here."""
        self._on_doubt.append(on_doubt)

    def add(self, spec: InstanceSpec) -> Instance:
        """Register an instance, or change the one at this address; that ends its drain.

        Raises:
            ConfigError: an address is none; nothing has changed then.
        """
        url = base_url(spec.url)
        control = None if spec.control is None else control_address(spec.control)
        instance = self.get(instance_id(url))
        if instance is not None and instance.base_url != url:  # the other scheme
            self.remove(instance)
            instance = None
        if instance is None:
            ledger = Ledger(self._row_of(url) if self._row_of else None)
            probes, breaker = ProbeHistory(self._limits), Breaker(self._limits)
            return self._add(Instance(url, spec.role, control, probes, breaker, ledger=ledger))
        self.relabel(instance, spec.role)
        if instance.control != control:
            instance.control, instance.engine_id, instance.fingerprint = control, None, None
        if instance.draining:
            instance.draining = False
            logger.info("%s instance %s drains no more", instance.role.value, url)
        instance.learn_now.set()
        return instance

    def relabel(self, instance: Instance, role: RoleLabel) -> None:
        """Change what an instance is used for; its open requests go on."""
        if instance.role is not role:
            logger.info(
                "%s instance %s becomes %s", instance.role.value, instance.base_url, role.value
            )
            instance.role = role

    def drain(self, instance: Instance) -> None:
        """Send no new requests to an instance, and remove it once nobody needs it.

        That is when its requests are over and what it keeps for others has been
        fetched. Without a control endpoint only the router's own requests count.
        """
        if not instance.draining:
            logger.info("%s instance %s drains", instance.role.value, instance.base_url)
            instance.draining = True
            instance.learn_now.set()

    def remove(self, instance: Instance) -> None:
        """Forget an instance at once; its open requests go on. Idempotent."""
        url = instance.base_url
        if self._instances.get(url) is not instance:
            return
        del self._instances[url]
        logger.info("%s instance %s is removed", instance.role.value, url)
        if watcher := self._watchers.pop(url, None):
            watcher.cancel()  # first: nothing must be remembered after ``_tell_lost``
            task = asyncio.create_task(watcher.stop())
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
        self._tell_lost(instance)

    def snapshot(self, role: Role) -> tuple[InstanceView, ...]:
        """Return the instances of a role as they are now."""
        now = self._clock()
        return tuple(one.view(now) for one in self._instances.values() if one.serves(role))

    def has_healthy(self, role: Role) -> bool:
        """Return whether a request could be sent to a role now."""
        now = self._clock()
        return any(one.accepts(now) for one in self._instances.values() if one.serves(role))

    def is_accepting(self, instance: Instance) -> bool:
        """Return whether new requests may go to an instance now."""
        return instance.accepts(self._clock())

    def num_accepting(self, role: Role) -> int:
        """Return how many instances of a role may get new requests now."""
        now = self._clock()
        return sum(one.accepts(now) for one in self._instances.values() if one.serves(role))

    def at(self, view: InstanceView) -> Instance:
        """Return the instance that a view of this moment shows."""
        return self._instances[view.base_url]

    def in_use(self, instance: Instance, work: Work = _NO_WORK) -> Use:
        """Count a request as open on an instance for the time of the context."""
        return Use(self, instance, work, self._clock)

    def mark_unhealthy(
        self, instance: Instance, cause: BaseException, *, tripped: bool = False
    ) -> None:
        """Send nothing more to an instance until a probe of it succeeds.

        The probe is made at once: if only this request broke, e.g. because the
        engine could not cope with it, the instance is back after one round trip.

        Args:
            instance: on which a request failed.
            cause: how.
            tripped: whether that has opened its circuit breaker.
        """
        was_healthy = instance.healthy
        if was_healthy:
            instance.probes.note_failed_request()
            instance.probe_now.set()
            logger.warning(
                "%s instance %s is out of use: %s",
                instance.role.value,
                instance.base_url,
                describe(cause),
            )
        is_here = self._instances.get(instance.base_url) is instance  # or it is of others now
        if is_here and (was_healthy or tripped):
            # At once: between two messages, another process could send requests there.
            for on_doubt in self._on_doubt:
                on_doubt(instance.base_url, tripped)

    def doubt(self, base_url: str, *, tripped: bool) -> None:
        """Take over what another process of this router has found out about an instance.

        Args:
            base_url: of the instance, on which a request has failed: the next probe decides.
            tripped: whether that has opened its circuit breaker there.
        """
        instance = self._instances.get(base_url)
        if instance is None:
            return
        if tripped:
            instance.breaker.trip(self._clock())
        if instance.healthy:
            instance.probes.note_failed_request()
            instance.probe_now.set()

    async def start(self) -> None:
        """Begin to watch, and wait a moment for the first answers."""
        self._running = True
        for instance in self:
            self._watch(instance)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_PROBE_WAIT_S):
                for instance in self:
                    await instance.probed.wait()

    async def stop(self) -> None:
        """End the watching."""
        self._running = False
        watchers, self._watchers = self._watchers, {}
        await asyncio.gather(*(watcher.stop() for watcher in watchers.values()), *self._stopping)

    def _add(self, instance: Instance) -> Instance:
        self._instances[instance.base_url] = instance
        if self._running:
            logger.info("%s instance %s is added", instance.role.value, instance.base_url)
            self._watch(instance)
        return instance

    def _watch(self, instance: Instance) -> None:
        watcher = Watcher(
            instance, self._sources, on_restart=self._restarted, on_drained=self.remove
        )
        self._watchers[instance.base_url] = watcher
        watcher.start()

    def _restarted(self, instance: Instance) -> None:
        instance.breaker = Breaker(self._limits)
        instance.several_engines = False
        self._tell_lost(instance)

    def _tell_lost(self, instance: Instance) -> None:
        for on_lost in self._on_lost:
            on_lost(instance)
