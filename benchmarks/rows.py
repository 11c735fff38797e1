"""The rows of the older benchmarks in the format that all reports share. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.reporting import Row
from benchmarks.router import report as router_report
from benchmarks.transfer import report as transfer_report


def transfer_rows(rows: Iterable[transfer_report.Row]) -> list[Row]:
    """Return what ``kv_transfer.py`` found; ratios name what they are to."""
    found: dict[tuple[str, int, str], Row] = {}
    for row in rows:
        labels = {
            "transport": row["transport"],
            "block": transfer_report.format_len(row["block_len"]),
        }
        values = [
            ("throughput", row["gb_per_s"], "GB/s"),
            ("ratio to memmove", row["ratio_to_memmove"], "x"),
            (f"ratio to {row['peer']}", row["ratio_to_peer"], "x"),
        ]
        for figure, value, unit in values:
            if value is not None:  # a transport with several peers has several rows
                key = (row["transport"], row["block_len"], figure)
                found[key] = Row(labels, figure, value, unit)
    return list(found.values())


def router_rows(rows: Iterable[router_report.Row]) -> list[Row]:
    """Return what ``router_overhead.py`` found."""
    found = []
    for row in rows:
        labels = {"proxy": row["proxy"], "scenario": row["scenario"]}
        found += [
            Row(labels, "throughput", row["req_per_s"], "req/s"),
            Row(labels, "latency P50", row["p50_ms"], "ms"),
            Row(labels, "latency P99", row["p99_ms"], "ms"),
            Row(labels, "failed", row["errors"], "requests"),
        ]
    return found
