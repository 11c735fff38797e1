"""Deployments of stand-ins: real processes, real signals, no vLLM."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.ports import free_ports
from tests.unit.launcher import stand_in
from vllm_pd.launcher.launch import launch
from vllm_pd.launcher.plan import ROUTER, DeploymentPlan, ProcessSpec, Timing
from vllm_pd.launcher.process import ProcessIdentity
from vllm_pd.launcher.progress import Progress
from vllm_pd.launcher.run_dir import RunDir
from vllm_pd.launcher.state import ProcessRecord, State, load_state

FAST = Timing(
    start_timeout_s=20.0,
    drain_timeout_s=10.0,
    teardown_s=0.1,
    max_restarts=2,
    first_delay_s=0.01,
    max_delay_s=0.02,
    group_grace_s=0.1,
    probe_interval_s=0.02,
)
WAIT_S = 20.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    (port,) = free_ports(1)
    return port


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll another process's doings; fail with a sentence."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


class Recorder(Progress):
    """Remembers what ``up`` would have shown."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []
        self.on_tick: Callable[[], None] = lambda: None

    def changed(self, name: str, status: str) -> None:
        self.changes.append((name, status))

    def tick(self) -> None:
        self.on_tick()


class Bench:
    """One run folder with a deployment of stand-ins."""

    def __init__(self, path: Path) -> None:
        self.run_dir = RunDir(path)
        self.run_dir.make()
        self.progress = Recorder()
        self.said: list[str] = []
        self.supervisors: list[subprocess.Popen[bytes]] = []

    def spec(self, name: str, *options: str) -> ProcessSpec:
        """Return a stand-in; its role is the beginning of its name."""
        url = f"http://127.0.0.1:{free_port()}"
        port = url.rpartition(":")[2]
        return ProcessSpec(
            name=name,
            role=name.partition("-")[0],
            argv=(sys.executable, "-S", stand_in.__file__, port, *options),
            url=url,
            ready_url=f"{url}/health",
        )

    def plan(self, *specs: ProcessSpec, timing: Timing = FAST) -> DeploymentPlan:
        """Return a deployment of ``specs`` and, unless it is among them, a router."""
        router = next((s for s in specs if s.role == ROUTER), None)
        if router is None:
            router = self.spec(ROUTER)
            specs = (*specs, router)
        return DeploymentPlan(
            model="m",
            served_model_name="m",
            device="cpu",
            router_url=router.url,
            ready_url=f"{router.url}/ready",
            processes=specs,
            timing=timing,
        )

    def launch(self, plan: DeploymentPlan) -> None:
        """Start a deployment as ``vllm-pd up`` does."""
        with self.run_dir.locked() as lock_fd:
            supervisor = launch(
                plan,
                self.run_dir,
                lock_fd=lock_fd,
                progress=self.progress,
                say=self.said.append,
            )
        self.supervisors.append(supervisor)

    def state(self) -> State:
        """Return the recorded state, which must exist."""
        state = load_state(self.run_dir.state_path)
        assert state is not None
        return state

    def record(self, name: str) -> ProcessRecord:
        """Return what is recorded about one process."""
        return next(r for r in self.state().processes if r.name == name)

    def identity(self, name: str) -> ProcessIdentity:
        """Return the running process of that name."""
        identity = self.record(name).identity
        assert identity is not None
        return identity


def pid_is_alive(pid: int) -> bool:
    """Whether there is such a process, zombies not counted."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return False
    return fields[0] != "Z"
