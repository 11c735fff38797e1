from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.unit.launcher.bench import Bench, free_port
from vllm_pd.config import ConnectorConfig, InstanceGroup, RouterConfig, Topology
from vllm_pd.errors import ConfigError, LaunchError
from vllm_pd.launcher import commands
from vllm_pd.launcher.commands import Makers
from vllm_pd.launcher.process import is_alive, send_signal, wait_gone
from vllm_pd.launcher.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.make()
    return run_dir


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(out: io.StringIO) -> Console:
    return Console(file=out, soft_wrap=True)


@pytest.fixture
def made() -> list[Path]:
    return []


@pytest.fixture
def makers(made: list[Path]) -> Makers:
    return Makers(demo_model=made.append, cluster_key=made.append)


@pytest.fixture
def topology() -> Topology:
    """A topology on ports that are free, so that nothing else is the error."""
    return Topology(
        device="cpu",
        prefill=InstanceGroup(port=free_port()),
        decode=InstanceGroup(port=free_port()),
        router=RouterConfig(port=free_port()),
    )


@pytest.fixture(autouse=True)
def engine_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "check_engine", lambda _device: None)


def changed(topology: Topology, **changes: object) -> Topology:
    return msgspec.structs.replace(topology, **changes)


def silent(_text: str) -> None:
    pass


def test_demo_model_and_key_are_made_on_first_use(
    topology: Topology, run_dir: RunDir, makers: Makers, made: list[Path]
) -> None:
    plan = commands.prepare(topology, run_dir, makers, silent)
    assert made == [run_dir.demo_model_path, run_dir.key_path]
    assert plan.model == str(run_dir.demo_model_path)
    assert plan.served_model_name == "demo-model"


def test_an_existing_key_is_kept(
    topology: Topology, run_dir: RunDir, makers: Makers, made: list[Path]
) -> None:
    run_dir.key_path.touch()
    commands.prepare(topology, run_dir, makers, silent)
    assert made == [run_dir.demo_model_path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: changed(t, model="/no/such"), "model folder /no/such does not exist"),
        (lambda t: changed(t, decode=InstanceGroup(tp=9999)), "TP 9999 needs as many CPU cores"),
        (lambda t: changed(t, connector=ConnectorConfig(transport="pigeon")), "'pigeon'.*shm, tcp"),
        (
            lambda t: changed(t, connector=ConnectorConfig(cluster_key_file="/no/key")),
            "cluster key /no/key does not exist",
        ),
        (lambda t: changed(t, router=RouterConfig(port=t.decode.port)), "is wanted by"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    topology: Topology,
    run_dir: RunDir,
    makers: Makers,
    made: list[Path],
    change: Callable[[Topology], Topology],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        commands.prepare(change(topology), run_dir, makers, silent)
    assert made == []


def test_warnings_are_shown(topology: Topology, run_dir: RunDir, makers: Makers) -> None:
    said: list[str] = []
    group = InstanceGroup(port=free_port(), devices=(0,))
    shared = changed(topology, prefill=group, decode=InstanceGroup(devices=(0,), port=free_port()))
    commands.prepare(shared, run_dir, makers, said.append)
    assert said[0].startswith("warning: prefill and decode name the same devices")


def test_up_refuses_a_corrupt_state_file(
    topology: Topology, run_dir: RunDir, makers: Makers, console: Console
) -> None:
    run_dir.state_path.write_text("{")
    with pytest.raises(LaunchError, match="is corrupt"):
        commands.up(topology, run_dir, makers, console)
    assert run_dir.state_path.read_text() == "{"


def test_down_refuses_a_corrupt_state_file(run_dir: RunDir, console: Console) -> None:
    run_dir.state_path.write_text("{")
    with pytest.raises(LaunchError, match="is corrupt"):
        commands.down(run_dir, console, force=False)


def test_forced_down_removes_a_corrupt_state_file(
    run_dir: RunDir, console: Console, out: io.StringIO
) -> None:
    run_dir.state_path.write_text("{")
    commands.down(run_dir, console, force=True)
    assert not run_dir.state_path.exists()
    assert "no process of it was found" in out.getvalue()


def test_down_during_a_start_says_so(run_dir: RunDir, console: Console) -> None:
    run_dir.make()
    with run_dir.locked(), pytest.raises(LaunchError, match="a start is under way"):
        commands.down(run_dir, console, force=False)


def test_down_without_a_deployment_is_harmless(
    run_dir: RunDir, console: Console, out: io.StringIO
) -> None:
    commands.down(run_dir, console, force=False)
    assert out.getvalue() == "nothing is running\n"


def test_one_log_is_shown_as_it_is(run_dir: RunDir, console: Console, out: io.StringIO) -> None:
    run_dir.log_path("router").write_text("a\nb [bold] :smile:\n")
    commands.logs(run_dir, "router", console, num_lines=1, following=False)
    assert out.getvalue() == "b [bold] :smile:\n"


def test_all_logs_are_shown_with_their_names(
    run_dir: RunDir, console: Console, out: io.StringIO
) -> None:
    for name in ("router", "prefill-0"):
        run_dir.log_path(name).write_text(f"of {name}\n")
    commands.logs(run_dir, None, console, num_lines=5, following=False)
    assert out.getvalue().splitlines() == [
        f"==> {run_dir.log_path('prefill-0')} <==",
        "of prefill-0",
        f"==> {run_dir.log_path('router')} <==",
        "of router",
    ]


def test_an_unknown_log_is_refused_with_the_known_ones(run_dir: RunDir, console: Console) -> None:
    run_dir.log_path("router").touch()
    with pytest.raises(ConfigError, match=r"no log of 'rooter'.*known: router"):
        commands.logs(run_dir, "rooter", console, num_lines=5, following=False)


@pytest.mark.slow
def test_forced_down_stops_a_deployment_whose_state_file_was_destroyed(
    up: Bench, console: Console, out: io.StringIO
) -> None:
    state = up.state()
    up.run_dir.state_path.write_text("garbage")
    commands.down(up.run_dir, console, force=True)
    assert not is_alive(state.supervisor)
    assert not any(is_alive(record.identity) for record in state.processes)
    assert "stopped supervisor" in out.getvalue()


@pytest.mark.slow
def test_up_refuses_what_an_earlier_supervisor_left_running(up: Bench) -> None:
    supervisor = up.state().supervisor
    send_signal(supervisor, signal.SIGKILL)
    assert wait_gone(supervisor, 10.0)
    with pytest.raises(LaunchError, match=r"earlier start still run.*vllm-pd down"):
        commands.clear_stale_state(up.run_dir, silent)
