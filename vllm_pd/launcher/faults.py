"""Faults for a running deployment: kill or pause one of its processes.

Only what the state file names is signalled, and only after it proved to be the very
process that is recorded there, see ``process``.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from vllm_pd.errors import ConfigError, LaunchError
from vllm_pd.launcher.process import (
    ProcessIdentity,
    group_members,
    is_alive,
    send_signal,
)
from vllm_pd.launcher.run_dir import RunDir
from vllm_pd.launcher.state import load_state

if TYPE_CHECKING:
    from rich.console import Console

_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.02


def kill(run_dir: RunDir, name: str, console: Console) -> None:
    """SIGKILL a process and all of its children, as a crash or the OOM killer would.

    The supervisor restarts it.

    Raises:
        ConfigError: there is no process of that name.
        LaunchError: it does not run, or does not die.
    """
    leader = find(run_dir, name)
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while members := group_members(leader, run_dir.log_path(name)):
        for member in members:
            send_signal(member, signal.SIGKILL)
        if time.monotonic() >= deadline:
            raise LaunchError(f"{name} (pid {leader.pid}) does not die")
        time.sleep(_POLL_S)
    console.out(f"killed {name} (pid {leader.pid})", highlight=False)


def pause(run_dir: RunDir, name: str, seconds: float, console: Console) -> None:
    """Stop a process and all of its children for a while; blocks.

    They go on when the time is over, and also when this is interrupted.

    Raises:
        ConfigError: there is no process of that name, or no such duration.
        LaunchError: it does not run.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"cannot pause for {seconds:g} seconds")
    leader = find(run_dir, name)
    with _interruptible():
        stopped: dict[int, ProcessIdentity] = {}
        try:
            _stop_all(run_dir, name, leader, stopped)
            console.out(f"paused {name} (pid {leader.pid}) for {seconds:g} s", highlight=False)
            time.sleep(seconds)
        finally:
            for member in stopped.values():
                send_signal(member, signal.SIGCONT)
            console.out(f"{name} goes on", highlight=False)


def resume(run_dir: RunDir, name: str, console: Console) -> None:
    """Let a process go on whose pause was killed.

    Raises:
        ConfigError: there is no process of that name.
        LaunchError: it does not run.
    """
    leader = find(run_dir, name)
    for member in group_members(leader, run_dir.log_path(name)):
        send_signal(member, signal.SIGCONT)
    console.out(f"{name} goes on", highlight=False)


def find(run_dir: RunDir, name: str) -> ProcessIdentity:
    """Return the running process of that name.

    Raises:
        ConfigError: there is no process of that name.
        LaunchError: it does not run, or nothing does.
    """
    state = load_state(run_dir.state_path)
    if state is None:
        raise LaunchError(
            f"nothing is running in {run_dir.path}", hint=f"{run_dir.command('up')} starts it"
        )
    record = next((record for record in state.processes if record.name == name), None)
    if record is None:
        known = ", ".join(record.name for record in state.processes)
        raise ConfigError(f"there is no process {name!r}", hint=f"known: {known}")
    if record.identity is None or not is_alive(record.identity):
        raise LaunchError(f"{name} does not run (it is {record.status})")
    return record.identity


def _stop_all(
    run_dir: RunDir, name: str, leader: ProcessIdentity, stopped: dict[int, ProcessIdentity]
) -> None:
    """SIGSTOP a group, again until no member is new: one may have forked meanwhile."""
    while True:
        members = group_members(leader, run_dir.log_path(name))
        new = [member for member in members if member.pid not in stopped]
        if not new:
            return
        for member in new:
            stopped[member.pid] = member  # before the signal: an interrupt must find it
            send_signal(member, signal.SIGSTOP)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP interrupt as Ctrl-C does, so that ``finally`` runs."""

    def interrupt(_number: int, _frame: FrameType | None) -> Any:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
