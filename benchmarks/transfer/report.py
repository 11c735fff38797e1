"""Rows, ratios and tables. Pure, except for what describes the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from rich.table import Table

from benchmarks.transfer.pair import REPO
from benchmarks.transfer.sessions import SessionFigures
from benchmarks.transfer.throughput import MEMMOVE, Samples, peers_of


class Row(TypedDict):
    """One line of the result. Figures are medians of rounds, ratios are of medians.

    A transport with several peers has a row for each; ``peer`` and ``ratio_to_peer``
    are None where there is nothing to compare with.
    """

    transport: str
    block_len: int
    gb_per_s: float
    ratio_to_memmove: float | None
    ratio_to_peer: float | None
    peer: str | None


def make_rows(samples: Iterable[Samples]) -> list[Row]:
    """Compare every transport with memmove and with its peers, at each block length."""
    by_key = {(s.block_len, s.transport): s for s in samples}
    rows: list[Row] = []
    for (block_len, transport), found in by_key.items():
        peers = [p for p in peers_of(transport) if (block_len, p) in by_key]
        row = Row(
            transport=transport,
            block_len=block_len,
            gb_per_s=round(found.median_gb_per_s, 3),
            ratio_to_memmove=_ratio(found, by_key.get((block_len, MEMMOVE))),
            ratio_to_peer=None,
            peer=None,
        )
        rows += [
            Row(**{**row, "peer": peer, "ratio_to_peer": _ratio(found, by_key[block_len, peer])})
            for peer in peers
        ] or [row]
    return rows


def throughput_table(samples: Sequence[Samples], rows: Sequence[Row]) -> Table:
    """Return a table with absolute figures and ratios."""
    table = Table(title="Throughput, random block order (median of rounds, best)")
    for title in ("block", "transport", "GB/s", "best", "x memmove", "x peer"):
        table.add_column(title, justify="left" if title in {"transport", "x peer"} else "right")
    for found in samples:
        mine = [r for r in rows if (r["transport"], r["block_len"]) == _key(found)]
        compared = [f"{r['ratio_to_peer']:.2f} {r['peer']}" for r in mine if r["peer"]]
        ratio = mine[0]["ratio_to_memmove"]
        table.add_row(
            format_len(found.block_len),
            found.transport,
            f"{found.median_gb_per_s:.2f}",
            f"{found.best_gb_per_s:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            ", ".join(compared),
            end_section=found is samples[-1] or _is_last(found, samples),
        )
    return table


def session_table(figures: Sequence[SessionFigures]) -> Table:
    """Return a table of what the control plane adds."""
    table = Table(title="Sessions, from fetch() until take_results() has it")
    table.add_column("")
    for found in figures:
        table.add_column(found.transport, justify="right")
    lines = [
        (
            "first fetch from a new peer (handshake), median / max ms",
            [f"{f.handshake_ms:.2f} / {f.handshake_max_ms:.2f}" for f in figures],
        ),
        (
            "one 128-token block, 12 x 256 KiB, median / p99 ms",
            [f"{f.fetch_ms:.2f} / {f.fetch_p99_ms:.2f}" for f in figures],
        ),
        ("  of which polling: one look every ms", [f"{f.poll_pause_ms:.3f}" for f in figures]),
        (
            "our threads when idle, % of a core per worker",
            [f"{f.idle_percent:.3f}" for f in figures],
        ),
        (
            "memory per worker beside the KV cache, MB",
            [f"{f.memory_len / 1e6:.1f}" for f in figures],
        ),
    ]
    for title, cells in lines:
        table.add_row(title, *cells)
    return table


def describe_environment(peers: str) -> dict[str, str]:
    """Return what a figure is worth nothing without: hardware, kernel, versions, commit."""
    return {
        "cpu": f"{_cpu_model()} ({os.cpu_count()} cores)",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "vllm-pd": _version("vllm-pd"),
        "pyzmq": _version("pyzmq"),
        "peers": peers,
        "commit": _commit(),
    }


def parse_len(text: str) -> int:
    """Parse ``65536``, ``64KiB`` or ``1MiB``.

    Raises:
        ValueError: it is something else.
    """
    for suffix, factor in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)):
        if text.endswith(suffix):
            return int(text.removesuffix(suffix)) * factor
    return int(text)


def format_len(num_bytes: int) -> str:
    """Return ``64 KiB`` or ``1 MiB``."""
    for suffix, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor and num_bytes % factor == 0:
            return f"{num_bytes // factor} {suffix}"
    return f"{num_bytes} B"


def _key(samples: Samples) -> tuple[str, int]:
    return samples.transport, samples.block_len


def _is_last(found: Samples, samples: Sequence[Samples]) -> bool:
    """Return whether a longer block follows."""
    following = samples[samples.index(found) + 1 :]
    return bool(following) and following[0].block_len != found.block_len


def _ratio(found: Samples, other: Samples | None) -> float | None:
    return round(found.median_gb_per_s / other.median_gb_per_s, 3) if other else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit of the checkout, with a plus sign if files differ from it."""
    try:
        git = ["git", "-C", str(REPO)]
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")
