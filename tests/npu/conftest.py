"""Tests that need torch_npu; ``test_in_torch_npu`` runs them, on the double of CANN."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.npu.engines import Make, NpuEngine

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
