"""The report format that all benchmarks share: JSON, and Markdown made of the same rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.service.report import describe_environment
from benchmarks.transfer.pair import BenchError

__all__ = ["Report", "Row", "check_writable", "describe_environment", "markdown_table", "number"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        labels: what it is of, e.g. ``{"deployment": "pd"}``.
        figure: what it is.
        value: its value.
        unit: of the value.
        low: lower bound of its 95 % interval; None: it has none.
        high: upper bound.
    """

    labels: Mapping[str, str]
    figure: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark found.

    Attributes:
        benchmark: the program.
        environment: machine, versions, commit, command: without them figures mean nothing.
        rows: the figures.
        notes: what must be known beside them.
        measured: all else, as plain data.
    """

    benchmark: str
    environment: Mapping[str, str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    measured: Any = None

    def write_json(self, path: Path) -> None:
        """Write everything.

        Raises:
            BenchError: the file cannot be written.
        """
        write(path, json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n")

    def markdown(self) -> str:
        """Return the environment, the rows and the notes as Markdown."""
        environment = [f"- {key}: {value}" for key, value in self.environment.items()]
        names = list(dict.fromkeys(name for row in self.rows for name in row.labels))
        header = [*names, "figure", "value", "95 % interval", "unit"]
        cells = [
            [
                *(row.labels.get(name, "") for name in names),
                row.figure,
                number(row.value),
                "" if row.low is None else f"{number(row.low)} to {number(row.high)}",
                row.unit,
            ]
            for row in self.rows
        ]
        notes = [f"- **{note}**" for note in self.notes]
        parts = [f"# {self.benchmark}", "\n".join(environment), "\n".join(notes)]
        return "\n\n".join(filter(None, [*parts, markdown_table(header, cells)])) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; what is in a cell may not break it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def number(value: float | None) -> str:
    """Return a number with about four digits, or "-" where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
    return f"{value:,.{digits}f}"


def check_writable(path: Path) -> None:
    """Check that a file can be written, before anything is measured.

    Raises:
        BenchError: it cannot.
    """
    target = path if path.exists() else path.absolute().parent
    if path.is_dir():
        raise BenchError(f"{path} is a folder")
    if not target.exists():
        raise BenchError(f"{path} cannot be written: there is no folder {target}")
    if not os.access(target, os.W_OK):
        raise BenchError(f"{path} cannot be written: no permission")


def write(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        BenchError: it cannot be written.
    """
    try:
        path.write_text(text)
    except OSError as exc:
        raise BenchError(f"cannot write {path}: {exc.strerror}") from exc


def _plain(value: Any) -> Any:
    """Return data that every JSON reader takes: no NaN, no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
