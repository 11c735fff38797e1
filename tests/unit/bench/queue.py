"""A simulated service with one server and equal service times, whose theory is known."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_pd.bench.records import Record


def serve(arrivals_s: Sequence[float], service_s: float) -> list[Record]:
    """Serve requests one after the other; the first token comes at the end of the service."""
    free_at = 0.0
    records = []
    for arrival_s in arrivals_s:
        free_at = max(free_at, arrival_s) + service_s
        records.append(Record(arrival_s, arrival_s, free_at, (), prompt_len=1, output_len=1))
    return records


def record(
    *,
    due: float = 0.0,
    lag: float = 0.0,
    ttft: float = 0.1,
    gaps: Sequence[float] = (),
    error: str = "",
) -> Record:
    """Return a request; ``ttft`` counts from the moment it was due."""
    return Record(due, due + lag, due + ttft, tuple(gaps), 10, 1 + len(gaps), error)
