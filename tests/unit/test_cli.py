from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_pd import __version__
from vllm_pd.cli import run_cli


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run folder, and none of the variables that stand for options."""
    for name in ("MODEL", "PREFILL", "DECODE", "DEVICE", "PORT", "PREFILL_PORT", "DECODE_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("VLLM_PD_TRANSPORT", raising=False)
    monkeypatch.setenv("VLLM_PD_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> ErrorReader:
    return ErrorReader(capsys)


class ErrorReader:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def line(self) -> str:
        """Return the only line on stderr."""
        (line,) = self._capsys.readouterr().err.splitlines()
        assert line.startswith("vllm-pd: error: ")
        return line.removeprefix("vllm-pd: error: ")


@pytest.mark.parametrize(
    "command", ["up", "down", "status", "logs", "router", "keygen", "demo-model", "fault"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli([command, "--help"]) == 0
    assert "Usage: vllm-pd" in capsys.readouterr().out


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli([]) == 0
    out = capsys.readouterr().out
    assert "Disaggregated prefill-decode serving" in out
    assert "_supervise" not in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("args", [["fly"], ["up", "--no-such-option"], ["up", "--port", "http"]])
def test_wrong_usage_is_one_line_and_exit_code_2(args: list[str], error: ErrorReader) -> None:
    assert run_cli(args) == 2
    assert error.line()


def test_a_missing_model_folder_is_one_line(run_dir: Path, error: ErrorReader) -> None:
    assert run_cli(["up", "--device", "cpu", "--model", "/no/such/model"]) == 1
    assert error.line() == "model folder /no/such/model does not exist"
    assert not (run_dir / "state.json").exists()


@pytest.mark.usefixtures("run_dir")
def test_options_can_be_environment_variables(
    error: ErrorReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFILL", "two")
    assert run_cli(["up"]) == 1
    assert error.line().startswith("prefill 'two' is not INSTANCESxTP")


@pytest.mark.usefixtures("run_dir")
def test_arguments_after_two_dashes_are_for_vllm(error: ErrorReader) -> None:
    assert run_cli(["up", "--device", "cpu", "--", "--port", "1"]) == 1
    assert error.line().startswith("--port is set by the launcher")


@pytest.mark.usefixtures("run_dir")
def test_down_is_harmless_when_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["down"]) == 0
    assert run_cli(["down"]) == 0
    assert capsys.readouterr().out == "nothing is running\n" * 2


@pytest.mark.usefixtures("run_dir")
def test_status_of_nothing_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["status", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["running"] is False


def test_a_corrupt_state_file_is_one_line_with_what_to_do(
    run_dir: Path, error: ErrorReader
) -> None:
    run_dir.mkdir()
    (run_dir / "state.json").write_text("{")
    for command in ("status", "down"):
        assert run_cli([command]) == 1
        assert f"state file {run_dir / 'state.json'} is corrupt" in error.line()


@pytest.mark.usefixtures("run_dir")
def test_logs_before_the_first_start_are_one_line(error: ErrorReader) -> None:
    assert run_cli(["logs"]) == 1
    assert error.line().startswith("no logs in")


def test_router_options_must_be_json(error: ErrorReader) -> None:
    urls = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    assert run_cli(["router", *urls, "--options", "{"]) == 1
    assert error.line().startswith("--options: ")


def test_the_routers_certificate_is_checked(error: ErrorReader, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.pem")
    urls = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    assert run_cli(["router", *urls, "--ssl-certfile", missing, "--ssl-keyfile", missing]) == 1
    assert error.line() == f"cannot read ssl_certfile {missing}: No such file or directory"


def test_router_options_are_checked(error: ErrorReader) -> None:
    urls = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    assert run_cli(["router", *urls, "--options", '{"speed": 9}']) == 1
    assert "unknown field `speed`" in error.line()


def test_an_access_log_that_cannot_be_written_stops_the_router(
    tmp_path: Path, error: ErrorReader
) -> None:
    urls = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    options = json.dumps({"access_log": str(tmp_path / "nowhere" / "access.log")})
    assert run_cli(["router", *urls, "--options", options]) == 1
    assert error.line().startswith("cannot write the access log")


@pytest.mark.parametrize("name", ["access_log", "otlp_traces_endpoint"])
def test_an_empty_name_of_a_log_or_a_collector_is_refused(name: str, error: ErrorReader) -> None:
    urls = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    assert run_cli(["router", *urls, "--options", json.dumps({name: ""})]) == 1
    assert f"{name} is empty" in error.line()


def test_a_protocol_of_traces_that_is_unknown_stops_the_router(
    error: ErrorReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    urls = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    assert run_cli(["router", *urls, "--otlp-traces-endpoint", "http://127.0.0.1:4318"]) == 1
    assert "'pigeon' is not supported" in error.line()


def test_keygen_makes_a_private_file_once(tmp_path: Path, error: ErrorReader) -> None:
    path = tmp_path / "key"
    assert run_cli(["keygen", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert run_cli(["keygen", str(path)]) == 1
    assert str(path) in error.line()


def test_demo_model_makes_untrained_checkpoints(tmp_path: Path) -> None:
    args = ["--untrained", "--hidden-size", "64", "--heads", "2", "--kv-heads", "1"]
    assert run_cli(["demo-model", str(tmp_path / "m"), *args, "--layers", "1"]) == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (64, 1)


def test_demo_model_refuses_an_impossible_geometry(tmp_path: Path, error: ErrorReader) -> None:
    args = ["demo-model", str(tmp_path / "m"), "--untrained", "--heads", "3", "--kv-heads", "2"]
    assert run_cli(args) == 1
    assert "num_heads 3 is not a multiple of num_kv_heads 2" in error.line()


def test_a_fault_spec_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["fault", "check", "drop=0.5,seed=3"]) == 0
    drop, seed = capsys.readouterr().out.splitlines()
    assert drop.startswith("drop: 50 %")
    assert seed.startswith("seed: 3")


def test_a_bad_fault_spec_is_one_line(error: ErrorReader) -> None:
    assert run_cli(["fault", "check", "drip=0.5"]) == 1
    assert error.line().startswith("VLLM_PD_FAULTS: 'drip=0.5': no such fault")


@pytest.mark.usefixtures("run_dir")
def test_a_bad_fault_spec_is_refused_before_anything_starts(
    error: ErrorReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PD_FAULTS", "drop=2")
    assert run_cli(["up", "--device", "cpu"]) == 1
    assert "'drop=2'" in error.line()


@pytest.mark.usefixtures("run_dir")
@pytest.mark.parametrize("command", ["kill", "pause", "resume"])
def test_a_fault_needs_a_deployment(command: str, error: ErrorReader) -> None:
    assert run_cli(["fault", command, "prefill-0"]) == 1
    assert error.line().startswith("nothing is running in")


def test_fault_without_a_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["fault"]) == 0
    assert "pause" in capsys.readouterr().out
