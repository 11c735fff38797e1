from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vllm_pd.errors import LaunchError
from vllm_pd.launcher.process import identify
from vllm_pd.launcher.state import ProcessRecord, State, load_state, save_state


@pytest.fixture
def state() -> State:
    record = ProcessRecord(
        name="prefill-0",
        role="prefill",
        url="http://127.0.0.1:1",
        log_path="/logs/prefill-0.log",
        identity=identify(os.getpid()),
    )
    return State(
        model="m",
        served_model_name="m",
        device="cpu",
        router_url="http://127.0.0.1:2",
        stop_timeout_s=1.0,
        supervisor=identify(os.getpid()),
        processes=(record,),
    )


def test_what_is_saved_is_loaded(tmp_path: Path, state: State) -> None:
    save_state(tmp_path / "state.json", state)
    assert load_state(tmp_path / "state.json") == state


def test_only_the_owner_can_read_it(tmp_path: Path, state: State) -> None:
    save_state(tmp_path / "state.json", state)
    assert stat.S_IMODE((tmp_path / "state.json").stat().st_mode) == 0o600


def test_saving_leaves_no_other_file(tmp_path: Path, state: State) -> None:
    save_state(tmp_path / "state.json", state)
    save_state(tmp_path / "state.json", state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_no_file_means_nothing_is_recorded(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state.json") is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe", b'{"version": "x"}']
)
def test_a_corrupt_file_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(LaunchError, match=rf"{path} is corrupt.*vllm-pd down --force"):
        load_state(path)


def test_a_file_of_another_version_is_refused(tmp_path: Path, state: State) -> None:
    path = tmp_path / "state.json"
    save_state(path, state)
    path.write_text(path.read_text().replace('"version": 2', '"version": 99'))
    with pytest.raises(LaunchError, match="another version"):
        load_state(path)
