from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_pd.bench.goodput import (
    Search,
    Trial,
    crossing,
    goodput_interval,
    goodput_ratio,
    search,
)
from vllm_pd.errors import ConfigError


def trial(rate: float, met: int, count: int = 100, *, num_seeds: int = 1) -> Trial:
    rng = np.random.default_rng(round(1000 * rate))
    runs = [rng.permutation([True] * met + [False] * (count - met)) for _ in range(num_seeds)]
    return Trial(rate, [run.tolist() for run in runs])


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
    assert not trial(1.0, 93).passes(0.9)
    assert trial(1.0, 97).passes(0.9)


def test_unstable_rate_never_passes() -> None:
    assert not Trial(1.0, [[True] * 100], is_stable=False).passes(0.9)


def test_goodput_lies_below_a_rate_without_a_steady_state() -> None:
    overload = Trial(2.0, [[True] * 100], is_stable=False)
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
    trials = [trial(1.0, 98, num_seeds=3), trial(2.0, 80, num_seeds=3)]
    found = goodput_interval(trials, 0.9, seed=1)
    assert found.value == pytest.approx(1 + 8 / 18)
    assert 1.2 < found.low < found.value < found.high < 1.7


def test_ratio_of_two_goodputs_has_an_interval() -> None:
    ours = [trial(2.0, 98, num_seeds=3), trial(4.0, 80, num_seeds=3)]
    theirs = [trial(1.0, 98, num_seeds=3), trial(2.0, 80, num_seeds=3)]
    found = goodput_ratio(ours, theirs, 0.9, seed=1)
    assert found.value == pytest.approx(2.0)
    assert 1.5 < found.low < 2.0 < found.high < 2.6


@pytest.mark.parametrize("options", [{"start": 0.0}, {"start": 1.0, "target": 1.0}])
def test_impossible_searches_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Search(**options)  # type: ignore[arg-type]
