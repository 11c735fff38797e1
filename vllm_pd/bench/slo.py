"""Service level objectives and how many requests met all of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_pd.bench.records import Record
from vllm_pd.bench.stats import Interval, memory, wilson
from vllm_pd.errors import ConfigError

_KEYS = ("ttft", "tpot", "e2el")

_MIN_STRAIN, _MAX_STRAIN = 0.5, 2.0
"""Beyond these, one request is as far from its limits as another."""


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
        return self.strain(record) <= 1

    def strain(self, record: Record) -> float:
        """Return what part of its limits a request used, of the limit that it came closest to.

        One that failed counts as far beyond them.
        """
        if not record.is_ok:
            return _MAX_STRAIN
        tpot_s = 0.0 if math.isnan(record.tpot_s) else record.tpot_s
        latencies_s = (record.ttft_s, tpot_s, record.e2el_s)
        limits_ms = (self.ttft_ms, self.tpot_ms, self.e2el_ms)
        parts = (1e3 * one / limit for one, limit in zip(latencies_s, limits_ms, strict=True))
        return min(max(parts), _MAX_STRAIN)


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


def num_independent(runs: Sequence[Sequence[Record]], objectives: Objectives) -> float:
    """Return how many independent requests would say as much as these, which waited together.

    By the memory of how close requests came to their limits, which shows also where all met them.
    """
    return sum(
        len(run) / memory(np.asarray([max(objectives.strain(one), _MIN_STRAIN) for one in run]))
        for run in runs
        if run
    )


def attainment(runs: Sequence[Sequence[Record]], objectives: Objectives) -> Interval:
    """Return the part of the requests, failed ones included, that met all objectives.

    With Wilson's interval for as many as are independent.

    Args:
        runs: requests in the order of arrival, for each seed.
        objectives: to be met.

    Raises:
        ValueError: there are no requests.
    """
    met = [objectives.are_met_by(record) for run in runs for record in run]
    if not met:
        raise ValueError("no requests have no attainment")
    return wilson(sum(met) / len(met), num_independent(runs, objectives))
