"""How long a prefill will take."""

from __future__ import annotations

import pytest

from vllm_pd.router.forecast import PrefillForecast


def test_nothing_is_told_before_a_prefill_has_ended() -> None:
    forecast = PrefillForecast()

    assert forecast.expected_s(100) is None
    assert forecast.pause_s(100, 0.03) is None


def test_prefills_of_one_size_take_as_long_for_each_token() -> None:
    forecast = PrefillForecast()
    forecast.note(1000, 0.6)

    assert forecast.expected_s(600) == pytest.approx(0.36)


def test_another_size_has_its_own_pace() -> None:
    forecast = PrefillForecast()
    forecast.note(64, 0.064)
    forecast.note(4000, 8.0)

    assert forecast.expected_s(100) == pytest.approx(0.1)
    assert forecast.expected_s(3000) == pytest.approx(6.0)
    assert forecast.expected_s(100_000) == pytest.approx(200.0)  # the nearest that is known


def test_later_prefills_count_and_one_that_was_delayed_counts_little() -> None:
    forecast = PrefillForecast()
    forecast.note(1000, 1.0)
    forecast.note(1000, 3.0)
    assert forecast.expected_s(1000) == pytest.approx(1.5)

    for _ in range(40):
        forecast.note(1000, 2.0)
    assert forecast.expected_s(1000) == pytest.approx(2.0, rel=1e-3)


def test_the_pause_ends_before_the_prefill() -> None:
    forecast = PrefillForecast()
    forecast.note(1000, 1.0)

    assert forecast.pause_s(1000, 0.03) == pytest.approx(0.87)
    assert forecast.pause_s(1000, 2.0) == 0.0


def test_a_prompt_that_is_cached_has_nothing_to_compute() -> None:
    forecast = PrefillForecast()
    forecast.note(0, 0.01)

    assert forecast.expected_s(0) == 0.0
