"""Service level objectives and how many requests met all of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_pd.bench.records import Record
from vllm_pd.bench.stats import Interval, wilson
from vllm_pd.errors import ConfigError

_KEYS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Objectives:
    """Longest latencies in milliseconds, all of which a request must meet."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf
    e2el_ms: float = math.inf

    def __str__(self) -> str:
        limits = (self.ttft_ms, self.tpot_ms, self.e2el_ms)
        named = zip(("TTFT", "TPOT", "E2E"), limits, strict=True)
        return ", ".join(f"{name} <= {limit:g} ms" for name, limit in named if limit < math.inf)

    def are_met_by(self, record: Record) -> bool:
        """Return whether a request was answered in time.

        An answer of one token has no TPOT, so it meets any.
        """
        tpot_ms = 0.0 if math.isnan(record.tpot_s) else record.tpot_s * 1e3
        return (
            record.is_ok
            and record.ttft_s * 1e3 <= self.ttft_ms
            and tpot_ms <= self.tpot_ms
            and record.e2el_s * 1e3 <= self.e2el_ms
        )


def parse_objectives(pairs: Sequence[str]) -> Objectives:
    """Read ``ttft:500 tpot:50``, the notation of ``vllm bench serve --goodput``.

    Raises:
        ConfigError: something else.
    """
    limits: dict[str, float] = {}
    for pair in pairs:
        key, _, text = pair.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if key not in _KEYS or not limit > 0:
            raise ConfigError(f"objective {pair!r} is not {', '.join(_KEYS)}:MILLISECONDS")
        limits[f"{key}_ms"] = limit
    if not limits:
        raise ConfigError("no objective is given", hint="e.g. ttft:500 tpot:50")
    return Objectives(**limits)


def attainment(records: Iterable[Record], objectives: Objectives) -> Interval:
    """Return the part of the requests, failed ones included, that met all objectives.

    Raises:
        ValueError: there are no requests.
    """
    met = [objectives.are_met_by(record) for record in records]
    return wilson(sum(met), len(met))
