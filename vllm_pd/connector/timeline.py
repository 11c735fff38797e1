"""Where the time of single requests went, for routers that ask.

A decode request whose ``kv_transfer_params`` say ``"timeline": true`` is answered
with the timeline of its fetch. Only such requests are remembered, from the order
to fetch until they finish.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from vllm_pd.session.stats import FetchRecord, FetchTimeline, Outcome

KEY = "timeline"
"""In the params of the request and in those of its answer."""


def wants_timeline(params: Mapping[str, Any] | None) -> bool:
    """Return whether a request asks for its timeline."""
    return params is not None and params.get(KEY) is True


class Timelines:
    """The fetches of those requests that asked, until the requests finish.

    Every request that is ``expect``-ed must be ``take``-n, fetched or not.
    """

    def __init__(self) -> None:
        self._records: dict[str, FetchRecord | None] = {}

    def __len__(self) -> int:
        return len(self._records)

    def expect(self, request_id: str) -> None:
        """Begin to remember the fetch of a request."""
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
        return None if record is None else {KEY: _to_params(record)}


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


def _to_params(record: FetchRecord) -> dict[str, Any]:
    stages = {name: round(value, 6) for name, value in asdict(record.timeline).items()}
    return {
        **stages,
        "outcome": record.outcome.value,
        "num_bytes": record.num_bytes,
        "num_bytes_saved": record.num_bytes_saved,
        "transport": record.transport,
    }
