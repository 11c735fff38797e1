"""The background process that runs a deployment until it is told to stop.

::

    start all at the same time ──ready──> keep each one running ──SIGTERM──> stop in order
              │                                                                 ▲
              └── one ends or is too slow: the whole deployment is stopped ─────┘

What runs is always in the state file, so that ``vllm-pd down`` can clean up
after a supervisor that was killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiohttp
import msgspec

from vllm_pd.errors import LaunchError
from vllm_pd.launcher.events import DeploymentFailed, DeploymentReady, EventWriter, ProcessChanged
from vllm_pd.launcher.keeper import Keeper, Probe
from vllm_pd.launcher.plan import ROUTER, STOP_ORDER, DeploymentPlan
from vllm_pd.launcher.process import identify
from vllm_pd.launcher.run_dir import RunDir
from vllm_pd.launcher.state import ProcessRecord, State, save_state

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROBE_TIMEOUT_S = 5.0


class Supervisor:
    """Runs one deployment."""

    def __init__(
        self, plan: DeploymentPlan, run_dir: RunDir, *, events: EventWriter, probe: Probe
    ) -> None:
        self._plan = plan
        self._run_dir = run_dir
        self._events = events
        self._probe = probe
        self._stop = asyncio.Event()
        self._keepers = [
            Keeper(
                spec,
                run_dir.log_path(spec.name),
                plan.timing,
                probe=probe,
                on_change=self._on_change,
            )
            for spec in plan.processes
        ]
        self._state = State(
            model=plan.model,
            served_model_name=plan.served_model_name,
            device=plan.device,
            router_url=plan.router_url,
            stop_timeout_s=plan.timing.stop_timeout_s,
            supervisor=identify(os.getpid()),
            processes=tuple(keeper.record for keeper in self._keepers),
        )

    def request_stop(self) -> None:
        """Stop everything in order; asked again, kill it all at once."""
        if self._stop.is_set():
            for keeper in self._keepers:
                keeper.kill()
        self._stop.set()

    async def run(self) -> int:
        """Run until told to stop; return the exit code.

        Side effects: writes the state file, and removes it when nothing runs any more.
        """
        self._save()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)
        try:
            failure = await self._until_stopped(self._bring_up())
            if failure is None and self._stop.is_set():
                failure = DeploymentFailed("stopped while starting")
            if failure is not None:
                logger.error("%s", failure.message)
                self._events.send(failure)
                return 1
            self._set_phase("up")
            self._events.send(DeploymentReady())
            self._events.close()
            logger.info("up: %s", self._plan.router_url)
            await self._until_stopped(self._keep_all())
            await self._stop.wait()
            return 0
        finally:
            await self._shut_down()

    async def _until_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Run ``work`` to its end, or cancel it when a stop is requested."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for pending in (task, stop):
                pending.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _bring_up(self) -> DeploymentFailed | None:
        """Start everything; return why that failed, or None when requests can be served."""
        try:
            async with asyncio.TaskGroup() as group:
                watchers = []
                for keeper in self._keepers:
                    ready = asyncio.Event()
                    watchers.append((ready, group.create_task(self._start(keeper, ready))))
                for ready, _ in watchers:
                    await ready.wait()
                await self._wait_serving()
                for _, watcher in watchers:
                    watcher.cancel()
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, _StartError):
                return DeploymentFailed(str(first), name=first.process)
            raise
        return None

    async def _start(self, keeper: Keeper, ready: asyncio.Event) -> None:
        """Start one process, then watch it until cancelled."""
        try:
            await keeper.start()
            ready.set()
            await keeper.wait_end()
        except LaunchError as exc:
            keeper.mark_failed()
            raise _StartError(keeper.record.name, str(exc)) from exc

    async def _wait_serving(self) -> None:
        """Wait until the router has an instance of each role."""
        timeout_s = self._plan.timing.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._probe(self._plan.ready_url):  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(self._plan.timing.probe_interval_s)
        except TimeoutError as exc:
            raise _StartError(
                ROUTER, f"{self._plan.ready_url} did not answer 200 within {timeout_s:g} s"
            ) from exc

    async def _keep_all(self) -> None:
        """Keep every process running, each on its own."""
        async with asyncio.TaskGroup() as group:
            for keeper in self._keepers:
                group.create_task(keeper.keep())

    async def _shut_down(self) -> None:
        """Stop all processes in order, then remove the state file."""
        self._set_phase("stopping")
        timeout_s = self._plan.timing.stop_timeout_s
        for role in STOP_ORDER:
            await asyncio.gather(
                *(k.stop(timeout_s) for k in self._keepers if k.record.role == role)
            )
        self._run_dir.state_path.unlink(missing_ok=True)
        logger.info("stopped")

    def _on_change(self, record: ProcessRecord) -> None:
        """Record a process's new status, and tell a waiting ``up``."""
        old = {r.name: r for r in self._state.processes}[record.name]
        self._state = msgspec.structs.replace(
            self._state,
            processes=tuple(keeper.record for keeper in self._keepers),
        )
        self._save()
        if record.status != old.status:
            self._events.send(ProcessChanged(record.name, record.status))

    def _set_phase(self, phase: str) -> None:
        self._state = msgspec.structs.replace(self._state, phase=phase)
        self._save()

    def _save(self) -> None:
        try:
            save_state(self._run_dir.state_path, self._state)
        except OSError:
            logger.exception("cannot write %s", self._run_dir.state_path)


class _StartError(LaunchError):
    """A deployment did not come up because of ``process``."""

    def __init__(self, process: str, message: str) -> None:
        super().__init__(message)
        self.process = process


def supervise(plan: DeploymentPlan, run_dir: RunDir, *, event_fd: int | None) -> int:
    """Run a deployment in this process until it is told to stop; return the exit code."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    events = EventWriter(event_fd)
    try:
        return asyncio.run(_supervise(plan, run_dir, events))
    finally:
        events.close()


async def _supervise(plan: DeploymentPlan, run_dir: RunDir, events: EventWriter) -> int:
    timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
    # Only children of this process are asked, and nothing is told them: a certificate for
    # the name that clients use need not be good for the address here.
    connector = aiohttp.TCPConnector(force_close=True, ssl=False)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def probe(url: str) -> bool:
            try:
                async with session.get(url) as response:
                    return response.status == 200
            except (aiohttp.ClientError, TimeoutError, OSError):
                return False

        return await Supervisor(plan, run_dir, events=events, probe=probe).run()
