from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.browser import chromium

# As the tests of the router do, in front of the same fake instances.
from tests.unit.router.conftest import stack, start_instance, start_router

__all__ = ["stack", "start_instance", "start_router"]


@pytest.fixture
async def page(stack: AsyncExitStack, tmp_path: Path) -> chromium.Page:
    """Return an empty tab of a browser."""
    program = chromium.find()
    if program is None:
        # Where everything must be tested a missing browser is an error of the set-up.
        missing = "no chromium here: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    return await stack.enter_async_context(chromium.opened(program, tmp_path / "profile"))
