from __future__ import annotations

import io
import os

import msgspec
import pytest
from rich.console import Console

from vllm_pd.launcher.process import identify
from vllm_pd.launcher.state import ProcessRecord, State
from vllm_pd.launcher.status import deployment_status, format_duration, print_status

ME = identify(os.getpid())
GONE = msgspec.structs.replace(ME, boot_id="an earlier boot")
READY = ProcessRecord(
    name="prefill-0",
    role="prefill",
    url="http://127.0.0.1:8100",
    log_path="/logs/prefill-0.log",
    devices="CPU core 0",
    status="ready",
    identity=ME,
)
STATE = State(
    phase="up",
    model="m",
    served_model_name="m",
    device="cpu",
    router_url="http://127.0.0.1:8000",
    stop_timeout_s=1.0,
    supervisor=ME,
    processes=(READY,),
)


def with_record(**changes: object) -> State:
    record = msgspec.structs.replace(READY, **changes)
    return msgspec.structs.replace(STATE, processes=(record,))


def text_of(state: State | None) -> str:
    out = io.StringIO()
    status = deployment_status(state, run_dir="/run")
    print_status(status, Console(file=out), down_command="vllm-pd down")
    return out.getvalue()


def test_all_ready_is_exit_code_0() -> None:
    assert deployment_status(STATE, run_dir="/run").exit_code == 0


@pytest.mark.parametrize("status", ["starting", "restarting", "failed"])
def test_anything_not_ready_is_exit_code_1(status: str) -> None:
    assert deployment_status(with_record(status=status), run_dir="/run").exit_code == 1


def test_nothing_running_is_exit_code_3() -> None:
    assert deployment_status(None, run_dir="/run").exit_code == 3
    assert text_of(None) == "nothing is running\n"


def test_a_state_file_of_an_earlier_boot_means_nothing_runs() -> None:
    state = msgspec.structs.replace(with_record(identity=GONE), supervisor=GONE)
    assert deployment_status(state, run_dir="/run").exit_code == 3


def test_a_process_that_ended_unnoticed_is_dead() -> None:
    (process,) = deployment_status(with_record(identity=GONE), run_dir="/run").processes
    assert (process.state, process.pid, process.uptime_s) == ("dead", None, None)


def test_a_lost_supervisor_is_reported() -> None:
    state = msgspec.structs.replace(STATE, supervisor=GONE)
    assert deployment_status(state, run_dir="/run").exit_code == 1
    assert "supervisor is gone" in text_of(state)


def test_the_table_shows_whole_addresses_without_a_terminal() -> None:
    text = text_of(with_record(url="http://127.0.0.1:8100/" + "x" * 80, num_restarts=3))
    assert "x" * 80 in text
    assert "RESTARTS" in text
    assert str(os.getpid()) in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (5.9, "5s"), (65, "1m 5s"), (3660, "1h 1m"), (90000, "1d 1h")],
)
def test_durations_show_two_units(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text
