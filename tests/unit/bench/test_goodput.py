from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_pd.bench.goodput import (
    Outcome,
    Search,
    Trial,
    crossing,
    goodput_interval,
    goodput_ratio,
    search,
)
from vllm_pd.errors import ConfigError


def trial(rate: float, met: int, count: int = 100) -> Trial:
    return Trial(rate, met / count, count)


def cliff(at: float, rates: list[float]):  # type: ignore[no-untyped-def]
    """Return a measurement that passes below a rate and notes what it was asked."""

    def measure(rate: float) -> Trial:
        rates.append(rate)
        return trial(rate, 100 if rate <= at else 50)

    return measure


@pytest.mark.parametrize("at", [0.13, 3.0, 37.0])
def test_search_ends_just_below_the_rate_from_which_objectives_are_missed(at: float) -> None:
    rates: list[float] = []
    found = search(cliff(at, rates), Search(start=2.0))
    assert at / 1.06 <= found.best <= at
    assert len(rates) <= 12


def test_search_doubles_until_it_fails_and_then_bisects() -> None:
    rates: list[float] = []
    search(cliff(5.0, rates), Search(start=1.0, tolerance=0.5))
    assert rates == pytest.approx([1.0, 2.0, 4.0, 8.0, math.sqrt(32)])


def test_search_gives_up_where_nothing_passes_or_nothing_fails() -> None:
    assert search(lambda rate: trial(rate, 0), Search(start=1.0)).best == 0.0
    assert search(lambda rate: trial(rate, 100), Search(start=1.0)).best == 2.0**12


def test_rate_passes_by_its_lower_bound_only() -> None:
    assert trial(1.0, 93).outcome(0.9) is Outcome.UNKNOWN
    assert trial(1.0, 97).outcome(0.9) is Outcome.PASSED


def test_rate_fails_by_its_upper_bound_only() -> None:
    assert trial(1.0, 86).outcome(0.9) is Outcome.UNKNOWN
    assert trial(1.0, 80).outcome(0.9) is Outcome.FAILED


def test_runs_too_short_to_tell_bound_nothing() -> None:
    short = Trial(2.0, 0.2, 100, is_stable=None)
    assert short.outcome(0.9) is Outcome.UNKNOWN
    plan = Search(start=1.0, trials=[trial(1.0, 100), short])
    assert not plan.has_failed
    assert plan.next_rate() == 4.0
    assert goodput_interval([trial(1.0, 100), short, trial(4.0, 80)], 0.9, seed=1).value == 2.5


def test_search_goes_on_around_a_rate_that_is_unknown() -> None:
    trials = [trial(1.0, 100), trial(4.0, 50), trial(2.0, 92)]
    plan = Search(start=1.0, tolerance=0.5, trials=trials)
    assert plan.next_rate() == pytest.approx(math.sqrt(2))
    plan.tell(trial(math.sqrt(2), 100))
    assert plan.next_rate() == pytest.approx(math.sqrt(8))
    plan.tell(trial(math.sqrt(8), 50))
    assert plan.is_over


def test_search_goes_down_four_times_at_most() -> None:
    rates: list[float] = []
    assert not search(cliff(0.0, rates), Search(start=1.0)).has_passed
    assert rates == [1.0, 0.5, 0.25, 0.125, 0.0625]


def test_search_does_not_go_below_a_rate_that_fails_without_queueing() -> None:
    failed = Trial(0.5, 0.5, 100, is_idle=True)
    assert Search(start=1.0, trials=[trial(1.0, 50), failed]).is_over


def test_unstable_rate_never_passes() -> None:
    assert Trial(1.0, 1.0, 100, is_stable=False).outcome(0.9) is Outcome.FAILED


def test_goodput_lies_below_a_rate_without_a_steady_state() -> None:
    overload = Trial(2.0, 1.0, 100, is_stable=False)
    found = goodput_interval([trial(1.0, 98), overload], 0.9, seed=1)
    assert 1.0 < found.value < 1.2
    assert found.high < 1.2


def test_rate_above_one_that_failed_is_not_believed() -> None:
    plan = Search(start=1.0, trials=[trial(1.0, 100), trial(2.0, 50), trial(3.0, 100)])
    assert plan.best == 1.0


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ({1.0: 1.0, 2.0: 0.8}, 1.5),
        ({1.0: 0.95, 2.0: 0.97, 3.0: 0.85}, 2.5),  # what rises again is cut
        ({1.0: 0.99, 2.0: 0.95}, 2.0),
        ({2.0: 0.45}, 1.0),
    ],
)
def test_crossing_is_interpolated(points: dict[float, float], rate: float) -> None:
    assert crossing(points, 0.9) == pytest.approx(rate)


def test_goodput_has_an_interval_around_the_crossing() -> None:
    found = goodput_interval([trial(1.0, 294, 300), trial(2.0, 240, 300)], 0.9, seed=1)
    assert found.value == pytest.approx(1 + 8 / 18)
    assert 1.2 < found.low < found.value < found.high < 1.7


def test_rate_at_which_nothing_was_missed_is_not_taken_for_certain() -> None:
    few, many = (
        goodput_interval([trial(1.0, count, count), trial(2.0, 0, count)], 0.9, seed=1)
        for count in (40, 4000)
    )
    assert few.high - few.low > 3 * (many.high - many.low) > 0


def test_ratio_of_two_goodputs_has_an_interval() -> None:
    ours = [trial(2.0, 294, 300), trial(4.0, 240, 300)]
    theirs = [trial(1.0, 294, 300), trial(2.0, 240, 300)]
    found = goodput_ratio(ours, theirs, 0.9, seed=1)
    assert found.value == pytest.approx(2.0)
    assert 1.5 < found.low < 2.0 < found.high < 2.6


TRUE = {1.0: 0.98, 2.0: 0.8}
"""Attainment by rate."""


def test_equal_goodputs_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(7)
    told_apart = 0
    for number in range(100):
        ours, theirs = (
            [Trial(rate, rng.binomial(200, share) / 200, 200) for rate, share in TRUE.items()]
            for _ in range(2)
        )
        found = goodput_ratio(ours, theirs, 0.9, seed=number)
        told_apart += not found.low <= 1 <= found.high
    assert told_apart <= 9


def test_few_independent_requests_cannot_pass() -> None:
    assert not Trial(1.0, 1.0, 34).is_enough(0.9)
    assert Trial(1.0, 1.0, 34).outcome(0.9) is Outcome.UNKNOWN
    assert Trial(1.0, 1.0, 36).outcome(0.9) is Outcome.PASSED


@pytest.mark.parametrize("options", [{"start": 0.0}, {"start": 1.0, "target": 1.0}])
def test_impossible_searches_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Search(**options)  # type: ignore[arg-type]
