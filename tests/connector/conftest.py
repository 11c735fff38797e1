"""Fixtures on vLLM's own classes; vLLM is imported only by the tests that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_pd.demo.model import Geometry, write_untrained_model

if TYPE_CHECKING:
    from tests.connector.harness import Engine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "untrained"
    write_untrained_model(folder, Geometry(num_layers=1), seed=0)
    return folder


@pytest.fixture
def make_engine(tiny_model: Path) -> Iterator[Callable[..., Engine]]:
    """Return a function that makes an engine; see ``harness.Engine`` for its arguments."""
    from tests.connector.harness import Engine

    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(tiny_model, **options))
        return made[-1]

    yield make
    for engine in reversed(made):  # consumers first: a release needs a living producer
        engine.close()


@pytest.fixture
def producer(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture
def consumer(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()
