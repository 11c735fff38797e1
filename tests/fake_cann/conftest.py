"""The double of CANN, built once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_cann.build import build


@pytest.fixture(scope="session")
def fake_cann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the double's libraries."""
    return build(tmp_path_factory.mktemp("fake_cann"))
