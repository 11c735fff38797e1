"""The tests of this folder once more, in the oldest supported vLLM.

``tests/run.sh`` makes its environment beside the main one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).resolve().parent
OLDEST = "0.23.0"


@pytest.fixture(scope="module")
def oldest_python() -> str:
    """Return the Python that imports the oldest supported vLLM."""
    made = Path(sys.prefix) / "vllm-0.23" / "bin" / "python"
    python = os.environ.get("PYTHON_VLLM_0_23") or str(made)
    if not Path(python).exists():
        pytest.skip(f"no environment with vLLM {OLDEST}: bash tests/run.sh makes it")
    return python


def run(*command: str) -> str:
    """Run a command in the repository and return what it printed; fail with it."""
    done = subprocess.run(
        command,
        cwd=HERE.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=540,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"exit status {done.returncode}:\n{done.stdout[-20_000:]}", pytrace=False)
    return done.stdout


def test_connector_loads_in_the_oldest_vllm(oldest_python: str) -> None:
    code = "import vllm, vllm_pd.connector.connector; print(vllm.__version__)"
    assert run(oldest_python, "-c", code).split()[-1] == OLDEST


def test_contract_holds_in_the_oldest_vllm(oldest_python: str) -> None:
    others = [str(path) for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)]
    quiet = ["-q", "--show-capture=no", "-p", "no:cacheprovider"]
    assert "passed" in run(oldest_python, "-m", "pytest", *quiet, *others)
