"""What an engine counts, on its way to vLLM's log and to vLLM's ``/metrics``.

A worker hands a ``PDConnectorStats`` to vLLM in every step in which there is news.
vLLM merges those of all ranks in the scheduler's process, where the scheduler half
reads them and is asked for its own, and sends the contents on to the API server. There
one copy is merged over an interval for the log, and another one goes to
``metrics.PDPromMetrics``::

    worker --pickle--> scheduler --msgpack--> API server: log, Prometheus
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from vllm_pd.protocol.state import LeaseEnd
from vllm_pd.session.stats import FetchRecord, Outcome, SessionStats

MAX_FETCHES = 16_384
"""Fetches that one merged object remembers, the latest ones; a step has a few."""


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker is and holds now; the last word of a rank counts.

    Attributes:
        num_leases: leases there are.
        num_blocks_held: blocks kept for consumers.
        transports: mode and reason, by transport.
    """

    num_leases: int = 0
    num_blocks_held: int = 0
    transports: dict[str, tuple[str, str]] = msgspec.field(default_factory=dict)


class StatsData(msgspec.Struct, kw_only=True):
    """``PDConnectorStats.data`` with types; see ``SessionStats`` for the counts.

    Attributes:
        fetches: fetches that ended, one entry per request and rank.
        num_bytes_saved: bytes of prompts of which nothing was fetched, being in the
            prefix cache; over all ranks, as the next five.
        num_bytes_sent: bytes that consumers have got.
        num_leases_granted: leases that began.
        num_leases_ended: leases that ended, by reason.
        num_handshake_failures: by reason.
        num_dropped_frames: by reason; those of the instance endpoint, too.
        workers: state of each worker, by rank. A sum would be wrong, as vLLM merges
            ranks and points in time in the same way.
    """

    fetches: list[FetchRecord] = msgspec.field(default_factory=list)
    num_bytes_saved: int = 0
    num_bytes_sent: int = 0
    num_leases_granted: int = 0
    num_leases_ended: dict[str, int] = msgspec.field(default_factory=dict)
    num_handshake_failures: dict[str, int] = msgspec.field(default_factory=dict)
    num_dropped_frames: dict[str, int] = msgspec.field(default_factory=dict)
    workers: dict[str, WorkerState] = msgspec.field(default_factory=dict)


@dataclass
class PDConnectorStats(KVConnectorStats):
    """Plain data that survives pickle and msgpack; ``data`` is a ``StatsData``."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    @classmethod
    def of_worker(
        cls,
        tp_rank: int,
        stats: SessionStats,
        transports: Mapping[str, tuple[str, str]],
        *,
        num_bytes_saved: int = 0,
    ) -> PDConnectorStats:
        """Pack what one worker has to tell.

        Args:
            tp_rank: the worker's rank.
            stats: what happened there since the last time.
            transports: mode and reason, by transport.
            num_bytes_saved: see ``StatsData``.
        """
        state = WorkerState(
            num_leases=stats.num_leases,
            num_blocks_held=stats.num_blocks_held,
            transports=dict(transports),
        )
        data = StatsData(
            fetches=stats.fetches,
            num_bytes_saved=num_bytes_saved,
            num_bytes_sent=stats.num_bytes_sent,
            num_leases_granted=stats.num_leases_granted,
            num_leases_ended=stats.num_leases_ended,
            num_handshake_failures=stats.num_handshake_failures,
            num_dropped_frames=stats.num_dropped_frames,
            workers={str(tp_rank): state},
        )
        return cls(msgspec.to_builtins(data))

    @classmethod
    def of_instance(cls, num_dropped: Mapping[str, int]) -> PDConnectorStats:
        """Pack what the instance endpoint has to tell.

        Args:
            num_dropped: frames and peers that it did not accept, by reason.
        """
        return cls(msgspec.to_builtins(StatsData(num_dropped_frames=dict(num_dropped))))

    @property
    def fetches(self) -> list[FetchRecord]:
        """The fetches in ``data``."""
        return msgspec.convert(self.data["fetches"], list[FetchRecord])

    def reset(self) -> None:
        """Forget everything."""
        self.data = msgspec.to_builtins(StatsData())

    def is_empty(self) -> bool:
        """Return whether nothing happened; a state alone is no event."""
        events = (value for key, value in self.data.items() if key != "workers")
        return not any(any(e.values()) if isinstance(e, dict) else e for e in events)

    def aggregate(self, other: KVConnectorStats) -> Self:
        """Add another rank's, or later, stats to these; return these."""
        for key, theirs in other.data.items():
            ours = self.data[key]
            if key == "workers":
                ours.update(theirs)
            elif isinstance(theirs, dict):
                for label, count in theirs.items():
                    ours[label] = ours.get(label, 0) + count
            elif isinstance(theirs, list):
                ours.extend(theirs)
                del ours[:-MAX_FETCHES]
            else:
                self.data[key] = ours + theirs
        return self

    def remember_workers(self, known: dict[str, Any]) -> None:
        """Add the last state of those ranks that had no news in this step.

        The API server needs all of them for a sum, and there may be several API
        servers that each see a part of the steps.

        Args:
            known: the last state by rank; updated.
        """
        known.update(self.data["workers"])
        self.data["workers"] = dict(known)

    def reduce(self) -> dict[str, int | float]:
        """Return the numbers of vLLM's log line for an interval.

        Sides that did nothing are left out: a decode instance has no leases.
        """
        data = msgspec.convert(self.data, StatsData)
        line: dict[str, int | float] = {}
        if data.fetches:
            line |= _fetch_numbers(data.fetches)
        if data.num_bytes_saved:
            line["MB of wholly cached prompts"] = round(data.num_bytes_saved / 1e6, 3)
        if data.num_leases_granted or data.num_leases_ended:
            line["Leases granted"] = data.num_leases_granted
            for reason in LeaseEnd:
                line[f"Leases {reason.value}"] = data.num_leases_ended.get(reason.value, 0)
            line["MB sent"] = round(data.num_bytes_sent / 1e6, 3)
        if data.num_handshake_failures:
            line["Failed handshakes"] = sum(data.num_handshake_failures.values())
        if data.num_dropped_frames:
            line["Dropped frames"] = sum(data.num_dropped_frames.values())
        return line


def _fetch_numbers(fetches: list[FetchRecord]) -> dict[str, int | float]:
    good = [fetch for fetch in fetches if fetch.outcome is Outcome.OK]
    numbers: dict[str, int | float] = {
        "Fetches": len(fetches),
        "Failed fetches": len(fetches) - len(good),
    }
    if not good:
        return numbers
    times_s = sorted(fetch.timeline.total_s for fetch in good)
    transfer_s = sum(fetch.timeline.transfer_s for fetch in good)
    num_mb = sum(fetch.num_bytes for fetch in good) / 1e6
    numbers |= {
        "MB fetched": round(num_mb, 3),
        "Mean fetch time (ms)": round(sum(times_s) / len(times_s) * 1e3, 3),
        "P90 fetch time (ms)": round(times_s[math.ceil(0.9 * len(times_s)) - 1] * 1e3, 3),
    }
    if transfer_s:
        numbers["Throughput (MB/s)"] = round(num_mb / transfer_s, 1)
    return numbers


class WorkerHalf(Protocol):
    """The part of ``worker.PDConnectorWorker`` that this module uses."""

    tp_rank: int

    def take_stats(self) -> SessionStats | None: ...  # noqa: D102
    def take_num_bytes_saved(self) -> int: ...  # noqa: D102
    def transport_info(self) -> dict[str, tuple[str, str]]: ...  # noqa: D102


class StatsReporter:
    """Makes one worker's stats, step by step.

    Args:
        worker: whose stats.
    """

    def __init__(self, worker: WorkerHalf) -> None:
        self._worker = worker
        self._has_reported = False
        self._last = SessionStats()

    def take(self) -> PDConnectorStats | None:
        """Return what is new since the last step; None if nothing is.

        The transports are told in the first step in which there are any, and then
        along with all other news.
        """
        stats = self._worker.take_stats()
        num_bytes_saved = self._worker.take_num_bytes_saved()
        has_news = stats is not None or num_bytes_saved > 0
        if not has_news and self._has_reported:
            return None
        transports = self._worker.transport_info()
        if not has_news and not transports:
            return None
        self._has_reported = True
        if stats is None:  # nothing happened to the sessions: their state is what it was
            stats = SessionStats(
                num_leases=self._last.num_leases, num_blocks_held=self._last.num_blocks_held
            )
        self._last = stats
        return PDConnectorStats.of_worker(
            self._worker.tp_rank, stats, transports, num_bytes_saved=num_bytes_saved
        )
