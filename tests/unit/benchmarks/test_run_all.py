"""The script that runs every benchmark, with a Python that only writes down what it is asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.transfer.pair import REPO

SCRIPT = REPO / "benchmarks/run_all.sh"
PROGRAMS = [
    "kv_transfer",
    "router_overhead",
    "service_overhead",
    "compare",
    "goodput",
    "gpu/staging",
]


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A Python that fails for the router's benchmark."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n'
        'case "$1" in *router_overhead*) echo "error: no router"; exit 1;; esac\n'
    )
    python.chmod(0o755)
    return python


def run(python: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": str(python), "RESULTS": str(python.parent / "results")}
    return subprocess.run(
        ["bash", str(SCRIPT), *args], env=env, capture_output=True, text=True, check=False
    )


def test_every_benchmark_is_run_although_one_fails(fake_python: Path, tmp_path: Path) -> None:
    done = run(fake_python, "--quick")
    asked = (tmp_path / "asked").read_text()
    assert [name for name in PROGRAMS if f"benchmarks/{name}.py" in asked] == PROGRAMS
    assert done.returncode == 1
    assert done.stderr == "error: failed: router-overhead\n"
    assert (tmp_path / "results/router-overhead.txt").read_text() == "error: no router\n"


def test_environment_is_written_down(fake_python: Path, tmp_path: Path) -> None:
    run(fake_python)
    text = (tmp_path / "results/environment.txt").read_text()
    assert "commit: " in text
    assert "MemTotal" in text


def test_unknown_option_is_one_line(fake_python: Path, tmp_path: Path) -> None:
    done = run(fake_python, "--fast")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "asked").exists()
