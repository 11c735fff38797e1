"""Killing and pausing what the state file names."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.unit.launcher.bench import wait_until
from vllm_pd.errors import ConfigError, LaunchError
from vllm_pd.launcher import faults
from vllm_pd.launcher.process import ProcessIdentity, identify, is_alive
from vllm_pd.launcher.run_dir import RunDir
from vllm_pd.launcher.state import ProcessRecord, State, save_state

FAMILY = (
    "import signal, subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import signal; signal.pause()'])\n"
    "print(child.pid, flush=True)\n"
    "signal.pause()\n"
)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.make()
    return run_dir


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(out: io.StringIO) -> Console:
    return Console(file=out, soft_wrap=True)


@pytest.fixture
def leader(run_dir: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours with one child, both in one group."""
    with run_dir.log_path("decode-0").open("wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-S", "-c", FAMILY], stdout=log, stderr=log, process_group=0
        )
    wait_until(lambda: bool(run_dir.log_path("decode-0").read_text()), "the child runs")
    save(run_dir, identify(popen.pid))
    yield popen
    os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


@pytest.fixture
def child(leader: subprocess.Popen[bytes], run_dir: RunDir) -> ProcessIdentity:
    wait_until(lambda: is_alive(identify(leader.pid)), "the leader runs")
    return identify(int(run_dir.log_path("decode-0").read_text()))


def save(run_dir: RunDir, identity: ProcessIdentity | None) -> None:
    record = ProcessRecord(
        name="decode-0",
        role="decode",
        url="http://127.0.0.1:1",
        log_path=str(run_dir.log_path("decode-0")),
        status="restarting" if identity is None else "ready",
        identity=identity,
    )
    state = State(
        model="m",
        served_model_name="m",
        device="cpu",
        router_url="http://127.0.0.1:2",
        stop_timeout_s=10.0,
        supervisor=identify(os.getpid()),
        processes=(record,),
    )
    save_state(run_dir.state_path, state)


def state_of(pid: int) -> str:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]


def test_a_kill_takes_the_children_along(
    run_dir: RunDir,
    leader: subprocess.Popen[bytes],
    child: ProcessIdentity,
    console: Console,
    out: io.StringIO,
) -> None:
    faults.kill(run_dir, "decode-0", console)
    assert not is_alive(child)
    assert state_of(leader.pid) == "Z"
    assert out.getvalue() == f"killed decode-0 (pid {leader.pid})\n"


def test_a_pause_stops_all_and_lets_all_go_on(
    run_dir: RunDir, leader: subprocess.Popen[bytes], child: ProcessIdentity, console: Console
) -> None:
    pids = leader.pid, child.pid
    stopped = threading.Event()

    def watch() -> None:
        wait_until(lambda: all(state_of(pid) == "T" for pid in pids), "all are stopped")
        stopped.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    faults.pause(run_dir, "decode-0", 0.5, console)
    watcher.join()
    assert stopped.is_set()
    wait_until(lambda: all(state_of(pid) == "S" for pid in pids), "all go on")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_pause_leaves_nothing_stopped(
    run_dir: RunDir,
    leader: subprocess.Popen[bytes],
    child: ProcessIdentity,
    number: signal.Signals,
) -> None:
    command = [sys.executable, "-m", "vllm_pd.cli", "fault", "pause", "decode-0"]
    command += ["--seconds", "60", "--run-dir", str(run_dir.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as pausing:
        wait_until(lambda: state_of(child.pid) == state_of(leader.pid) == "T", "all are stopped")
        pausing.send_signal(number)
        pausing.communicate(timeout=20)
    assert pausing.returncode == 130
    wait_until(lambda: state_of(child.pid) == state_of(leader.pid) == "S", "all go on")


def test_what_stayed_stopped_can_be_resumed(
    run_dir: RunDir, leader: subprocess.Popen[bytes], console: Console
) -> None:
    leader.send_signal(signal.SIGSTOP)
    wait_until(lambda: state_of(leader.pid) == "T", "it is stopped")
    faults.resume(run_dir, "decode-0", console)
    wait_until(lambda: state_of(leader.pid) == "S", "it goes on")


def test_an_unknown_name_is_refused_with_the_known_ones(run_dir: RunDir, console: Console) -> None:
    save(run_dir, None)
    with pytest.raises(ConfigError, match=r"no process 'decode-7'.*known: decode-0"):
        faults.kill(run_dir, "decode-7", console)


def test_without_a_deployment_nothing_is_running(run_dir: RunDir, console: Console) -> None:
    with pytest.raises(LaunchError, match="nothing is running"):
        faults.kill(run_dir, "decode-0", console)


def test_a_process_between_two_starts_does_not_run(run_dir: RunDir, console: Console) -> None:
    save(run_dir, None)
    with pytest.raises(LaunchError, match="decode-0 does not run"):
        faults.kill(run_dir, "decode-0", console)


def test_a_process_that_reuses_a_recorded_number_is_left_alone(
    run_dir: RunDir, leader: subprocess.Popen[bytes], child: ProcessIdentity, console: Console
) -> None:
    identity = identify(leader.pid)
    save(run_dir, msgspec.structs.replace(identity, start_ticks=identity.start_ticks - 1))
    with pytest.raises(LaunchError, match="does not run"):
        faults.kill(run_dir, "decode-0", console)
    assert is_alive(identity)
    assert is_alive(child)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_pause_needs_a_duration(run_dir: RunDir, console: Console, seconds: float) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="cannot pause for"):
        faults.pause(run_dir, "decode-0", seconds, console)
    assert time.monotonic() - started < 10
