"""Life and death of deployments: real processes, started as ``vllm-pd up`` starts them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest

from tests.unit.launcher.bench import FAST, Bench, pid_is_alive, wait_until
from vllm_pd.errors import LaunchError
from vllm_pd.launcher.process import is_alive, send_signal
from vllm_pd.launcher.stop import stop_deployment

pytestmark = pytest.mark.slow


def silent(_text: str) -> None:
    pass


def down(bench: Bench) -> None:
    stop_deployment(bench.run_dir, bench.state(), silent)


def test_launch_returns_when_everything_is_ready(up: Bench) -> None:
    assert {record.status for record in up.state().processes} == {"ready"}
    assert up.state().phase == "up"
    assert ("prefill-0", "ready") in up.progress.changes


def test_down_stops_every_process_and_removes_the_state_file(up: Bench) -> None:
    state = up.state()
    down(up)
    assert not any(is_alive(record.identity) for record in state.processes)
    assert not is_alive(state.supervisor)
    assert not up.run_dir.state_path.exists()


def test_a_second_launch_in_the_same_folder_is_refused(up: Bench) -> None:
    with pytest.raises(LaunchError, match=r"already up in .*vllm-pd down"):
        up.launch(up.plan(up.spec("prefill-0")))


def test_processes_are_stopped_in_the_order_router_prefill_decode(
    bench: Bench, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    names = ("decode-0", "prefill-0", "router")
    bench.launch(bench.plan(*(bench.spec(n, "--note", str(notes), n) for n in names)))
    down(bench)
    assert notes.read_text().split() == ["router", "prefill-0", "decode-0"]


def test_a_death_while_starting_shows_its_log_and_leaves_nothing_behind(bench: Bench) -> None:
    plan = bench.plan(bench.spec("prefill-0"), bench.spec("decode-0", "--die-before-ready"))
    with pytest.raises(LaunchError, match=r"decode-0 ended while starting \(exit code 1\)"):
        bench.launch(plan)
    assert any("cannot allocate memory" in line for line in bench.said)
    assert ("decode-0", "failed") in bench.progress.changes
    assert not bench.run_dir.state_path.exists()
    pids = [int(word) for word in first_pids(bench)]
    assert not any(pid_is_alive(pid) for pid in pids)


def first_pids(bench: Bench) -> list[str]:
    """Return the pids that the stand-ins wrote to their logs."""
    logs = bench.run_dir.logs_path.glob("*-0.log")
    return [log.read_text().split()[1] for log in logs if log.read_text()]


def test_a_start_that_takes_too_long_fails(bench: Bench) -> None:
    timing = msgspec.structs.replace(FAST, start_timeout_s=0.5)
    plan = bench.plan(bench.spec("prefill-0", "--never-ready"), timing=timing)
    with pytest.raises(LaunchError, match=r"prefill-0 was not ready within 0.5 s"):
        bench.launch(plan)
    assert not bench.run_dir.state_path.exists()


def test_a_process_that_ignores_sigterm_is_killed(bench: Bench) -> None:
    timing = msgspec.structs.replace(FAST, drain_timeout_s=0.1)
    bench.launch(bench.plan(bench.spec("prefill-0", "--ignore-sigterm"), timing=timing))
    identity = bench.identity("prefill-0")
    down(bench)
    assert not is_alive(identity)


def test_children_that_outlive_their_parent_are_killed(bench: Bench, tmp_path: Path) -> None:
    child = tmp_path / "child"
    bench.launch(bench.plan(bench.spec("prefill-0", "--child", str(child))))
    down(bench)
    assert not pid_is_alive(int(child.read_text()))


def test_a_killed_process_is_started_again(up: Bench) -> None:
    before = up.identity("prefill-0")
    decode = up.identity("decode-0")
    send_signal(before, signal.SIGKILL)
    wait_until(lambda: up.record("prefill-0").num_restarts == 1, "it restarts")
    wait_until(lambda: up.record("prefill-0").status == "ready", "it is ready")
    assert up.identity("prefill-0") != before
    assert up.record("prefill-0").last_exit == "killed by SIGKILL"
    assert up.identity("decode-0") == decode


def test_children_of_a_killed_process_are_gone_before_its_restart(
    bench: Bench, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    bench.launch(bench.plan(bench.spec("prefill-0", "--child", str(child))))
    first = int(child.read_text())
    send_signal(bench.identity("prefill-0"), signal.SIGKILL)
    wait_until(lambda: bench.record("prefill-0").num_restarts == 1, "it restarts")
    assert not pid_is_alive(first)


def test_a_process_that_keeps_dying_is_given_up_and_the_others_go_on(
    bench: Bench, tmp_path: Path
) -> None:
    bench.launch(bench.plan(bench.spec("prefill-0", "--die-again", str(tmp_path / "once"))))
    send_signal(bench.identity("prefill-0"), signal.SIGKILL)
    wait_until(lambda: bench.record("prefill-0").status == "failed", "it is given up")
    assert bench.record("prefill-0").num_restarts == FAST.max_restarts
    assert is_alive(bench.identity("router"))
    supervisor_log = bench.run_dir.log_path("supervisor").read_text()
    assert "cannot allocate memory" in supervisor_log


def test_down_cleans_up_after_a_killed_supervisor(bench: Bench, tmp_path: Path) -> None:
    child = tmp_path / "child"
    bench.launch(bench.plan(bench.spec("prefill-0", "--child", str(child)), bench.spec("decode-0")))
    state = bench.state()
    send_signal(state.supervisor, signal.SIGKILL)
    wait_until(lambda: not is_alive(state.supervisor), "the supervisor is dead")
    assert is_alive(bench.identity("prefill-0"))
    down(bench)
    assert not any(is_alive(record.identity) for record in state.processes)
    assert not pid_is_alive(int(child.read_text()))
    assert not bench.run_dir.state_path.exists()


def test_down_finds_children_whose_parent_died_after_the_supervisor(
    bench: Bench, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    bench.launch(bench.plan(bench.spec("prefill-0", "--child", str(child))))
    state = bench.state()
    for identity in (state.supervisor, bench.identity("prefill-0")):
        send_signal(identity, signal.SIGKILL)
    wait_until(lambda: not is_alive(bench.identity("prefill-0")), "the parent is dead")
    assert pid_is_alive(int(child.read_text()))
    down(bench)
    assert not pid_is_alive(int(child.read_text()))


def test_an_interrupted_launch_stops_everything(bench: Bench, tmp_path: Path) -> None:
    started = tmp_path / "child"
    spec = bench.spec("prefill-0", "--never-ready", "--child", str(started))
    plan = bench.plan(spec)

    def interrupt_once_started() -> None:
        if started.exists() and started.read_text():
            os.kill(os.getpid(), signal.SIGTERM)

    bench.progress.on_tick = interrupt_once_started
    with pytest.raises(LaunchError, match="interrupted; everything was stopped"):
        bench.launch(plan)
    assert not pid_is_alive(int(started.read_text()))
    assert not bench.run_dir.state_path.exists()
