"""All tests that need torch-npu, in the environment that has it, on the double of CANN.

``tests/run.sh`` makes the environment beside the main one.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cann.build import build, environment
from tests.fake_cann.python import find_npu_python, run_tests

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.skipif(
        importlib.util.find_spec("torch_npu") is not None, reason="this is that environment"
    ),
]

TIME_SCALE = "0.2"
"""Of timeouts: 4 s to connect, and 6 s to execute where the transport asks for 30."""

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def npu_python() -> str:
    return find_npu_python()


@pytest.fixture(scope="module")
def cann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cann"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the plugin is installed, with its entry points."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(ROOT / "ascend-vllm-plugin", folder / "source")
    quiet = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *quiet, "--target"]
    subprocess.run([*command, folder / "site", source], check=True, capture_output=True, text=True)
    return folder / "site"


@pytest.mark.parametrize("path", sorted(HERE.glob("test_[!i]*.py")), ids=lambda path: path.stem)
def test_passes_on_the_double(npu_python: str, cann: Path, site: Path, path: Path) -> None:
    # Where nothing is meant to time out, nothing may do so on a busy machine either.
    scale = "1" if path.stem == "test_connector_pairs" else TIME_SCALE
    env = environ(cann, site, scale)
    run_tests(npu_python, path, env=env, timeout_s=450)


def test_faults_pass_with_process_groups_too(npu_python: str, cann: Path, site: Path) -> None:
    env = environ(
        cann,
        site,
        VLLM_PD_HCCL_BACKEND="process_group",
        HCCL_EXEC_TIMEOUT="30",  # the transport insists on it
        HCCL_ASYNC_ERROR_HANDLING="0",  # or the watchdog ends the process
    )
    run_tests(npu_python, HERE / "test_connector_faults.py", env=env, timeout_s=450)


def test_double_does_what_torch_npu_needs(npu_python: str, cann: Path) -> None:
    tests = HERE.parent / "fake_cann" / "in_torch_npu"
    run_tests(npu_python, tests, env=environment(cann, TASK_QUEUE_ENABLE="1"), timeout_s=450)


def environ(cann: Path, site: Path, scale: str = TIME_SCALE, **more: str) -> dict[str, str]:
    return environment(
        cann,
        TASK_QUEUE_ENABLE="1",  # as in the image
        HCCL_CONNECT_TIMEOUT="0",
        FAKE_CANN_TIME_SCALE=scale,
        PYTHONPATH=f"{ROOT}:{site}",
        **more,
    )
