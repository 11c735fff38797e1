"""The script that runs every benchmark, with a Python that only writes down what it is asked."""

from __future__ import annotations

import os
import signal
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_benchmark_that_runs_as_ctrl_c_does(
    tmp_path: Path, number: signal.Signals
) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1" in benchmarks/*) ;; *) exit 0;; esac\n'
        "trap 'echo written; exit 130' INT\necho started\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "RESULTS": str(tmp_path / "results")}
    with subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        assert script.stdout is not None
        assert any(line == "started\n" for line in script.stdout)
        script.send_signal(number)
        _, errors = script.communicate(timeout=60)
    assert script.returncode == 130
    assert "interrupted: what there is, is in " in errors
    assert (tmp_path / "results/kv-transfer.txt").read_text() == "started\nwritten\n"
    assert not (tmp_path / "results/router-overhead.txt").exists()


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
