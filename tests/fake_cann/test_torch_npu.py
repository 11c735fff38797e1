"""The tests of ``in_torch_npu``, in the environment that ``tests/run.sh`` makes for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fake_cann.build import environment
from tests.fake_cann.python import find_npu_python
from tests.fake_cann.ranks import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]
TESTS = Path(__file__).resolve().parent / "in_torch_npu"


@pytest.fixture(scope="module")
def npu_python() -> str:
    return find_npu_python()


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
