"""Watches one instance in the background: its health, and what it says of itself.

Health has a task of its own, so that nothing else delays a probe. No request ever
waits for either task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from vllm_pd.errors import PDError
from vllm_pd.protocol.messages import InstanceInfo, Outstanding
from vllm_pd.router.addresses import Address
from vllm_pd.router.describe import fingerprint_key
from vllm_pd.router.health import Health
from vllm_pd.router.instance import Instance, describe
from vllm_pd.router.loads import model_name_of, parse_load

logger = logging.getLogger(__name__)

Probe = Callable[[str], Awaitable[bool]]
"""Asks the instance at a base URL for its health."""

Scrape = Callable[[str], Awaitable[str | None]]
"""Asks the instance at a base URL for its metrics; None if it has none."""


class Control(Protocol):
    """Asks control endpoints; both raise ``PDError`` where nobody answers."""

    async def describe(self, address: Address) -> InstanceInfo:
        """Ask an instance who it is."""

    async def outstanding(self, address: Address) -> Outstanding:
        """Ask an instance what it keeps for others."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a watcher gets its knowledge from.

    Attributes:
        probe: health.
        scrape: metrics; None: they are not looked at.
        control: engine, fingerprint and leases; None: they are not asked for.
        interval_s: pause between two looks.
    """

    probe: Probe
    scrape: Scrape | None
    control: Control | None
    interval_s: float


class Watcher:
    """Keeps what is known of one instance up to date between ``start`` and ``stop``.

    Args:
        instance: what to watch.
        sources: whom to ask.
        on_restart: called when the instance has lost what it had cached.
        on_drained: called once, when it was to be drained and nobody needs it any more.
    """

    def __init__(
        self,
        instance: Instance,
        sources: Sources,
        *,
        on_restart: Callable[[Instance], None],
        on_drained: Callable[[Instance], None],
    ) -> None:
        self._instance = instance
        self._sources = sources
        self._on_restart = on_restart
        self._on_drained = on_drained
        self._described_at: Address | None = None  # None: ask again
        self._is_mute = False  # its control endpoint, when last asked
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to watch."""
        self._tasks = [
            asyncio.create_task(self._watch_health()),
            asyncio.create_task(self._watch_rest()),
        ]

    def cancel(self) -> None:
        """Take no notice of anything from now on, also of what was asked before."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """End the watching."""
        self.cancel()
        # A task keeps its watcher, and only the garbage collector would part the two: with it
        # the instance would stay, maybe for as long as the router runs.
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch_health(self) -> None:
        instance = self._instance
        while True:
            instance.probe_now.clear()
            try:
                healthy = await self._is_healthy()
                if instance.probe_now.is_set():
                    continue  # a request failed meanwhile: what was asked before is old news
                if healthy and not instance.healthy:
                    await self._describe()  # it may have restarted, as something else even
                self._note(healthy=healthy)
            except Exception:
                # A task that ended here would leave its instance as it is for ever.
                logger.exception("cannot watch %s", instance.base_url)
            instance.probed.set()
            await self._pause(instance.probe_now)

    async def _watch_rest(self) -> None:
        instance = self._instance
        while True:
            instance.learn_now.clear()
            try:
                await self._learn()
                if instance.draining and await self._is_drained():
                    self._on_drained(instance)
                    return
            except Exception:
                # A task that ended here would leave its instance as it is for ever.
                logger.exception("cannot watch %s", instance.base_url)
            await self._pause(instance.learn_now)

    async def _pause(self, wake: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._sources.interval_s):
                await wake.wait()

    async def _is_healthy(self) -> bool:
        try:
            return await self._sources.probe(self._instance.base_url)
        except Exception:
            logger.exception("cannot probe %s", self._instance.base_url)
            return False

    def _note(self, *, healthy: bool) -> None:
        """Take the result of a probe, and what follows from it."""
        instance = self._instance
        before = instance.probes.health
        instance.probes.note_probe(healthy=healthy)
        after = instance.probes.health
        if not healthy:
            self._described_at = None  # whoever answers next may be another engine
        if before is after:
            return
        logger.info(
            "%s instance %s is %s", instance.role.value, instance.base_url, instance.state.value
        )
        if after is Health.HEALTHY:
            instance.learn_now.set()
            if before is Health.UNHEALTHY and instance.engine_id is None:
                self._on_restart(instance)  # nobody says, so it may have been one

    async def _learn(self) -> None:
        """Look at what changes while an instance is healthy."""
        instance, sources = self._instance, self._sources
        if not instance.healthy:
            instance.ledger.note_scrape(None, num_own_before=0)
            return
        if self._described_at != instance.control or instance.heard is not None:
            await self._describe()
        if sources.scrape is not None:
            num_own_before = instance.ledger.outstanding.num_sequences
            text = await sources.scrape(instance.base_url)
            load = parse_load(text) if text is not None else None
            instance.ledger.note_scrape(load, num_own_before=num_own_before)
            if text is not None:
                instance.model_name = model_name_of(text) or instance.model_name

    async def _describe(self) -> None:
        """Find out which engine runs there; keep what is known if it does not say."""
        instance = self._instance
        heard, instance.heard = instance.heard, None
        address = instance.control or heard
        if address is None or self._sources.control is None:
            return
        try:
            info = await self._sources.control.describe(address)
        except PDError as exc:
            if heard is not None and heard != address:
                instance.control = heard  # it has moved: asked next time
                instance.learn_now.set()
                return
            if not self._is_mute:
                logger.warning("cannot ask %s who it is: %s", instance.base_url, describe(exc))
            self._is_mute = True
            return
        self._is_mute = False
        instance.control = address
        known, instance.engine_id = instance.engine_id, info.engine_id
        instance.fingerprint = fingerprint_key(info)
        if instance.fingerprint is not None:
            self._described_at = address
        if known is not None and known != info.engine_id:
            logger.info("%s has restarted as engine %s", instance.base_url, info.engine_id)
            self._on_restart(instance)

    async def _is_drained(self) -> bool:
        """Return whether the instance is to be drained and nobody needs it any more."""
        keeps_any = await self._keeps_any()
        return self._instance.draining and not self._instance.in_flight and not keeps_any

    async def _keeps_any(self) -> bool:
        """Return whether prefills wait there for their consumers, as far as it says."""
        address = self._instance.control
        if address is None or self._sources.control is None:
            return False
        try:
            return (await self._sources.control.outstanding(address)).num_leases > 0
        except PDError as exc:
            logger.info("cannot ask %s what it keeps: %s", self._instance.base_url, describe(exc))
            # As long as it is there: one question may get lost. An endpoint that never
            # answered keeps nobody waiting.
            return self._instance.healthy and self._instance.engine_id is not None
