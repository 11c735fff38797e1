"""What the supervisor is told to run: plain data, passed to it as JSON."""

from __future__ import annotations

import msgspec

ROUTER = "router"
STOP_ORDER = (ROUTER, "prefill", "decode")
"""Roles in the order they are stopped: requests first, then who serves them.

A prefill instance ends when its KV cache has been fetched, so decode is there until then.
"""


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process to run.

    Attributes:
        name: unique in the deployment; also the name of its log file.
        role: ``router``, ``prefill`` or ``decode``.
        argv: command line.
        env: variables added to the supervisor's environment.
        url: address that the process serves.
        ready_url: answers 200 once the process can be used.
        devices: the devices or cores given to it, for people.
    """

    name: str
    role: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    url: str
    ready_url: str
    devices: str = ""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long the supervisor waits.

    Attributes:
        start_timeout_s: longest wait for a process to become ready.
        drain_timeout_s: longest time for a process to finish what it has begun, once told
            to stop.
        teardown_s: longest wait, after that, for it to give its resources back and end.
        max_restarts: restarts in a row before a process is given up.
        first_delay_s: pause before the first restart; doubled for each further one.
        max_delay_s: longest pause before a restart.
        healthy_after_s: a process that was ready for so long starts a new row of restarts.
        group_grace_s: longest wait for the children of an ended process.
        probe_interval_s: pause between two questions whether a process is ready.
    """

    start_timeout_s: float = 600.0
    drain_timeout_s: float = 40.0
    teardown_s: float = 15.0
    max_restarts: int = 5
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0
    healthy_after_s: float = 60.0
    group_grace_s: float = 5.0
    probe_interval_s: float = 0.25

    @property
    def stop_timeout_s(self) -> float:
        """Longest wait for a process to stop by itself; then it is killed."""
        return self.drain_timeout_s + self.teardown_s


class DeploymentPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one supervisor runs.

    Attributes:
        model: checkpoint folder or Hugging Face name.
        served_model_name: name at the API.
        device: ``cpu``, ``cuda`` or ``npu``.
        router_url: address for clients.
        ready_url: answers 200 once a request can be served.
        processes: the processes, all started at the same time.
        timing: how long to wait for what.
    """

    model: str
    served_model_name: str
    device: str
    router_url: str
    ready_url: str
    processes: tuple[ProcessSpec, ...]
    timing: Timing = Timing()
