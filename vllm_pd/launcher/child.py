"""One child process of the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

from vllm_pd.errors import LaunchError
from vllm_pd.launcher.plan import ProcessSpec
from vllm_pd.launcher.process import end_group, identify

logger = logging.getLogger(__name__)


class Child:
    """A running process, leader of its own process group.

    It stays in the supervisor's session: Linux schedules sessions as groups
    (sched_autogroup), and two busy vLLM workers that shared a core from two
    sessions were seen to starve each other for ten seconds at a time.

    It is not reaped before ``bury``, so until then its number cannot be reused
    and signalling it and its group is safe.

    Attributes:
        identity: for the state file.
        exited: set when the process has ended.
    """

    def __init__(self, spec: ProcessSpec, log_path: Path, environ: Mapping[str, str]) -> None:
        """Start the process; its output is appended to ``log_path``.

        Raises:
            LaunchError: it could not be started.
        """
        self.exited = asyncio.Event()
        self._log_path = log_path
        try:
            with log_path.open("ab") as log:
                self._popen = subprocess.Popen(
                    spec.argv,
                    env={**environ, **spec.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # not a session of its own, see the class
                )
        except OSError as exc:
            raise LaunchError(f"{spec.name} could not be started: {exc}") from exc
        self.identity = identify(self._popen.pid)
        loop = asyncio.get_running_loop()
        watcher = threading.Thread(
            target=self._watch, args=(loop,), name=f"watch-{spec.name}", daemon=True
        )
        watcher.start()

    def signal(self, number: signal.Signals) -> None:
        """Signal the process, not its children."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.identity.pid, number)

    async def stop(self, timeout_s: float) -> None:
        """Ask the process to end; SIGKILL when it does not within ``timeout_s``."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.exited.wait(), timeout_s)
        except TimeoutError:
            self.kill_all()
            await self.exited.wait()

    def kill_all(self) -> None:
        """SIGKILL the process and all of its children that are still in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.identity.pid, signal.SIGKILL)

    async def bury(self, grace_s: float) -> str:
        """End what the ended process left behind, wait until that is gone, and reap it.

        Args:
            grace_s: longest wait for its children to end by themselves.

        Returns:
            How it ended, for people.
        """
        if not await asyncio.to_thread(end_group, self.identity, self._log_path, grace_s):
            logger.warning("processes of group %d do not die", self.identity.pid)
        self.kill_all()  # also those that write to no log of ours
        return describe_exit(self._popen.wait())

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the end without reaping; a pidfd would need a newer kernel."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.identity.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self.exited.set)


def describe_exit(code: int) -> str:
    """Say how a process ended, from ``Popen.returncode``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
