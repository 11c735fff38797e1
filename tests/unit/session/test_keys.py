"""The cluster key file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_pd.errors import ConfigError
from vllm_pd.session.keys import load_cluster_key, write_cluster_key


def test_key_is_for_its_owner_only_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    key = load_cluster_key(path)
    assert len(key.public) == len(key.secret) == 40
    assert key.secret.decode() not in repr(key)


def test_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        write_cluster_key(path)
    assert path.read_bytes() == before


def test_key_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_cluster_key(path)


@pytest.mark.parametrize("data", [b"", b"{}", b"garbage", b'{"public": "x", "secret": "y"}'])
def test_damaged_key_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not a cluster key"):
        load_cluster_key(path)


def test_missing_key_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vllm-pd keygen"):
        load_cluster_key(tmp_path / "nowhere")


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        write_cluster_key(tmp_path / "nowhere" / "key")
