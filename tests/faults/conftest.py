from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.nursery import Nursery
from tests.faults.scene import Scene


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def scene(nursery: Nursery, kind: str) -> Iterator[Scene]:
    """What is left of it when a test has passed is an error."""
    scene = Scene(nursery, kind)
    yield scene
    scene.close()
