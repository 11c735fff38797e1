"""Rows, ratios and tables. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from rich.table import Table

from benchmarks.router.routers import DIRECT, OURS, VLLM_ROUTER, XPYD

UNARY_C1, UNARY_C16, STREAM_C16 = "unary_c1", "unary_c16", "stream64_c16"
SCENARIOS = (UNARY_C1, UNARY_C16, STREAM_C16)
STREAMS = "streams2000"

WANTED = {
    XPYD: {UNARY_C1: 2.0, UNARY_C16: 4.0, STREAM_C16: 2.0},
    VLLM_ROUTER: {UNARY_C1: 0.5, UNARY_C16: 0.33, STREAM_C16: 0.7},
}
"""How many times as fast as a peer we must be."""

ADDED_MS = {"p50": 1.0, "p99": 3.0}
"""What we may add to the latency of one request at a time."""


class Row(TypedDict):
    """One line of the result: all rounds of one proxy in one scenario."""

    proxy: str
    scenario: str
    req_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the load generator.

    Attributes:
        seconds: how long it took.
        latencies_ms: of every right answer.
        errors: how many answers were none.
    """

    seconds: float
    latencies_ms: Sequence[float]
    errors: int


def make_row(proxy: str, scenario: str, rounds: Sequence[Round]) -> Row:
    """Join the rounds of a proxy: the median rate, and latencies of all requests."""
    rates = [len(one.latencies_ms) / one.seconds for one in rounds]
    latencies = sorted(value for one in rounds for value in one.latencies_ms)
    return Row(
        proxy=proxy,
        scenario=scenario,
        req_per_s=round(quantile(sorted(rates), 0.5), 1),
        p50_ms=round(quantile(latencies, 0.5), 3),
        p99_ms=round(quantile(latencies, 0.99), 3),
        errors=sum(one.errors for one in rounds),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return a quantile of sorted values, interpolated; 0 without any."""
    if not ordered:
        return 0.0
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def throughput_table(rows: Sequence[Row]) -> Table:
    """Return a table with what every proxy did, and how it compares with ours."""
    table = Table(title="Two legs to null backends, one router process")
    for title in ("scenario", "proxy", "req/s", "p50 ms", "p99 ms", "errors", "ours is"):
        table.add_column(title, justify="left" if title in {"scenario", "proxy"} else "right")
    by_key = {(row["scenario"], row["proxy"]): row for row in rows}
    for row in rows:
        ours = by_key.get((row["scenario"], OURS))
        table.add_row(
            row["scenario"],
            row["proxy"],
            f"{row['req_per_s']:.0f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            str(row["errors"]),
            "" if ours is None or row is ours else _compare(ours, row),
        )
    return table


def added_ms(rows: Iterable[Row], scenario: str) -> dict[str, float] | None:
    """Return what our router adds to the latency of both legs without a router."""
    by_proxy = {row["proxy"]: row for row in rows if row["scenario"] == scenario}
    if (ours := by_proxy.get(OURS)) is None or (direct := by_proxy.get(DIRECT)) is None:
        return None
    return {
        "p50": round(ours["p50_ms"] - direct["p50_ms"], 3),
        "p99": round(ours["p99_ms"] - direct["p99_ms"], 3),
    }


def _compare(ours: Row, other: Row) -> str:
    if not other["req_per_s"]:
        return ""
    ratio = ours["req_per_s"] / other["req_per_s"]
    wanted = WANTED.get(other["proxy"], {}).get(ours["scenario"])
    if wanted is None:
        return f"{ratio:.2f} x"
    return f"{ratio:.2f} x ({'ok' if ratio >= wanted else 'wanted'} >= {wanted:g})"
