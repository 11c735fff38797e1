"""Tables, rows and the description of a run. Pure, but for what asks for versions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypedDict

from rich.table import Table

from benchmarks.service.figures import HANDSHAKE_LIMIT_MS, Limit, Quartiles, Stages
from benchmarks.service.rounds import STAGES, Measured
from benchmarks.transfer import report as transfer_report

WAYS = {"decode": "asked directly", "through": "through the router"}


class Row(TypedDict):
    """One figure and what is required of it.

    ``met`` is None where nothing is required: the peer is only compared with.
    """

    service: str
    figure: str
    prompt_tokens: int | None
    value: float
    unit: str
    limit: float | None
    met: bool | None


def make_rows(measured: Iterable[tuple[str, Measured]], *, ours: str) -> list[Row]:
    """Return every figure of the services; limits are those of ``ours``."""
    rows: list[Row] = []
    for service, found in measured:

        def add(
            figure: str, limit: Limit, length: int | None = None, service: str = service
        ) -> None:
            required = limit if service == ours else Limit(limit.value, None, limit.unit)
            rows.append(
                Row(
                    service=service,
                    figure=figure,
                    prompt_tokens=length,
                    value=round(required.value, 4),
                    unit=required.unit,
                    limit=required.limit,
                    met=required.is_met,
                )
            )

        for ttft in found.ttft:
            add("ttft_added", ttft.limit, ttft.prompt_len)
        for step in found.steps:
            add(f"decode_step_{step.way}", step.limit)
        if found.handshake_ms is not None:
            add("handshake", Limit(found.handshake_ms, HANDSHAKE_LIMIT_MS, "ms"))
        for usage in found.usage:
            name = f"{usage.instance}_{usage.idle.kind.replace(' ', '_')}"
            add(f"idle_cpu_{name}", usage.idle_limit)
            add(f"memory_{name}", usage.memory_limit)
    return rows


def tables(measured: Sequence[tuple[str, Measured]], *, ours: str) -> list[Table]:
    """Return all tables."""
    all_stages = [stages for _, found in measured for stages in found.stages]
    made = [_ttft_table(measured, ours), _step_table(measured, ours)]
    if all_stages:
        made.append(_stage_table(all_stages))
    return [*made, _usage_table(measured, ours)]


def extra(measured: Iterable[tuple[str, Measured]]) -> dict[str, Any]:
    """Return everything that was measured, as plain data."""
    return {service: asdict(found) for service, found in measured}


def describe_environment(peers: str) -> dict[str, str]:
    """Return what a figure is worth nothing without."""
    environment = transfer_report.describe_environment(peers)
    engine = {name: _version(name) for name in ("vllm", "torch")}
    return {**environment, **engine}


def verdict(limit: Limit) -> str:
    """Return what is required and whether it is met, for people."""
    if limit.limit is None:
        return ""
    return f"< {limit.limit:g} {limit.unit}: {'met' if limit.is_met else 'MISSED'}"


def _ttft_table(measured: Sequence[tuple[str, Measured]], ours: str) -> Table:
    table = _table(
        "Time to first token, ms: median (P25-P75)",
        ("service", "prompt", "through PD", "its prefill alone", "no connector"),
        ("added ms", "added %"),
        "required",
    )
    for service, found in measured:
        for ttft in found.ttft:
            table.add_row(
                service,
                str(ttft.prompt_len),
                _format(ttft.through),
                _format(ttft.alone),
                _format(ttft.plain),
                f"{ttft.added_ms:.1f}",
                f"{ttft.added_percent:.1f}",
                verdict(ttft.limit) if service == ours else "",
                end_section=ttft is found.ttft[-1],
            )
    return table


def _step_table(measured: Sequence[tuple[str, Measured]], ours: str) -> Table:
    table = _table(
        "Decode step of an idle decode instance, ms per token: median (P25-P75)",
        ("service", "decode instance"),
        ("step", "no connector", "ratio"),
        "required",
    )
    for service, found in measured:
        for step in found.steps:
            table.add_row(
                service,
                WAYS[step.way],
                _format(step.step),
                _format(step.plain),
                f"{step.ratio:.3f}",
                verdict(step.limit) if service == ours else "",
                end_section=step is found.steps[-1],
            )
    return table


def _stage_table(all_stages: Sequence[Stages]) -> Table:
    table = _table(
        "Stages of a request sent by hand, ms: medians. Fetch: handshake + queued + transfer",
        ("prompt",),
        ("MiB", "prefill leg", "decode leg", *STAGES, "GB/s"),
        "transport",
    )
    for found in all_stages:
        table.add_row(
            str(found.prompt_len),
            f"{found.num_bytes / 2**20:.1f}",
            f"{found.prefill_leg:.1f}",
            f"{found.decode_leg:.1f}",
            *(f"{found.stages[name]:.2f}" for name in STAGES),
            f"{found.gb_per_s:.1f}",
            found.transport,
        )
    return table


def _usage_table(measured: Sequence[tuple[str, Measured]], ours: str) -> Table:
    table = _table(
        "Idle CPU, % of a core, and resident memory beside the KV cache, MB",
        ("service", "process"),
        ("our threads", "all threads", "no connector"),
        "required",
        ("memory", "no connector", "added"),
        "required",
    )
    for service, found in measured:
        for usage in found.usage:
            table.add_row(
                service,
                f"{usage.instance} {usage.idle.kind}",
                f"{usage.idle.ours:.3f} ({usage.idle.num_ours})",
                f"{usage.idle.total:.2f}",
                f"{usage.plain_idle.total:.2f}",
                verdict(usage.idle_limit) if service == ours else "",
                f"{usage.memory_len / 1e6:.0f}",
                f"{usage.plain_memory_len / 1e6:.0f}",
                f"{usage.added_len / 1e6:+.1f}",
                verdict(usage.memory_limit) if service == ours else "",
                end_section=usage is found.usage[-1],
            )
    return table


def _table(title: str, left: Sequence[str], *columns: Sequence[str] | str) -> Table:
    """Return a table; a group of columns is right-aligned, a single one is not."""
    table = Table(title=title)
    for name in left:
        table.add_column(name)
    for column in columns:
        if isinstance(column, str):
            table.add_column(column)
        else:
            for name in column:
                table.add_column(name, justify="right")
    return table


def _format(found: Quartiles | None) -> str:
    if found is None:
        return ""
    digits = 1 if found.median >= 100 else 2
    return f"{found.median:.{digits}f} ({found.p25:.{digits}f}-{found.p75:.{digits}f})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
