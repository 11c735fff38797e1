"""The instances behind the router: their health and how busy the router keeps them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from vllm_pd.config import Role
from vllm_pd.router import policy
from vllm_pd.router.policy import InstanceView

logger = logging.getLogger(__name__)

Probe = Callable[[str], Awaitable[bool]]
"""Asks the instance at a base URL for its health."""

FIRST_PROBE_WAIT_S = 1.0
"""Longest wait for the first round of probes; instances may come up later."""


@dataclass(slots=True, eq=False)
class Instance:
    """One running vLLM server.

    Attributes:
        role: what the router uses it for.
        base_url: address without a trailing slash.
        healthy: whether new requests may go there.
        in_flight: requests that the router has open there.
        probed: set once the first probe has been answered or failed.
        probe_now: set when the next probe must not wait.
    """

    role: Role
    base_url: str
    healthy: bool = False
    in_flight: int = 0
    probed: asyncio.Event = field(default_factory=asyncio.Event)
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)

    def view(self) -> InstanceView:
        """Return the instance as it is now."""
        return InstanceView(self.role, self.base_url, self.healthy, self.in_flight)


class InstancePool:
    """Instances by role, watched in the background between ``start`` and ``stop``.

    An instance is unhealthy until it answers a probe, and again from a failed
    request or probe to the next probe that succeeds.
    """

    def __init__(
        self,
        prefill_urls: Iterable[str],
        decode_urls: Iterable[str],
        *,
        probe: Probe,
        health_interval_s: float,
    ) -> None:
        self._instances = {
            Role.PREFILL: _by_url(Role.PREFILL, prefill_urls),
            Role.DECODE: _by_url(Role.DECODE, decode_urls),
        }
        self._turns = dict.fromkeys(Role, 0)
        self._probe = probe
        self._health_interval_s = health_interval_s
        self._watchers: list[asyncio.Task[None]] = []

    def __iter__(self) -> Iterator[Instance]:
        for group in self._instances.values():
            yield from group.values()

    def snapshot(self, role: Role) -> tuple[InstanceView, ...]:
        """Return the instances of a role as they are now."""
        return tuple(instance.view() for instance in self._instances[role].values())

    def has_healthy(self, role: Role) -> bool:
        """Return whether a request could be sent to a role now."""
        return any(instance.healthy for instance in self._instances[role].values())

    def pick(self, role: Role, *, tried: Collection[str] = ()) -> Instance | None:
        """Choose where a request goes, or None if no instance is left for it."""
        turn = self._turns[role]
        view = policy.pick_round_robin(self.snapshot(role), turn=turn, tried=tried)
        if view is None:
            return None
        self._turns[role] = turn + 1
        return self._instances[role][view.base_url]

    @contextlib.contextmanager
    def in_use(self, instance: Instance) -> Iterator[None]:
        """Count a request as open on an instance for the time of the context."""
        instance.in_flight += 1
        try:
            yield
        finally:
            instance.in_flight -= 1

    def mark_unhealthy(self, instance: Instance, cause: BaseException) -> None:
        """Send nothing more to an instance until a probe of it succeeds.

        The probe is made at once: if only this request broke, e.g. because the
        engine could not cope with it, the instance is back after one round trip.
        """
        if instance.healthy:
            instance.healthy = False
            instance.probe_now.set()
            logger.warning(
                "%s instance %s is out of use: %s",
                instance.role.value,
                instance.base_url,
                describe(cause),
            )

    async def start(self) -> None:
        """Begin to watch, and wait a moment for the first answers."""
        self._watchers = [asyncio.create_task(self._watch(instance)) for instance in self]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_PROBE_WAIT_S):
                for instance in self:
                    await instance.probed.wait()

    async def stop(self) -> None:
        """End the watching."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers = []

    async def _watch(self, instance: Instance) -> None:
        while True:
            healthy = await self._is_healthy(instance)
            if healthy != instance.healthy:
                instance.healthy = healthy
                logger.info(
                    "%s instance %s is %s",
                    instance.role.value,
                    instance.base_url,
                    "healthy" if healthy else "not healthy",
                )
            instance.probed.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._health_interval_s):
                    await instance.probe_now.wait()
            instance.probe_now.clear()

    async def _is_healthy(self, instance: Instance) -> bool:
        try:
            return await self._probe(instance.base_url)
        except Exception:
            # A watcher that ended here would leave its instance as it is for ever.
            logger.exception("cannot probe %s", instance.base_url)
            return False


def describe(cause: BaseException) -> str:
    """Return an exception in one line; many of aiohttp's have no text of their own."""
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _by_url(role: Role, urls: Iterable[str]) -> dict[str, Instance]:
    stripped = (url.rstrip("/") for url in urls)
    return {url: Instance(role, url) for url in stripped}
