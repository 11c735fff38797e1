"""Where the time of single requests went, for routers that ask.

A decode request whose ``kv_transfer_params`` say ``"timeline": true`` is answered
with the timeline of its fetch. Only such requests are remembered, from their arrival
until they finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from vllm_pd.protocol.params import TIMELINE
from vllm_pd.session.stats import FetchRecord, FetchTimeline, Outcome


def wants_timeline(params: Mapping[str, Any] | None) -> bool:
    """Return whether a request asks for its timeline."""
    return params is not None and params.get(TIMELINE) is True


class Timelines:
    """The fetches of those requests that asked, until the requests finish.

    Every request that is told of here must be ``take``-n, fetched or not.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[str, FetchRecord | None] = {}
        self._arrived: dict[str, float] = {}
        self._queued_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._records.keys() | self._arrived.keys() | self._queued_s.keys())

    def note_arrival(self, request_id: str) -> None:
        """A request has joined the engine's queue."""
        self._arrived[request_id] = self._clock()

    def expect(self, request_id: str) -> None:
        """Begin to remember the fetch of a request, which has its blocks now."""
        if (arrived := self._arrived.pop(request_id, None)) is not None:
            self._queued_s[request_id] = self._clock() - arrived
        self._records.setdefault(request_id, None)

    def add(self, records: Iterable[FetchRecord]) -> None:
        """Take note of fetches that ended; those of other requests are ignored."""
        for record in records:
            if record.request_id in self._records:
                seen = self._records[record.request_id]
                self._records[record.request_id] = _merged(seen, record) if seen else record

    def take(self, request_id: str) -> dict[str, Any] | None:
        """Forget a request; return the ``kv_transfer_params`` of its answer.

        None if it did not ask, or nothing was fetched for it.
        """
        record = self._records.pop(request_id, None)
        queued_s = self._queued_s.pop(request_id, None)
        self._arrived.pop(request_id, None)
        return None if record is None else {TIMELINE: _to_params(record, queued_s)}


def _merged(one: FetchRecord, other: FetchRecord) -> FetchRecord:
    """Return two ranks' fetches as one: the slowest of each stage, the worse outcome."""
    ours, theirs = asdict(one.timeline), asdict(other.timeline)
    names = {*one.transport.split(","), *other.transport.split(",")} - {""}
    return FetchRecord(
        request_id=one.request_id,
        outcome=other.outcome if one.outcome is Outcome.OK else one.outcome,
        transport=",".join(sorted(names)),
        num_bytes=one.num_bytes + other.num_bytes,
        num_bytes_saved=one.num_bytes_saved + other.num_bytes_saved,
        timeline=FetchTimeline(**{name: max(ours[name], theirs[name]) for name in ours}),
    )


def _to_params(record: FetchRecord, engine_queue_s: float | None) -> dict[str, Any]:
    stages = {name: round(value, 6) for name, value in asdict(record.timeline).items()}
    if engine_queue_s is not None:
        stages["engine_queue_s"] = round(engine_queue_s, 6)
    return {
        **stages,
        "outcome": record.outcome.value,
        "num_bytes": record.num_bytes,
        "num_bytes_saved": record.num_bytes_saved,
        "transport": record.transport,
    }
