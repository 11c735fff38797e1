"""The Python that has torch_npu, in an environment beside the main one."""

from __future__ import annotations

import os
import sys
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
