"""What runs, as a person or a script wants to see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from rich.measure import Measurement
from rich.table import Table

from vllm_pd.launcher.plan import ROUTER
from vllm_pd.launcher.process import is_alive, uptime_s
from vllm_pd.launcher.state import ProcessRecord, State

if TYPE_CHECKING:
    from rich.console import Console

NOT_RUNNING = 3
_MAX_WIDTH = 500
_STYLES = {"ready": "green", "starting": "yellow", "restarting": "yellow"}


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process, as ``vllm-pd status --json`` prints it.

    Attributes:
        state: ``starting``, ``ready``, ``restarting``, ``failed``, ``stopping``, or
            ``dead``: it ended and nobody has noticed, as the supervisor is gone.
        uptime_s: since its last start; None: it does not run.
    """

    name: str
    role: str
    state: str
    url: str
    pid: int | None
    num_restarts: int
    uptime_s: float | None
    devices: str
    last_exit: str | None
    log_path: str


class DeploymentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole deployment, as ``vllm-pd status --json`` prints it."""

    run_dir: str
    running: bool
    supervised: bool = False
    phase: str | None = None
    model: str | None = None
    served_model_name: str | None = None
    device: str | None = None
    router_url: str | None = None
    processes: tuple[ProcessStatus, ...] = ()

    @property
    def exit_code(self) -> int:
        """0: everything is ready; 3: nothing runs; 1: anything between."""
        if not self.running:
            return NOT_RUNNING
        all_ready = all(process.state == "ready" for process in self.processes)
        return 0 if all_ready and self.supervised else 1


def deployment_status(state: State | None, *, run_dir: str) -> DeploymentStatus:
    """Compare what is recorded with what lives."""
    if state is None:
        return DeploymentStatus(run_dir=run_dir, running=False)
    processes = tuple(_process_status(record) for record in state.processes)
    supervised = is_alive(state.supervisor)
    return DeploymentStatus(
        run_dir=run_dir,
        running=supervised or any(process.pid for process in processes),
        supervised=supervised,
        phase=state.phase,
        model=state.model,
        served_model_name=state.served_model_name,
        device=state.device,
        router_url=state.router_url,
        processes=processes,
    )


def _process_status(record: ProcessRecord) -> ProcessStatus:
    alive = is_alive(record.identity)
    state = record.status
    if record.identity is not None and not alive:
        state = "dead"
    return ProcessStatus(
        name=record.name,
        role=record.role,
        state=state,
        url=record.url,
        pid=record.identity.pid if record.identity and alive else None,
        num_restarts=record.num_restarts,
        uptime_s=uptime_s(record.identity) if record.identity and alive else None,
        devices=record.devices,
        last_exit=record.last_exit,
        log_path=record.log_path,
    )


def print_status(status: DeploymentStatus, console: Console, *, down_command: str) -> None:
    """Show the status as a table."""
    if not status.running:
        console.print("nothing is running", highlight=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "ROLE", "STATE", "URL", "PID", "RESTARTS", "UPTIME", "DEVICES"):
        table.add_column(title, no_wrap=True)
    for process in sorted(status.processes, key=lambda p: p.role != ROUTER):
        style = _STYLES.get(process.state, "red")
        table.add_row(
            process.name,
            process.role,
            f"[{style}]{process.state}[/{style}]",
            process.url,
            str(process.pid or "-"),
            str(process.num_restarts),
            format_duration(process.uptime_s),
            process.devices or "-",
        )
    console.print(f"model {status.served_model_name} at {status.router_url}", highlight=False)
    width = Measurement.get(console, console.options.update(max_width=_MAX_WIDTH), table).maximum
    console.width = max(console.width, width)  # whole URLs, also where there is no terminal
    console.print(table)
    if not status.supervised:
        console.print(
            f"the supervisor is gone: nothing is restarted; {down_command} stops the rest",
            style="red",
        )


def format_duration(seconds: float | None) -> str:
    """Write a duration with its two largest units."""
    if seconds is None:
        return "-"
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest_s}s" if minutes else f"{rest_s}s"
