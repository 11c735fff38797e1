"""An environment with torch_npu that is missing is noticed where it must not be."""

from __future__ import annotations

import sys

import pytest

from tests.fake_cann.python import find_npu_python


def test_environment_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_TORCH_NPU", sys.executable)
    assert find_npu_python() == sys.executable


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_environment_that_is_missing_fails_in_ci_only(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("PYTHON_TORCH_NPU", "/nowhere/python")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no environment with torch-npu"):
        find_npu_python()
