"""Tests that need torch_npu; ``test_in_torch_npu`` runs them, on the double of CANN."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.npu.engines import Make, NpuEngine, Set

collect_ignore_glob = (
    [] if importlib.util.find_spec("torch_npu") else ["test_hccl_*.py", "test_connector_*.py"]
)


@pytest.fixture
def make() -> Iterator[Make]:
    """Make engines, which are closed after the test."""
    from tests.npu.engines import NpuEngine

    engines: list[NpuEngine] = []

    def make(*args: object, **kwargs: object) -> NpuEngine:
        engines.append(NpuEngine(*args, **kwargs))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def fake_set() -> Iterator[Set]:
    """Sets a variable of the double in this process, for one test."""
    double = ctypes.CDLL("libascendcl.so")
    changed: set[str] = set()

    def fake_set(name: str, value: str) -> None:
        changed.add(name)
        double.fakeSet(name.encode(), value.encode())

    yield fake_set
    for name in changed:
        double.fakeSet(name.encode(), b"")
