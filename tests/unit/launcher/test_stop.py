"""Stopping without a supervisor: recorded processes, and those known by their logs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vllm_pd.launcher.process import ProcessIdentity, identify, is_alive
from vllm_pd.launcher.run_dir import RunDir
from vllm_pd.launcher.state import ProcessRecord, State, save_state
from vllm_pd.launcher.stop import remains, stop_by_logs, stop_deployment, stop_recorded

SLEEPER = [sys.executable, "-S", "-c", "import signal; signal.pause()"]


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.make()
    return run_dir


@pytest.fixture
def process(run_dir: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours: leader of its group, output in its log."""
    with run_dir.log_path("prefill-0").open("wb") as log:
        popen = subprocess.Popen(SLEEPER, stdout=log, stderr=log, start_new_session=True)
    yield popen
    popen.kill()
    popen.wait()


def save(run_dir: RunDir, identity: ProcessIdentity) -> State:
    gone = msgspec.structs.replace(identity, boot_id="an earlier boot")
    record = ProcessRecord(
        name="prefill-0",
        role="prefill",
        url="http://127.0.0.1:1",
        log_path=str(run_dir.log_path("prefill-0")),
        identity=identity,
    )
    state = State(
        model="m",
        served_model_name="m",
        device="cpu",
        router_url="http://127.0.0.1:2",
        stop_timeout_s=10.0,
        supervisor=gone,
        processes=(record,),
    )
    save_state(run_dir.state_path, state)
    return state


def test_a_recorded_process_is_stopped(run_dir: RunDir, process: subprocess.Popen[bytes]) -> None:
    said: list[str] = []
    state = save(run_dir, identify(process.pid))
    stop_deployment(run_dir, state, said.append)
    assert process.wait() == -signal.SIGTERM
    assert said == ["the supervisor is gone: stopping what it left running", "stopping prefill-0"]
    assert not run_dir.state_path.exists()


def test_a_process_that_reuses_a_recorded_number_is_left_alone(
    run_dir: RunDir, process: subprocess.Popen[bytes]
) -> None:
    identity = identify(process.pid)
    save(run_dir, msgspec.structs.replace(identity, start_ticks=identity.start_ticks - 1))
    stop_recorded(run_dir)
    assert is_alive(identity)
    assert not run_dir.state_path.exists()


def test_without_a_state_file_nothing_is_stopped(
    run_dir: RunDir, process: subprocess.Popen[bytes]
) -> None:
    stop_recorded(run_dir)
    assert process.poll() is None


def test_a_process_remains_until_it_is_gone(
    run_dir: RunDir, process: subprocess.Popen[bytes]
) -> None:
    (record,) = save(run_dir, identify(process.pid)).processes
    assert remains(record, run_dir)
    process.kill()
    process.wait()
    assert not remains(record, run_dir)


def test_processes_are_found_by_their_logs(
    run_dir: RunDir, process: subprocess.Popen[bytes]
) -> None:
    assert stop_by_logs(run_dir, timeout_s=10.0) == [f"prefill-0 (pid {process.pid})"]
    assert process.wait() == -signal.SIGTERM
