from __future__ import annotations

import pytest

from vllm_pd.router.activity import NUM_SLICES, SLICE_S, WINDOW_S, Activity, Tally, Timed


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def activity(clock: Clock) -> Activity:
    return Activity(clock)


def counts(activity: Activity) -> list[int]:
    return [one.total(Tally.CODE) for one in activity.recent()]


def test_there_are_as_many_slices_before_anything_happened(activity: Activity) -> None:
    assert counts(activity) == [0] * NUM_SLICES


def test_what_happens_belongs_to_its_slice(activity: Activity, clock: Clock) -> None:
    activity.count(Tally.CODE, "200")
    clock.now += 2 * SLICE_S
    activity.count(Tally.CODE, "200")
    activity.count(Tally.CODE, "503")
    assert counts(activity)[-3:] == [1, 0, 2]


def test_what_is_too_long_ago_is_forgotten(activity: Activity, clock: Clock) -> None:
    activity.count(Tally.CODE, "200")
    clock.now += WINDOW_S - SLICE_S
    assert sum(counts(activity)) == 1
    clock.now += SLICE_S
    assert sum(counts(activity)) == 0


def test_labels_are_told_apart(activity: Activity) -> None:
    activity.count(Tally.CODE, "200", 3)
    activity.count(Tally.PATH, "none")
    assert activity.recent()[-1].counts == {(Tally.CODE, "200"): 3, (Tally.PATH, "none"): 1}


def test_durations_of_a_slice_are_together(activity: Activity) -> None:
    activity.time(Timed.PREFILL, 0.1)
    activity.time(Timed.PREFILL, 0.3)
    spread = activity.recent()[-1].spreads[Timed.PREFILL]
    assert spread.num == 2
    assert spread.total_s == pytest.approx(0.4)


def test_its_age_is_known(activity: Activity, clock: Clock) -> None:
    clock.now += 7.0
    assert activity.age_s == 7.0
