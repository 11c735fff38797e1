"""What ``vllm-pd up`` shows while the processes come up."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from vllm_pd.launcher.plan import DeploymentPlan

if TYPE_CHECKING:
    from rich.console import Console

_HEARTBEAT_S = 10.0


class Progress(ABC):
    """Shows how the processes come up; a context manager."""

    @abstractmethod
    def changed(self, name: str, status: str) -> None:
        """Show that a process has another status."""

    @abstractmethod
    def tick(self) -> None:
        """Show that time passes; called a few times a second."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class PlainProgress(Progress):
    """A line for every change and every ten seconds, for log files."""

    def __init__(
        self, plan: DeploymentPlan, out: IO[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out
        self._clock = clock
        self._started_at = self._beat_at = clock()
        self._labels = labels(plan)
        self._statuses = dict.fromkeys(self._labels, "starting")

    def __enter__(self) -> Self:
        for label in self._labels.values():
            self._write(f"{label}  starting")
        return self

    def changed(self, name: str, status: str) -> None:
        """Write one line."""
        if status != self._statuses[name]:
            self._statuses[name] = status
            self._write(f"{self._labels[name]}  {status} after {self._elapsed_s():.0f} s")

    def tick(self) -> None:
        """Write a line for what is still starting, now and then."""
        if self._clock() - self._beat_at < _HEARTBEAT_S:
            return
        self._beat_at = self._clock()
        for name, status in self._statuses.items():
            if status == "starting":
                self._write(f"{self._labels[name]}  starting … {self._elapsed_s():.0f} s")

    def _elapsed_s(self) -> float:
        return self._clock() - self._started_at

    def _write(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


class LiveProgress(Progress):
    """A table that is redrawn in place, for terminals."""

    def __init__(self, plan: DeploymentPlan, console: Console) -> None:
        self._labels = labels(plan)
        self._started_at = time.monotonic()
        self._ended: dict[str, tuple[str, float]] = {}
        self._live = Live(
            console=console, get_renderable=self._table, refresh_per_second=8, transient=False
        )

    def changed(self, name: str, status: str) -> None:
        """Redraw the table."""
        if status == "starting":
            self._ended.pop(name, None)
        else:
            self._ended[name] = (status, time.monotonic() - self._started_at)

    def tick(self) -> None:
        """Do nothing: the table redraws itself."""

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, label in self._labels.items():
            if ended := self._ended.get(name):
                status, after_s = ended
                style = "green" if status == "ready" else "red"
                table.add_row(label, f"[{style}]{status}[/{style}] after {after_s:.0f} s")
            else:
                elapsed_s = time.monotonic() - self._started_at
                table.add_row(label, Spinner("dots", f"starting … {elapsed_s:.0f} s"))
        return table


def labels(plan: DeploymentPlan) -> Mapping[str, str]:
    """Return the beginning of each process's line: name, port and devices, aligned."""
    width = max(len(spec.name) for spec in plan.processes)
    texts = {}
    for spec in plan.processes:
        port = spec.url.rpartition(":")[2]
        texts[spec.name] = f"{spec.name:{width}}  port {port}  {spec.devices}".rstrip()
    width = max(map(len, texts.values()))
    return {name: f"{text:{width}}" for name, text in texts.items()}
