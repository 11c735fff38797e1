"""Cells of made-up services: one that stalls streams for prompts, and one that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.comparing.cells import Cell, Level, Sample
from benchmarks.serving.figures import make_figures
from benchmarks.serving.load import Run
from vllm_pd.bench.arrivals import gamma_arrivals
from vllm_pd.bench.records import Record
from vllm_pd.bench.slo import Objectives

LEVEL = Level(0.7, 2.0)


def cell(
    deployment: str,
    *,
    stall_s: float = 0.0,
    ttft_s: float = 0.2,
    level: Level = LEVEL,
    seeds: int = 3,
    first_seed: int = 1,
    count: int = 80,
    lose_every: int = 0,
    overload_s: float = 0.0,
    objectives: Objectives | None = None,
    stolen: float | None = None,
) -> Cell:
    """Return a cell; every arrival stalls what streams then by ``stall_s``.

    Every ``lose_every``th request fails; 0: none. Each waits ``overload_s`` longer than
    the one before.
    """
    asked = range(first_seed, first_seed + seeds)
    runs = tuple(run(stall_s, ttft_s, level.rate, seed - 1, count) for seed in asked)
    if overload_s:
        runs = tuple(replace(one, records=delayed(one.records, overload_s)) for one in runs)
    if lose_every:
        runs = tuple(replace(one, records=losing(one.records, lose_every)) for one in runs)
    samples = [
        Sample(seed, one, make_figures(one, objectives), stolen)
        for seed, one in zip(asked, runs, strict=True)
    ]
    return Cell(deployment, "balanced", level, tuple(samples))


def delayed(records: Sequence[Record], each_s: float) -> list[Record]:
    """Return the same of a service whose queue grows."""
    return [replace(r, first_s=r.first_s + n * each_s) for n, r in enumerate(records)]


def losing(records: Sequence[Record], every: int) -> list[Record]:
    """Return the same with some that failed."""
    return [
        replace(record, first_s=math.nan, gaps_s=(), output_len=0, error="OSError: reset")
        if number % every == 0
        else record
        for number, record in enumerate(records, 1)
    ]


def run(stall_s: float, ttft_s: float, rate: float, seed: int, count: int) -> Run:
    rng = np.random.default_rng(seed)
    arrivals = gamma_arrivals(count, rate, 1.0, rng)
    records = []
    for arrival in arrivals:
        gaps = []
        now = first = float(arrival + ttft_s * rng.uniform(0.9, 1.3))
        for _ in range(20):
            gap = 0.02 * rng.uniform(0.95, 1.1)
            gap += stall_s * int(((arrivals > now) & (arrivals <= now + gap)).sum())
            now += gap
            gaps.append(gap)
        records.append(Record(float(arrival), float(arrival), first, tuple(gaps), 512, 21))
    ended = max(record.ended_s for record in records)
    return Run(records, is_scheduled=True, duration_s=ended)
