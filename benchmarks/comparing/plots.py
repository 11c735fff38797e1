"""The pictures of a comparison, each as PNG and as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.comparing.cells import Cell
from benchmarks.comparing.deployments import CHUNKED, COLOCATED, NIXL, PD, REPLICAS, TITLES
from vllm_pd.bench.records import METRICS, pooled
from vllm_pd.bench.stats import Statistic, Values, percentile
from vllm_pd.bench.steady import Regime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people who see few colours can tell apart.
COLOURS = {
    PD: "#0072B2",
    COLOCATED: "#D55E00",
    REPLICAS: "#009E73",
    CHUNKED: "#CC79A7",
    NIXL: "#E69F00",
}
_STYLES = {PD: "-", COLOCATED: "--", REPLICAS: "-.", CHUNKED: ":", NIXL: (0, (5, 1, 1, 1, 1, 1))}
_MARKERS = {PD: "o", COLOCATED: "s", REPLICAS: "^", CHUNKED: "D", NIXL: "v"}
_WINDOW_S = 60.0
"""Seconds of a run that are drawn over time."""

_SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-pd",  # the same file for the same data
}


def draw_all(cells: Sequence[Cell], folder: Path) -> list[str]:
    """Draw everything that the cells allow; return the names of the PNG files.

    For each load: distributions of TTFT and ITL, and ITL over time. For each workload:
    latency over throughput.
    """
    names = []
    with mpl.rc_context(_SETTINGS):
        for key in dict.fromkeys((cell.workload, cell.level) for cell in cells):
            group = [cell for cell in cells if (cell.workload, cell.level) == key]
            slug = f"{key[0]}-{key[1].slug}"
            names.append(_save(_distributions(group), folder, f"{slug}-cdf"))
            names.append(_save(_over_time(group), folder, f"{slug}-itl-over-time"))
        for workload in dict.fromkeys(cell.workload for cell in cells):
            group = [cell for cell in cells if cell.workload == workload]
            if len({cell.level for cell in group}) > 1:
                names.append(_save(_curve(group), folder, f"{workload}-throughput-latency"))
    return names


def _distributions(cells: Sequence[Cell]) -> Figure:
    figure, axes = _figure(1, 2, (9.5, 3.9))
    for axis, metric in zip(axes, ("ttft", "itl"), strict=True):
        for cell in cells:
            values = np.sort(_pooled(cell, metric))
            if values.size:
                share = np.arange(1, values.size + 1) / values.size
                axis.plot(
                    values,
                    share,
                    color=COLOURS[cell.deployment],
                    linestyle=_STYLES[cell.deployment],
                    linewidth=1.6,
                    label=TITLES[cell.deployment],
                )
        axis.set_xscale("log")
        axis.set_ylim(0, 1.01)
        axis.axhline(0.99, color="0.5", linewidth=0.6)
        axis.annotate(
            "P99", (0.005, 0.99), xycoords=("axes fraction", "data"), va="top", fontsize=7
        )
        axis.set_xlabel(f"{METRICS[metric]}, ms")
        axis.set_ylabel("part of " + ("requests" if metric == "ttft" else "gaps between tokens"))
        _plain_numbers(axis)
    _finish(figure, f"{cells[0].workload}, {cells[0].level.name}")
    return figure


def _over_time(cells: Sequence[Cell]) -> Figure:
    """Draw one run of each deployment: every gap, and when requests came."""
    figure, axes = _figure(len(cells), 1, (9.5, 0.9 + 1.35 * len(cells)), sharex=True, sharey=True)
    for axis, cell in zip(axes, cells, strict=True):
        begin = cell.records[0][0].intended_s if cell.records[0] else 0.0
        records = [r for r in cell.runs[0].records if begin <= r.intended_s <= begin + _WINDOW_S]
        for record in records:
            axis.axvline(record.intended_s - begin, color="0.8", linewidth=0.6, zorder=0)
        answered = [record for record in records if record.is_ok and record.gaps_s]
        times = [record.first_s - begin + np.cumsum(record.gaps_s) for record in answered]
        gaps = [1e3 * np.asarray(record.gaps_s) for record in answered]
        if times:
            axis.scatter(
                np.concatenate(times),
                np.concatenate(gaps),
                s=3,
                color=COLOURS[cell.deployment],
                linewidths=0,
                alpha=0.7,
                rasterized=True,
            )
        axis.set_yscale("log")
        axis.set_title(TITLES[cell.deployment], loc="left", fontsize=9)
        axis.set_ylabel("ITL, ms")
        axis.grid(visible=False, axis="x")
        _plain_numbers(axis, only_y=True)
    axes[-1].set_xlabel("seconds; grey lines: requests come, with a prompt to prefill")
    figure.suptitle(f"Every gap between tokens: {cells[0].workload}, {cells[0].level.name}")
    figure.tight_layout()
    return figure


def _curve(cells: Sequence[Cell]) -> Figure:
    metrics: tuple[tuple[str, str, Statistic], ...] = (
        ("ttft", "P90", percentile(90)),
        ("tpot", "P90", percentile(90)),
        ("itl", "P99", percentile(99)),
    )
    figure, axes = _figure(1, 3, (11.5, 3.9))
    for axis, (metric, name, statistic) in zip(axes, metrics, strict=True):
        for deployment in dict.fromkeys(cell.deployment for cell in cells):
            mine = [cell for cell in cells if cell.deployment == deployment]
            mine.sort(key=lambda cell: cell.request_rate)
            points = [(cell.request_rate, _of(cell, metric, statistic), cell) for cell in mine]
            axis.plot(
                [rate for rate, _, _ in points],
                [value for _, value, _ in points],
                color=COLOURS[deployment],
                linestyle=_STYLES[deployment],
                label=TITLES[deployment],
            )
            for rate, value, cell in points:
                is_steady = cell.regime is not Regime.UNSTABLE
                axis.plot(
                    [rate],
                    [value],
                    marker=_MARKERS[deployment],
                    color=COLOURS[deployment],
                    markerfacecolor=COLOURS[deployment] if is_steady else "white",
                )
        axis.set_yscale("log")
        axis.set_xlim(left=0)
        axis.set_xlabel("answered requests per second")
        axis.set_ylabel(f"{METRICS[metric]} {name}, ms")
        _plain_numbers(axis, only_y=True)
    _finish(figure, f"{cells[0].workload}; hollow marks: no steady state")
    return figure


def _figure(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, list[Axes]]:
    # Not by pyplot, which keeps figures and picks a screen.
    figure = Figure(figsize=size, dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [axis for row in axes for axis in row]


def _finish(figure: Figure, title: str) -> None:
    """Put one legend below everything."""
    figure.suptitle(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    num_rows = math.ceil(len(unique) / 2)
    figure.legend(list(unique.values()), list(unique), loc="lower center", ncols=2, fontsize=8)
    figure.tight_layout(rect=(0, 0.02 + 0.055 * num_rows, 1, 1))


def _plain_numbers(axis: Axes, *, only_y: bool = False) -> None:
    """Write 100 and not 10 to the power of 2."""
    chosen = (axis.yaxis,) if only_y else (axis.xaxis,)
    for one in chosen:
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(NullFormatter())


def _save(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / f"{name}.png")
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"{name}.png"


def _pooled(cell: Cell, metric: str) -> Values:
    return np.asarray([value for records in cell.records for value in pooled(records, metric)])


def _of(cell: Cell, metric: str, statistic: Statistic) -> float:
    return statistic(_pooled(cell, metric))
