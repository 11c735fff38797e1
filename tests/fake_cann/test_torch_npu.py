"""The tests of ``in_torch_npu``, in the environment that ``tests/run.sh`` makes for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cann.build import environment
from tests.fake_cann.ranks import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]
TESTS = Path(__file__).resolve().parent / "in_torch_npu"


@pytest.fixture(scope="module")
def npu_python() -> str:
    """Return the Python that imports torch_npu."""
    made = Path(sys.prefix) / "torch-npu" / "bin" / "python"
    python = os.environ.get("PYTHON_TORCH_NPU") or str(made)
    if not Path(python).exists():
        pytest.skip("no environment with torch-npu: bash tests/run.sh makes it")
    return python


def test_npu_tests_pass_in_torch_npu(npu_python: str, fake_cann: Path) -> None:
    command = [npu_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(fake_cann, TASK_QUEUE_ENABLE="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=470,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"exit status {done.returncode}:\n{done.stdout[-20_000:]}", pytrace=False)
    assert "passed" in done.stdout
