from __future__ import annotations

import stat
from pathlib import Path

import pytest

from vllm_pd.errors import ConfigError, LaunchError
from vllm_pd.launcher.run_dir import RunDir, default_run_dir


def test_the_default_follows_the_xdg_variable() -> None:
    assert default_run_dir({"XDG_STATE_HOME": "/s"}) == Path("/s/vllm-pd")


def test_the_default_is_below_the_home_folder() -> None:
    assert default_run_dir({}) == Path.home() / ".local/state/vllm-pd"


def test_the_folder_is_private(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "a" / "b")
    run_dir.make()
    assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
    assert run_dir.logs_path.is_dir()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make run folder .*/file/x"):
        RunDir(tmp_path / "file" / "x").make()


def test_the_lock_is_held_by_one(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with run_dir.locked(), pytest.raises(LaunchError, match="already up"), run_dir.locked():
        pass


def test_the_lock_is_free_again_afterwards(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with run_dir.locked():
        pass
    with run_dir.locked() as descriptor:
        assert descriptor > 2


def test_commands_name_the_folder_unless_it_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert RunDir(tmp_path / "vllm-pd").command("down").endswith("vllm-pd down")
    assert RunDir(tmp_path / "x").command("down").endswith(f"down --run-dir {tmp_path / 'x'}")


def test_a_link_is_followed_so_that_open_files_are_known_again(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert RunDir(tmp_path / "link").log_path("x") == tmp_path / "real/logs/x.log"
