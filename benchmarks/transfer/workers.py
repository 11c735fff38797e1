"""Child processes for whole workers: sessions, control channel and transport, no vLLM.

One child holds the engines of one side. The parent calls the public methods by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.transfer.arena import Arena
from benchmarks.transfer.plan import Plan
from benchmarks.transfer.wire import Wire

if TYPE_CHECKING:
    from benchmarks.transfer.ours import Engine

POLL_PAUSE_S = 20e-6
"""Pause between two looks for results. vLLM looks once per step; a pause is needed
at all because the session thread shares this core and this interpreter."""

_FETCH_TIMEOUT_S = 20.0
_PR_SET_TIMERSLACK = 29
_THREADS = "vllm-pd"  # how the names of our threads begin
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Worker:
    """The engines of one side, one after the other or side by side.

    Args:
        link: not needed, the engines have sockets of their own.
        name: not needed either.
    """

    def __init__(self, link: Wire, name: str) -> None:
        del link, name
        self._engines: dict[str, Engine] = {}
        # The default of 50 us would be added to every pause between two looks.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)

    def start(self, engine_id: str, transport: str, plan: dict[str, int]) -> dict[str, int]:
        """Make an engine; return its port, and this process's memory before and after.

        The memory before has the KV cache in it, but nothing of this project's.
        """
        parsed = Plan(**plan)
        arena = Arena(parsed.num_bytes)
        arena.fill()
        before = self.memory()
        from benchmarks.transfer.ours import make_engine  # part of what is measured

        engine = make_engine(engine_id, transport, parsed, arena)
        self._engines[engine_id] = engine
        return {"port": engine.port, "before": before, "after": self.memory()}

    def stop(self, engine_id: str) -> None:
        """Close an engine."""
        self._engines.pop(engine_id).close()

    def grant(self, engine_id: str, transfer_ids: list[str], block_ids: list[int]) -> None:
        """Offer blocks under several transfer ids."""
        self._engines[engine_id].grant(transfer_ids, block_ids)

    def fetch(
        self,
        engine_id: str,
        remote: tuple[str, int],
        transfer_ids: list[str],
        block_ids: list[int],
    ) -> list[tuple[float, int]]:
        """Fetch one transfer after the other; return seconds and looks of each."""
        engine = self._engines[engine_id]
        clock, pause = time.perf_counter, time.sleep
        measured = []
        for transfer_id in transfer_ids:
            num_looks = 1
            started = clock()
            engine.start_fetch(*remote, transfer_id, tuple(block_ids))
            while not engine.take_fetched():
                pause(POLL_PAUSE_S)
                num_looks += 1
                if clock() - started > _FETCH_TIMEOUT_S:
                    raise TimeoutError(f"fetch {transfer_id} does not end")
            measured.append((clock() - started, num_looks))
        return measured

    def idle(self, seconds: float) -> dict[str, float]:
        """Do nothing; return the CPU seconds that each of our threads used meanwhile.

        Raises:
            RuntimeError: there are no such threads, so this would measure nothing.
        """
        before = _thread_seconds()
        time.sleep(seconds)
        after = _thread_seconds()
        if not before or before.keys() != after.keys():
            raise RuntimeError(f"threads came or went: {sorted(before)}, {sorted(after)}")
        return {name: used - before[name] for name, used in after.items()}

    def memory(self) -> int:
        """Return the bytes of memory that this process has brought into being.

        Anonymous and file pages, and what its memfds hold, mapped or not. Not the
        shared pages that it maps: those of a peer are the peer's.
        """
        return sum(_read_status("RssAnon", "RssFile").values()) + _memfd_len()

    def close(self) -> None:
        """Close what is left."""
        for engine_id in list(self._engines):
            self.stop(engine_id)


def _read_status(*names: str) -> dict[str, int]:
    """Return sizes from ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in names}


def _memfd_len() -> int:
    """Return the allocated bytes of the memfds that this process has open."""
    num_bytes = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the folder is gone
            if os.readlink(fd).startswith("/memfd:"):
                status = fd.stat()
                num_bytes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(num_bytes.values())


def _thread_seconds() -> dict[str, float]:
    """Return the CPU seconds so far of our threads, by name and id."""
    seconds = {}
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith(_THREADS):
            seconds[f"{name}/{task.name}"] = _cpu_seconds(task)
    return seconds


def _cpu_seconds(task: Path) -> float:
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except OSError:  # a kernel without it has only clock ticks
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
