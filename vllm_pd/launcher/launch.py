"""Start a supervisor in the background and wait until its deployment is up."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import msgspec

from vllm_pd.errors import LaunchError
from vllm_pd.launcher.events import (
    DeploymentFailed,
    DeploymentReady,
    EventParser,
    ProcessChanged,
)
from vllm_pd.launcher.logs import last_lines, start_new_log
from vllm_pd.launcher.plan import DeploymentPlan
from vllm_pd.launcher.port_claims import claim_ports
from vllm_pd.launcher.progress import Progress
from vllm_pd.launcher.run_dir import SUPERVISOR, RunDir
from vllm_pd.launcher.stop import stop_recorded

SUPERVISE = (sys.executable, "-P", "-m", "vllm_pd.cli", "_supervise")
OWN_VARIABLES = ("VLLM_PD_RUN_DIR", "VLLM_PD_TRANSPORT")
"""Options of the CLI that vLLM would warn about as unknown variables of its own."""

_NUM_LOG_LINES = 15
_TICK_S = 0.2
_KILL_MARGIN_S = 30.0


class UpInterruptedError(LaunchError):
    """The user gave up waiting; everything was stopped."""


def launch(
    plan: DeploymentPlan,
    run_dir: RunDir,
    *,
    lock_fd: int,
    progress: Progress,
    say: Callable[[str], None],
) -> subprocess.Popen[bytes]:
    """Start everything in the background and return when it serves.

    Args:
        plan: what to start.
        run_dir: where the state and the logs go.
        lock_fd: the lock of ``run_dir``, which the supervisor goes on holding.
        progress: shows what happens.
        say: shows a line to the user.

    Returns:
        The supervisor, which outlives this process.

    Raises:
        ConfigError: another deployment took ports for HCCL in this moment.
        LaunchError: it did not come up; the last lines of the log are shown, and
            everything that was started is stopped.
        UpInterruptedError: SIGINT or SIGTERM; everything is stopped.
    """
    with claim_ports(plan) as claims:
        supervisor, events_fd = _spawn(plan, run_dir, (lock_fd, *claims))
    try:
        with _sigterm_as_interrupt():
            try:
                with progress:
                    failure = _wait_up(events_fd, progress)
            except KeyboardInterrupt:
                say("interrupted: stopping everything")
                _stop(supervisor, plan, run_dir)
                raise UpInterruptedError("interrupted; everything was stopped") from None
            if failure is None:
                return supervisor
            _show_log(failure.name or SUPERVISOR, run_dir, say)
            _stop(supervisor, plan, run_dir)
    finally:
        os.close(events_fd)
    raise LaunchError(failure.message, hint=f"the logs are in {run_dir.logs_path}")


def _spawn(
    plan: DeploymentPlan, run_dir: RunDir, held_fds: Sequence[int]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the supervisor; return it with the reading end of its event pipe.

    Args:
        plan: what to start.
        run_dir: where the logs go.
        held_fds: locks that the supervisor goes on holding.
    """
    for name in (SUPERVISOR, *(spec.name for spec in plan.processes)):
        start_new_log(run_dir.log_path(name))
    environ = {key: value for key, value in os.environ.items() if key not in OWN_VARIABLES}
    read_fd, write_fd = os.pipe()
    try:
        with run_dir.log_path(SUPERVISOR).open("ab") as log:
            supervisor = subprocess.Popen(
                [*SUPERVISE, "--run-dir", str(run_dir.path), "--event-fd", str(write_fd)],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd, *held_fds),
                start_new_session=True,
            )
        assert supervisor.stdin is not None
        with supervisor.stdin:
            supervisor.stdin.write(msgspec.json.encode(plan))
    finally:
        os.close(write_fd)
    return supervisor, read_fd


def _wait_up(events_fd: int, progress: Progress) -> DeploymentFailed | None:
    """Show events until the deployment is up or has failed."""
    parser = EventParser()
    while True:
        if not select.select([events_fd], [], [], _TICK_S)[0]:
            progress.tick()
            continue
        data = os.read(events_fd, 1 << 16)
        if not data:
            return DeploymentFailed("the supervisor ended unexpectedly")
        for event in parser.feed(data):
            match event:
                case ProcessChanged(name, status):
                    progress.changed(name, status)
                case DeploymentReady():
                    return None
                case DeploymentFailed():
                    return event


def _show_log(name: str, run_dir: RunDir, say: Callable[[str], None]) -> None:
    path = run_dir.log_path(name)
    say(f"last lines of {path}:")
    for line in last_lines(path, _NUM_LOG_LINES):
        say(f"  | {line}")


def _stop(supervisor: subprocess.Popen[bytes], plan: DeploymentPlan, run_dir: RunDir) -> None:
    """Stop a deployment that did not come up, whatever state its supervisor is in.

    Another Ctrl-C tells the supervisor to kill everything at once.
    """
    deadline = time.monotonic() + plan.timing.stop_timeout_s + _KILL_MARGIN_S
    supervisor.send_signal(signal.SIGTERM)  # no harm to one that is stopping by itself
    while supervisor.poll() is None:
        try:
            supervisor.wait(timeout=max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            supervisor.send_signal(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
    stop_recorded(run_dir)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that a time limit around ``up`` leaves nothing behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
