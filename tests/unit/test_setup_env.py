"""pd_example/setup_env.sh on NPUs, where the engine and this project are the image's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NO_PIP = """#!/bin/bash
if [[ $* == *"-m pip"* ]]; then echo "pip $*" >>"{log}"; exit 1; fi
PYTHONPATH="{site}" exec "{python}" "$@"
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Return the folder that Dockerfile.ascend makes."""
    repo = tmp_path / "opt" / "vllm-pd"
    for name in ("vllm_pd", "ascend-vllm-plugin", "pd_example", "requirements"):
        shutil.copytree(ROOT / name, repo / name, ignore=shutil.ignore_patterns("__pycache__"))
    return repo


@pytest.fixture
def python(tmp_path: Path, repo: Path) -> Path:
    """Return a Python with a non-editable installation of that, which can install nothing."""
    site = tmp_path / "site"
    for package in (repo / "vllm_pd", repo / "ascend-vllm-plugin" / "ascend_vllm_plugin"):
        shutil.copytree(package, site / package.name)
        info = site / f"{package.name}-0.1.0.dist-info"
        info.mkdir()
        name = package.name.replace("_", "-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    wrapper = tmp_path / "python"
    wrapper.write_text(
        NO_PIP.format(site=site, python=sys.executable, log=tmp_path / "installed.txt")
    )
    wrapper.chmod(0o755)
    return wrapper


def set_up(repo: Path, python: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *("bash", "-euo", "pipefail", "-c", 'source "$0"; setup_env; echo "${VLLM_PD[0]}"'),
            str(repo / "pd_example" / "setup_env.sh"),
        ],
        env={"PATH": "/usr/bin:/bin", "DEVICE": "npu", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_image_that_has_an_equal_copy_installed_is_used_as_it_is(
    repo: Path, python: Path, tmp_path: Path
) -> None:
    done = set_up(repo, python)
    assert (done.returncode, done.stdout) == (0, f"{python}\n"), done.stderr
    assert not (tmp_path / "installed.txt").exists()


def test_checkout_that_differs_from_what_is_installed_is_installed(
    repo: Path, python: Path, tmp_path: Path
) -> None:
    (repo / "vllm_pd" / "cli.py").write_text("# another version\n")
    done = set_up(repo, python)
    assert done.returncode == 1  # its pip refuses
    assert "pip" in (tmp_path / "installed.txt").read_text()


def test_folder_that_cannot_be_written_to_is_told_with_what_to_do(repo: Path, python: Path) -> None:
    (repo / "vllm_pd" / "cli.py").write_text("# another version\n")
    # Root, as whom tests may run, could write to any folder that is there.
    shutil.rmtree(repo / "ascend-vllm-plugin")
    done = set_up(repo, python)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "cannot write there: as root, run" in line
    assert "-m pip install --no-deps" in line
