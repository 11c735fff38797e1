"""Processes of this machine: known again for certain, signalled only then.

Process numbers are reused. A number alone is therefore never signalled: either
the process is our own child and not yet reaped, or its start time and boot are
the recorded ones, or (a member of a group whose leader is gone) it writes to the
group's log file.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

_PROC = Path("/proc")
_KILL_TIMEOUT_S = 10.0  # freeing gigabytes takes a while
_POLL_S = 0.02


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process that can be told from a later one with the same number.

    Attributes:
        pid: process number; also the number of its group and session.
        start_ticks: start time in clock ticks since boot.
        boot_id: the boot that it belongs to.
    """

    pid: int
    start_ticks: int
    boot_id: str


class _Stat(msgspec.Struct, frozen=True):
    state: str
    group: int
    start_ticks: int


def boot_id() -> str:
    """Return the kernel's id of the current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> ProcessIdentity:
    """Return the identity of a live process, or of a child that is not reaped.

    Raises:
        ProcessLookupError: there is none.
    """
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError(f"no process {pid}")
    return ProcessIdentity(pid=pid, start_ticks=stat.start_ticks, boot_id=boot_id())


def is_alive(identity: ProcessIdentity | None) -> bool:
    """Whether this very process still runs; a zombie does not."""
    if identity is None or identity.boot_id != boot_id():
        return False
    stat = _stat(identity.pid)
    return stat is not None and stat.state != "Z" and stat.start_ticks == identity.start_ticks


def uptime_s(identity: ProcessIdentity) -> float:
    """Return for how long a live process has been running."""
    since_boot = float((_PROC / "uptime").read_text().split()[0])
    return max(0.0, since_boot - identity.start_ticks / os.sysconf("SC_CLK_TCK"))


def send_signal(identity: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal this very process; False: it is gone."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return False
    except OSError:  # a kernel without pidfd: check, then signal, a microsecond apart
        return is_alive(identity) and _kill(identity.pid, number)
    try:
        if not is_alive(identity):  # the descriptor holds the process that is checked here
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_gone(identity: ProcessIdentity, timeout_s: float) -> bool:
    """Wait until a process that is not our child has ended; False: it has not."""
    deadline = time.monotonic() + timeout_s
    while is_alive(identity):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def group_members(identity: ProcessIdentity, log_path: Path) -> list[ProcessIdentity]:
    """Return the live processes of a group that are certainly ours, leader first.

    Args:
        identity: the group's leader, dead or alive.
        log_path: file that the leader's output was sent to; its children inherit it.
    """
    if identity.boot_id != boot_id():
        return []
    members = []
    for pid, stat in _all_stats():
        if stat.group != identity.pid or stat.state == "Z":
            continue
        is_leader = pid == identity.pid and stat.start_ticks == identity.start_ticks
        if is_leader or (pid != identity.pid and _writes_to(pid, log_path)):
            members.append(
                ProcessIdentity(pid=pid, start_ticks=stat.start_ticks, boot_id=identity.boot_id)
            )
    return sorted(members, key=lambda member: member.pid != identity.pid)


def end_group(identity: ProcessIdentity, log_path: Path, grace_s: float) -> bool:
    """End what is left of a group; blocks.

    SIGTERM first: Python's resource tracker outlives the engine for a moment, to
    remove the shared memory that a killed engine leaves behind.

    Returns:
        Whether nothing survives.
    """
    for member in group_members(identity, log_path):
        send_signal(member, signal.SIGTERM)
    if _wait_empty(identity, log_path, grace_s):
        return True
    for member in group_members(identity, log_path):
        send_signal(member, signal.SIGKILL)
    return _wait_empty(identity, log_path, _KILL_TIMEOUT_S)


def _wait_empty(identity: ProcessIdentity, log_path: Path, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while group_members(identity, log_path):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def writers_to(log_path: Path) -> list[ProcessIdentity]:
    """Return this user's processes whose output *and* errors go to ``log_path``."""
    this_boot = boot_id()
    return [
        ProcessIdentity(pid=pid, start_ticks=stat.start_ticks, boot_id=this_boot)
        for pid, stat in _all_stats()
        if stat.state != "Z" and pid != os.getpid() and _output_paths(pid) == [str(log_path)] * 2
    ]


def _kill(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _writes_to(pid: int, path: Path) -> bool:
    return str(path) in _output_paths(pid)


def _output_paths(pid: int) -> list[str]:
    """Return where descriptors 1 and 2 of a process lead; empty: not ours to know."""
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (1, 2)]
    except OSError:
        return []
    return [link.removesuffix(" (deleted)") for link in links]


def _all_stats() -> Iterator[tuple[int, _Stat]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            yield int(entry.name), stat


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The command name is in brackets and may hold anything, brackets too.
    fields = text.rpartition(")")[2].split()
    return _Stat(state=fields[0], group=int(fields[2]), start_ticks=int(fields[19]))
