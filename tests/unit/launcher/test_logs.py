from __future__ import annotations

from pathlib import Path

from vllm_pd.launcher.logs import LogFollower, last_lines, start_new_log


def test_the_last_lines_are_returned(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("a\nb\nc\n")
    assert last_lines(path, 2) == ["b", "c"]


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"\xff\n")
    assert last_lines(path, 1) == ["\N{REPLACEMENT CHARACTER}"]


def test_a_missing_log_has_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "x.log", 5) == []


def test_no_lines_asked_for_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("a\n")
    assert last_lines(path, 0) == []


def test_a_new_log_keeps_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("before")
    start_new_log(path)
    assert path.read_text() == ""
    assert (tmp_path / "x.log.old").read_text() == "before"


def test_a_follower_returns_lines_once_they_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("old\n")
    follower = LogFollower([path])
    with path.open("a") as file:
        file.write("new\nha")
        file.flush()
        assert follower.new_lines() == [("x", "new")]
        assert follower.new_lines() == []
        file.write("lf\n")
    assert follower.new_lines() == [("x", "half")]


def test_a_follower_notices_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("a long line of the previous start\n")
    follower = LogFollower([path])
    start_new_log(path)
    path.write_text("new\n")
    assert follower.new_lines() == [("x", "new")]


def test_a_follower_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    follower = LogFollower([path])
    assert follower.new_lines() == []
    path.write_text("first\n")
    assert follower.new_lines() == [("x", "first")]
