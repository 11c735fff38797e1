"""The pictures of a comparison, each as PNG and as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.comparing.cells import Cell
from benchmarks.comparing.deployments import (
    CHUNKED,
    COLOCATED,
    CONTROL,
    NIXL,
    PD,
    REPLICAS,
    TITLES,
)
from vllm_pd.bench.records import METRICS, pooled
from vllm_pd.bench.stats import Statistic, Values, percentile
from vllm_pd.bench.steady import Regime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's colours, which people who see few colours can tell apart.
COLOURS = {
    PD: "#0072B2",
    COLOCATED: "#D55E00",
    REPLICAS: "#009E73",
    CHUNKED: "#CC79A7",
    NIXL: "#E69F00",
    CONTROL: "#56B4E9",
}
_STYLES = {
    PD: "-",
    COLOCATED: "--",
    REPLICAS: "-.",
    CHUNKED: ":",
    NIXL: (0, (5, 1, 1, 1, 1, 1)),
    CONTROL: (0, (1, 3)),
}
_MARKERS = {PD: "o", COLOCATED: "s", REPLICAS: "^", CHUNKED: "D", NIXL: "v", CONTROL: "x"}
_WINDOW_S = 60.0
"""Seconds of a run that are drawn over time."""

_MANY_POINTS = 2000
"""Points from which a line is drawn as a picture."""

_BAND = 0.12
"""Height of what shows queues and prefills, as part of an axis."""

_MANY_MARKS = 60.0
"""Ratio of the ends of a logarithmic axis from which only powers of ten are marked."""

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
    """Draw distribution functions, and what the one of ITL hides: how often gaps are long."""
    figure, (ttft, itl, tail) = _figure(1, 3, (11.5, 4.1))
    floor = _floor(cells)
    for cell in cells:
        style = _style(cell.deployment)
        for axis, metric in ((ttft, "ttft"), (itl, "itl"), (tail, "itl")):
            values = np.sort(_pooled(cell, metric))
            if metric == "itl":
                values = np.maximum(values, floor)
            if values.size:
                ranks = np.arange(values.size)
                shares = 1 - ranks / values.size if axis is tail else (ranks + 1) / values.size
                # Thousands of points are smaller as a picture, also in an SVG.
                is_long = values.size > _MANY_POINTS
                axis.step(values, shares, where="post", linewidth=1.6, rasterized=is_long, **style)
    for axis, metric in ((ttft, "ttft"), (itl, "itl")):
        axis.set_ylim(0, 1.01)
        axis.set_xlabel(f"{METRICS[metric]}, ms")
    ttft.set_ylabel("part of requests")
    itl.set_ylabel("part of gaps between tokens")
    tail.set_yscale("log")
    tail.axhline(0.01, color="0.5", linewidth=0.8)
    tail.annotate("P99", (0.01, 0.0105), xycoords=("axes fraction", "data"), fontsize=8)
    tail.set_ylabel("part of gaps that are at least so long")
    tail.set_xlabel("ITL, ms")
    _plain_numbers(tail.yaxis, tail.get_ylim())
    for axis in (ttft, itl, tail):
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis, axis.get_xlim())
    _finish(figure, _titled(cells))
    return figure


def _over_time(cells: Sequence[Cell]) -> Figure:
    """Draw one run of each deployment: every gap, and how long requests waited before."""
    figure, axes = _figure(len(cells), 1, (9.5, 0.9 + 1.35 * len(cells)), sharex=True, sharey=True)
    floor = _floor(cells)
    for axis, cell in zip(axes, cells, strict=True):
        begin = cell.records[0][0].intended_s if cell.records[0] else 0.0
        records = [r for r in cell.runs[0].records if begin <= r.intended_s <= begin + _WINDOW_S]
        for record in records:
            axis.axvline(record.intended_s - begin, color="0.8", linewidth=0.6, zorder=0)
        waits = [(r.intended_s - begin, r.ttft_s) for r in records if r.is_ok]
        axis.broken_barh(
            waits,
            (0, _BAND),
            transform=axis.get_xaxis_transform(),
            color=COLOURS[cell.deployment],
            alpha=0.15,
            linewidth=0,
            zorder=0,
        )
        answered = [record for record in records if record.is_ok and record.gaps_s]
        times = [record.first_s - begin + np.cumsum(record.gaps_s) for record in answered]
        gaps = [np.maximum(1e3 * np.asarray(record.gaps_s), floor) for record in answered]
        if times:
            axis.scatter(
                np.concatenate(times),
                np.concatenate(gaps),
                s=5,
                color=COLOURS[cell.deployment],
                linewidths=0,
                alpha=0.7,
                rasterized=True,
            )
        axis.set_yscale("log")
        axis.set_title(TITLES[cell.deployment], loc="left", fontsize=9)
        axis.set_ylabel("ITL, ms")
        axis.grid(visible=False, axis="x")
        axis.set_xlim(-0.5, _span_s(cells) + 0.5)
    low, high = axes[0].get_ylim()  # all of them have the same
    axes[0].set_ylim(low / (high / low) ** (_BAND / (1 - _BAND)), high)  # the band is below
    for axis in axes:
        _plain_numbers(axis.yaxis, axis.get_ylim())
    axes[-1].set_xlabel(
        "seconds; grey lines: requests come; band below: from then to the first token, queue and "
        "prefill, darker where several wait"
    )
    figure.suptitle(f"Every gap between tokens: {_titled(cells)}")
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
            axis.plot([p[0] for p in points], [p[1] for p in points], **_style(deployment))
            for rate, value, cell in points:
                is_steady = cell.regime is Regime.STEADY
                axis.plot(
                    [rate],
                    [value],
                    marker=_MARKERS[deployment],
                    color=COLOURS[deployment],
                    markerfacecolor=COLOURS[deployment] if is_steady else "white",
                )
        axis.set_yscale("log")
        axis.set_xlim(0, 1.08 * max(cell.request_rate for cell in cells))
        axis.set_xlabel("answered requests per second")
        axis.set_ylabel(f"{METRICS[metric]} {name}, ms")
        _plain_numbers(axis.yaxis, axis.get_ylim())
    _finish(
        figure, f"{cells[0].workload}; filled marks: steady; hollow marks: not known to be steady"
    )
    return figure


def _titled(cells: Sequence[Cell]) -> str:
    """Return workload, load and what can be said of the runs."""
    regimes = {cell.deployment: cell.regime.value for cell in cells}
    if len(set(regimes.values())) == 1:
        said = next(iter(regimes.values()))
    else:
        said = ", ".join(f"{name} {regime}" for name, regime in regimes.items())
    return f"{cells[0].workload}, {cells[0].level.name} ({said})"


def _figure(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, list[Axes]]:
    # Not by pyplot, which keeps figures and picks a screen.
    figure = Figure(figsize=size, dpi=120)
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


def _plain_numbers(axis: Axis, limits: tuple[float, float]) -> None:
    """Mark a logarithmic axis by 100, not by a power of ten; also 20 and 50 if there is room."""
    is_short = limits[1] < limits[0] * _MANY_MARKS
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_short else (1.0,), numticks=24))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _floor(cells: Sequence[Cell]) -> float:
    """Return what the shortest gaps are drawn as, in milliseconds.

    Tokens that come in one read have a gap of microseconds, which would leave the
    others little room.
    """
    medians = [float(np.median(gaps)) for cell in cells if (gaps := _pooled(cell, "itl")).size]
    return min(medians, default=1.0) / 5


def _style(deployment: str) -> dict[str, Any]:
    return {
        "color": COLOURS[deployment],
        "linestyle": _STYLES[deployment],
        "label": TITLES[deployment],
    }


def _span_s(cells: Sequence[Cell]) -> float:
    """Return how many seconds are drawn over time: to the last answer, but at most a minute."""
    records = cells[0].records[0]
    arrivals_s = records[-1].intended_s - records[0].intended_s if records else 0.0
    if arrivals_s >= _WINDOW_S:
        return _WINDOW_S
    begin = records[0].intended_s if records else 0.0
    ends = [run.duration_s - begin for cell in cells for run in cell.runs[:1]]
    return min(_WINDOW_S, max(ends))


def _save(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / f"{name}.png")
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"{name}.png"


def _pooled(cell: Cell, metric: str) -> Values:
    return np.asarray([value for records in cell.records for value in pooled(records, metric)])


def _of(cell: Cell, metric: str, statistic: Statistic) -> float:
    return statistic(_pooled(cell, metric))
