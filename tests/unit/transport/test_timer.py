from __future__ import annotations

import select
import time
from collections.abc import Iterator

import pytest

from vllm_pd.transport.timer import Timer


@pytest.fixture
def timer() -> Iterator[Timer]:
    timer = Timer()
    yield timer
    timer.close()


def is_readable(timer: Timer, timeout_s: float) -> bool:
    return bool(select.select([timer.fileno()], [], [], timeout_s)[0])


def test_is_readable_from_the_time_that_was_set(timer: Timer) -> None:
    at = time.monotonic() + 0.02
    timer.set(at)
    assert is_readable(timer, 5.0)
    assert time.monotonic() >= at
    assert is_readable(timer, 0.0)


def test_a_time_in_the_past_is_now(timer: Timer) -> None:
    timer.set(0.0)
    assert is_readable(timer, 5.0)


@pytest.mark.parametrize("later", [None, 3600.0])
def test_setting_it_again_makes_it_unreadable(timer: Timer, later: float | None) -> None:
    timer.set(0.0)
    assert is_readable(timer, 5.0)
    timer.set(None if later is None else time.monotonic() + later)
    assert not is_readable(timer, 0.0)


def test_closing_twice_and_setting_afterwards_is_harmless(timer: Timer) -> None:
    timer.close()
    timer.close()
    timer.set(0.0)
    assert timer.fileno() == -1
