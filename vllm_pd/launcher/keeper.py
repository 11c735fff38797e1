"""Keeping one process running: start, readiness, restart with back-off, stop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from vllm_pd.errors import LaunchError
from vllm_pd.launcher.child import Child
from vllm_pd.launcher.logs import last_lines
from vllm_pd.launcher.plan import ProcessSpec, Timing
from vllm_pd.launcher.state import ProcessRecord

logger = logging.getLogger(__name__)

Probe = Callable[[str], Awaitable[bool]]
"""Asks an address whether it answers 200."""

_NUM_LOG_LINES = 15
_ABORT_TIMEOUT_S = 5.0


class RestartPolicy:
    """When to start an ended process again. Pure.

    A row of restarts ends when the process was ready for ``healthy_after_s``.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._num_in_row = 0

    def next_delay(self, ready_s: float) -> float | None:
        """Return the pause before the next start, in seconds; None: give up.

        Args:
            ready_s: for how long the process had been ready; 0: it never was.
        """
        if ready_s >= self._timing.healthy_after_s:
            self._num_in_row = 0
        if self._num_in_row >= self._timing.max_restarts:
            return None
        self._num_in_row += 1
        exponent = min(self._num_in_row - 1, 30)  # 2.0 ** 1024 would overflow
        return min(self._timing.first_delay_s * 2.0**exponent, self._timing.max_delay_s)


class Keeper:
    """Keeps one process of the deployment running.

    ``start`` once, then ``keep`` for as long as it shall run, then ``stop``.
    All three may be cancelled; ``stop`` cleans up after any of them.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        log_path: Path,
        timing: Timing,
        *,
        probe: Probe,
        on_change: Callable[[ProcessRecord], None],
    ) -> None:
        self._spec = spec
        self._log_path = log_path
        self._timing = timing
        self._probe = probe
        self._on_change = on_change
        self._policy = RestartPolicy(timing)
        self._child: Child | None = None
        self._ready_at: float | None = None
        self.record = ProcessRecord(
            name=spec.name,
            role=spec.role,
            url=spec.url,
            log_path=str(log_path),
            devices=spec.devices,
        )

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            LaunchError: it ended before that, or took too long and was killed.
        """
        self._child = child = Child(self._spec, self._log_path, os.environ)
        self._update(status="starting", identity=child.identity)
        try:
            async with asyncio.timeout(self._timing.start_timeout_s):
                await self._wait_ready(child)
        except TimeoutError as exc:
            child.kill_all()
            await child.exited.wait()
            await self._bury()
            raise LaunchError(
                f"{self._spec.name} was not ready within {self._timing.start_timeout_s:g} s"
            ) from exc
        if child.exited.is_set():
            raise LaunchError(f"{self._spec.name} ended while starting ({await self._bury()})")
        self._ready_at = asyncio.get_running_loop().time()
        self._update(status="ready")

    async def wait_end(self) -> None:
        """Wait until the started process ends, which it should not.

        Raises:
            LaunchError: always, when it has ended.
        """
        if self._child is not None:
            await self._child.exited.wait()
            raise LaunchError(f"{self._spec.name} ended unasked ({await self._bury()})")

    async def keep(self) -> None:
        """Restart the process whenever it ends; returns when it is given up."""
        while self._child is not None:
            await self._child.exited.wait()
            self._log_end(await self._bury())
            await self._restart()

    async def stop(self, timeout_s: float) -> None:
        """Stop the process and everything that it started; idempotent.

        Args:
            timeout_s: longest wait for it to end by itself, if it was ready; one
                that still starts has no requests to finish.
        """
        if self._child is None:
            return
        if self.record.status != "ready":
            timeout_s = min(timeout_s, _ABORT_TIMEOUT_S)
        self._update(status="stopping")
        await self._child.stop(timeout_s)
        logger.info("%s stopped (%s)", self._spec.name, await self._bury())

    def mark_failed(self) -> None:
        """Record that the process did not come up and will not be started again."""
        self._update(status="failed")

    def kill(self) -> None:
        """Kill the process and its children now; ``stop`` then finds it ended."""
        if self._child is not None:
            self._child.kill_all()

    async def _wait_ready(self, child: Child) -> None:
        """Return when the process is ready or has ended."""
        while not child.exited.is_set():
            if await self._probe(self._spec.ready_url):
                return
            await wait_up_to(child.exited, self._timing.probe_interval_s)

    async def _restart(self) -> None:
        """Try to start again until that works or the policy gives up."""
        while self._child is None:
            delay = self._policy.next_delay(self._ready_s())
            self._ready_at = None
            if delay is None:
                logger.error(
                    "%s: given up after %d restarts in a row",
                    self._spec.name,
                    self._timing.max_restarts,
                )
                self._update(status="failed")
                return
            logger.info("%s: restart in %g s", self._spec.name, delay)
            self._update(status="restarting")
            await asyncio.sleep(delay)
            self._update(num_restarts=self.record.num_restarts + 1)
            try:
                await self.start()
            except LaunchError as exc:
                logger.error("%s", exc)  # noqa: TRY400 - the log lines below say more
                self._log_last_lines()

    def _ready_s(self) -> float:
        """Return for how long the process that ended had been ready."""
        if self._ready_at is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._ready_at

    async def _bury(self) -> str:
        """Reap the ended process with all that is left of its group; say how it ended."""
        assert self._child is not None
        how = await self._child.bury(self._timing.group_grace_s)
        self._child = None
        self._update(identity=None, last_exit=how)
        return how

    def _log_end(self, how: str) -> None:
        logger.error("%s ended: %s", self._spec.name, how)
        self._log_last_lines()

    def _log_last_lines(self) -> None:
        lines = last_lines(self._log_path, _NUM_LOG_LINES)
        logger.error("its last log lines:\n%s", "\n".join(f"  | {line}" for line in lines))

    def _update(self, **changes: object) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)
        self._on_change(self.record)


async def wait_up_to(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event, but no longer than ``timeout_s``; True: it is set."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True
