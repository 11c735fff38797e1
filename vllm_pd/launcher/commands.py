"""What ``vllm-pd up|down|status|logs`` do. The CLI parses and calls these."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_pd.config import Topology
from vllm_pd.errors import ConfigError, LaunchError
from vllm_pd.launcher.devices import check_engine, find_machine
from vllm_pd.launcher.launch import launch
from vllm_pd.launcher.logs import LogFollower, last_lines
from vllm_pd.launcher.model import DEMO_MODEL_NAME, check_model, is_quantized
from vllm_pd.launcher.plan import DeploymentPlan
from vllm_pd.launcher.planning import Model, make_plan, wanted_ports
from vllm_pd.launcher.ports import check_ports
from vllm_pd.launcher.process import is_alive
from vllm_pd.launcher.progress import LiveProgress, PlainProgress, Progress
from vllm_pd.launcher.run_dir import RunDir
from vllm_pd.launcher.state import load_state
from vllm_pd.launcher.status import deployment_status, print_status
from vllm_pd.launcher.stop import remains, stop_by_logs, stop_deployment

if TYPE_CHECKING:
    from rich.console import Console

_FORCE_TIMEOUT_S = 60.0
_FOLLOW_S = 0.25


@dataclass(frozen=True)
class Makers:
    """How to make what ``up`` needs once; from layers that the launcher does not know."""

    demo_model: Callable[[Path], None]
    cluster_key: Callable[[Path], None]


def up(topology: Topology, run_dir: RunDir, makers: Makers, console: Console) -> None:
    """Start a deployment and return when it answers.

    Everything that can be checked is checked before anything is started.

    Raises:
        ConfigError: the topology does not fit this machine.
        LaunchError: already up, or it did not come up; nothing is left running.
    """
    say = _sayer(console)
    run_dir.make()
    with run_dir.locked() as lock_fd:
        clear_stale_state(run_dir, say)
        plan = prepare(topology, run_dir, makers, say)
        launch(plan, run_dir, lock_fd=lock_fd, progress=_progress(plan, console), say=say)
    say(_how_to_use(plan, run_dir))


def prepare(
    topology: Topology, run_dir: RunDir, makers: Makers, say: Callable[[str], None]
) -> DeploymentPlan:
    """Check everything, then make the demo model and the key where they are missing.

    Raises:
        ConfigError: the topology does not fit this machine.
    """
    connector = topology.connector
    host = None if connector.is_loopback else connector.side_channel_host
    machine = find_machine(topology.device, os.environ, host=host)
    if topology.model is None:
        path, name = str(run_dir.demo_model_path), DEMO_MODEL_NAME
        quantized: bool | None = False  # it is made later
    else:
        path, name = check_model(topology.model), topology.model
        quantized = is_quantized(path)
    key_path = topology.connector.cluster_key_file
    if key_path is not None and not Path(key_path).is_file():
        raise ConfigError(
            f"cluster key {key_path} does not exist", hint=f"vllm-pd keygen {key_path} makes one"
        )
    plan, warnings = make_plan(
        topology,
        machine,
        model=Model(path, topology.served_model_name or name, quantized),
        cluster_key_file=run_dir.key_path,
        environ=os.environ,
    )
    check_engine(machine.device)
    check_transports(topology.connector.transport_names)
    if machine.device == "npu" and topology.connector.transport == "auto":
        warnings += missing_hccl()
    check_ports(wanted_ports(topology, plan))
    for warning in warnings:
        say(f"warning: {warning}")
    if topology.model is None:
        makers.demo_model(run_dir.demo_model_path)
    if not run_dir.key_path.exists():
        makers.cluster_key(run_dir.key_path)
    return plan


def missing_hccl() -> list[str]:
    """Return a warning where NPUs have to send their KV cache through host memory."""
    if metadata.entry_points(group="vllm_pd.transports", name="hccl"):
        return []
    return [
        "the hccl transport is not installed: KV cache goes through host memory; "
        "pip install --no-deps ./ascend-vllm-plugin"
    ]


def check_transports(names: Sequence[str] | None) -> None:
    """Check the names of transports without loading them; None: all are fine.

    Raises:
        ConfigError: no such transport is installed.
    """
    known = sorted(metadata.entry_points(group="vllm_pd.transports").names)
    for name in names or ():
        if name not in known:
            if name == "hccl":
                raise ConfigError(
                    "the hccl transport is not installed",
                    hint="pip install --no-deps ./ascend-vllm-plugin, or use transport auto or tcp",
                )
            raise ConfigError(
                f"unknown transport {name!r}", hint=f"use auto or one of {', '.join(known)}"
            )


def clear_stale_state(run_dir: RunDir, say: Callable[[str], None]) -> None:
    """Remove the state file of a deployment of which nothing runs any more.

    Raises:
        LaunchError: something of it still runs, or the file is corrupt.
    """
    state = load_state(run_dir.state_path)
    if state is None:
        return
    if is_alive(state.supervisor) or any(remains(r, run_dir) for r in state.processes):
        raise LaunchError(
            f"processes of an earlier start still run in {run_dir.path}",
            hint=f"{run_dir.command('down')} stops them",
        )
    say("removing the state of an earlier start that ended without clean-up")
    run_dir.state_path.unlink()


def down(run_dir: RunDir, console: Console, *, force: bool) -> None:
    """Stop what ``up`` started; idempotent.

    Args:
        run_dir: the deployment.
        console: where to say what happens.
        force: with a state file that is missing or cannot be read, stop the
            processes that write to this deployment's logs, and remove the file.

    Raises:
        LaunchError: the state file is corrupt, or a process cannot be stopped.
    """
    say = _sayer(console)
    try:
        state = load_state(run_dir.state_path)
    except LaunchError:
        if not force:
            raise
        stopped = stop_by_logs(run_dir, _FORCE_TIMEOUT_S)
        say(f"stopped {', '.join(stopped)}" if stopped else "no process of it was found")
        run_dir.state_path.unlink(missing_ok=True)
        return
    if state is None and run_dir.is_locked():
        if not force:
            raise LaunchError(
                f"a start is under way in {run_dir.path}, or its state file is gone",
                hint=f"try again in a moment, or {run_dir.command('down')} --force",
            )
        stopped = stop_by_logs(run_dir, _FORCE_TIMEOUT_S)
        say(f"stopped {', '.join(stopped)}" if stopped else "no process of it was found")
        return
    if state is None:
        say("nothing is running")
        return
    stop_deployment(run_dir, state, say)
    say("stopped")


def status(run_dir: RunDir, console: Console, *, as_json: bool) -> int:
    """Print what runs; return the exit code of ``vllm-pd status``.

    Raises:
        LaunchError: the state file is corrupt.
    """
    current = deployment_status(load_state(run_dir.state_path), run_dir=str(run_dir.path))
    if as_json:
        text = msgspec.json.format(msgspec.json.encode(current), indent=2).decode()
        console.out(text, highlight=False)
    else:
        print_status(current, console, down_command=run_dir.command("down"))
    return current.exit_code


def logs(
    run_dir: RunDir, name: str | None, console: Console, *, num_lines: int, following: bool
) -> None:
    """Print the last lines of one log or of all, and those that follow.

    Raises:
        ConfigError: there is no such log.
    """
    paths = sorted(run_dir.logs_path.glob("*.log"))
    if name is not None:
        known = ", ".join(path.stem for path in paths) or "none yet"
        paths = [path for path in paths if path.stem == name]
        if not paths:
            raise ConfigError(f"no log of {name!r} in {run_dir.logs_path}", hint=f"known: {known}")
    elif not paths:
        raise ConfigError(f"no logs in {run_dir.logs_path}")
    several = len(paths) > 1
    for path in paths:
        if several:
            console.out(f"==> {path} <==", highlight=False)
        for line in last_lines(path, num_lines):
            console.out(line, highlight=False)
    follower = LogFollower(paths)
    while following:
        for source, line in follower.new_lines():
            console.out(f"{source}: {line}" if several else line, highlight=False)
        time.sleep(_FOLLOW_S)


def _progress(plan: DeploymentPlan, console: Console) -> Progress:
    if console.is_terminal:
        return LiveProgress(plan, console)
    return PlainProgress(plan, console.file)


def _sayer(console: Console) -> Callable[[str], None]:
    def say(text: str) -> None:
        console.out(text, highlight=False)

    return say


def _how_to_use(plan: DeploymentPlan, run_dir: RunDir) -> str:
    """Say where the service is, how to try it and how to stop it."""
    body = {
        "model": plan.served_model_name,
        "messages": [{"role": "user", "content": "What is a prefill instance?"}],
        "max_tokens": 64,
    }
    lines = [
        "",
        f"serving {plan.served_model_name} at {plan.router_url} (OpenAI API)",
        *(f"  {spec.name} at {spec.url}" for spec in plan.processes),
        f"logs in {run_dir.logs_path}",
        "",
        "try:",
        f"  curl {plan.router_url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d {shlex.quote(json.dumps(body))}",
        "",
        f"state: {run_dir.command('status')}",
        f"stop:  {run_dir.command('down')}",
    ]
    return "\n".join(lines)
