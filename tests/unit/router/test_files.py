from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vllm_pd.errors import ConfigError
from vllm_pd.router.files import read_credential, stamp_of


def secret(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_credential_is_what_the_file_holds(tmp_path: Path) -> None:
    assert read_credential(secret(tmp_path / "key", "sk-1\n")) == "sk-1"


@pytest.mark.parametrize("text", ["", "\n", "two words", "a\nb", "\u00e4"])
def test_what_no_header_can_carry_is_no_credential(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        read_credential(secret(tmp_path / "key", text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere"):
        read_credential(tmp_path / "nowhere")


def test_a_credential_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_credential(secret(tmp_path / "key", "sk-1", mode=0o644))
    assert "open to other users" in caplog.text


def test_the_stamp_tells_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert stamp_of(path) is None
    path.write_text("a")
    first = stamp_of(path)
    assert stamp_of(path) == first
    (tmp_path / "new").write_text("b")
    (tmp_path / "new").replace(path)
    assert stamp_of(path) != first
