"""The Python that has torch_npu, in an environment beside the main one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def find_npu_python() -> str:
    """Return it; without it the test is skipped, but in CI it fails.

    ``tests/run.sh`` makes it; PYTHON_TORCH_NPU names another one.
    """
    made = Path(sys.prefix) / "torch-npu" / "bin" / "python"
    python = os.environ.get("PYTHON_TORCH_NPU") or str(made)
    if not Path(python).exists():
        missing = f"no environment with torch-npu ({python}): bash tests/run.sh makes it"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    return python


def run_tests(python: str, tests: Path, *, env: Mapping[str, str], timeout_s: float) -> None:
    """Run tests in that environment; what fails there fails here, with what it printed."""
    quiet = ["-q", "--show-capture=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [python, "-m", "pytest", *quiet, str(tests)],
        cwd=Path(__file__).resolve().parent.parent.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"exit status {done.returncode}:\n{done.stdout[-20_000:]}", pytrace=False)
    assert "passed" in done.stdout
