"""Stopping a deployment from outside its supervisor."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from vllm_pd.errors import LaunchError
from vllm_pd.launcher.plan import STOP_ORDER
from vllm_pd.launcher.process import (
    end_group,
    group_members,
    is_alive,
    send_signal,
    wait_gone,
    writers_to,
)
from vllm_pd.launcher.run_dir import SUPERVISOR, RunDir
from vllm_pd.launcher.state import ProcessRecord, State, load_state

Say = Callable[[str], None]

_MARGIN_S = 15.0
_GROUP_GRACE_S = 5.0
_POLL_S = 0.05


def stop_deployment(run_dir: RunDir, state: State, say: Say) -> None:
    """Stop everything that the state file names, and nothing else.

    Raises:
        LaunchError: something survived SIGKILL.
    """
    if is_alive(state.supervisor):
        say(f"stopping router, prefill and decode of {run_dir.path}")
        send_signal(state.supervisor, signal.SIGTERM)
        if wait_gone(state.supervisor, len(STOP_ORDER) * state.stop_timeout_s + _MARGIN_S):
            stop_recorded(run_dir)  # nothing, unless it was killed meanwhile
            return
        say("the supervisor does not answer: killing it")
        send_signal(state.supervisor, signal.SIGKILL)
        wait_gone(state.supervisor, _MARGIN_S)
    else:
        say("the supervisor is gone: stopping what it left running")
    stop_recorded(run_dir, say=say)


def stop_recorded(run_dir: RunDir, *, say: Say | None = None) -> None:
    """Stop recorded processes without a supervisor, in order, then remove the state file.

    Raises:
        LaunchError: something survived SIGKILL, or the state file is corrupt.
    """
    state = load_state(run_dir.state_path)
    if state is None:
        return
    for role in STOP_ORDER:
        records = [r for r in state.processes if r.role == role and remains(r, run_dir)]
        if records and say:
            say(f"stopping {', '.join(r.name for r in records)}")
        stop_records(records, run_dir, state.stop_timeout_s)
    run_dir.state_path.unlink(missing_ok=True)


def remains(record: ProcessRecord, run_dir: RunDir) -> bool:
    """Whether a recorded process, or a child that outlived it, still runs."""
    return record.identity is not None and bool(
        group_members(record.identity, run_dir.log_path(record.name))
    )


def stop_records(records: list[ProcessRecord], run_dir: RunDir, timeout_s: float) -> None:
    """SIGTERM the processes, wait, then SIGKILL what is left of their groups.

    Raises:
        LaunchError: something survived SIGKILL.
    """
    for record in records:
        if record.identity is not None:
            send_signal(record.identity, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while any(is_alive(r.identity) for r in records) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for record in records:
        if record.identity is None:
            continue
        if not end_group(record.identity, run_dir.log_path(record.name), _GROUP_GRACE_S):
            raise LaunchError(f"{record.name} (pid {record.identity.pid}) cannot be killed")


def stop_by_logs(run_dir: RunDir, timeout_s: float) -> list[str]:
    """Stop every process whose output goes to a log of this run folder, supervisor first.

    For a state file that cannot be read: a log file is the other thing that a
    process of ours can be known by.

    Returns:
        What was stopped, for people.
    """
    stopped = []
    paths = sorted(run_dir.logs_path.glob("*.log"), key=lambda path: path.stem != SUPERVISOR)
    for path in paths:
        writers = writers_to(path)
        for number, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, _MARGIN_S)):
            for writer in writers:
                send_signal(writer, number)
            deadline = time.monotonic() + wait_s
            for writer in writers:
                wait_gone(writer, max(0.0, deadline - time.monotonic()))
        stopped += [f"{path.stem} (pid {writer.pid})" for writer in writers]
    return stopped
