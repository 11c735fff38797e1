"""Hysteresis and breaker, with a made-up clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_pd.router.health import Breaker, BreakerState, Health, HealthLimits, ProbeHistory

LIMITS = HealthLimits(
    failures_to_leave=3, successes_to_return=2, breaker_failures=3, backoff_s=1.0, max_backoff_s=3.0
)


@pytest.fixture
def probes() -> ProbeHistory:
    return ProbeHistory(LIMITS)


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(LIMITS)


def note(probes: ProbeHistory, *results: bool) -> Health:
    for healthy in results:
        probes.note_probe(healthy=healthy)
    return probes.health


def fail(breaker: Breaker, *, times: int, now: float) -> None:
    for _ in range(times):
        breaker.fail(breaker.begin(now), now)


def test_the_first_answer_makes_an_instance_healthy(probes: ProbeHistory) -> None:
    assert note(probes, False, False, False, False) is Health.STARTING
    assert note(probes, True) is Health.HEALTHY


def test_lost_probes_in_a_row_take_an_instance_out_of_use(probes: ProbeHistory) -> None:
    assert note(probes, True, False, False) is Health.HEALTHY
    assert note(probes, False) is Health.UNHEALTHY


def test_a_good_probe_makes_up_for_lost_ones(probes: ProbeHistory) -> None:
    assert note(probes, True, False, False, True, False, False) is Health.HEALTHY


def test_good_probes_in_a_row_bring_an_instance_back(probes: ProbeHistory) -> None:
    assert note(probes, True, False, False, False, True, False, True) is Health.UNHEALTHY
    assert note(probes, True) is Health.HEALTHY


@pytest.mark.parametrize(("healthy", "then"), [(True, Health.HEALTHY), (False, Health.UNHEALTHY)])
def test_after_a_failed_request_one_probe_decides(
    probes: ProbeHistory, healthy: bool, then: Health
) -> None:
    note(probes, True)
    probes.note_failed_request()
    assert probes.health is Health.SUSPECT
    assert note(probes, healthy) is then


@pytest.mark.parametrize("results", [(), (True, False, False, False)])
def test_a_late_failure_changes_nothing_for_an_instance_out_of_use(
    probes: ProbeHistory, results: tuple[bool, ...]
) -> None:
    before = note(probes, *results)
    probes.note_failed_request()
    assert probes.health is before


@given(st.lists(st.sampled_from(["good", "lost", "failed request"]), max_size=40))
def test_an_instance_in_use_has_earned_it(events: list[str]) -> None:
    probes = ProbeHistory(LIMITS)
    for event in events:
        if event == "failed request":
            probes.note_failed_request()
        else:
            probes.note_probe(healthy=event == "good")

    if probes.health is Health.HEALTHY:
        assert "good" in events
        assert events[-1] != "failed request"
        assert events[-3:] != ["lost"] * 3
    if events[-3:] == ["good"] * 3:
        assert probes.health is Health.HEALTHY


def test_failures_in_a_row_open_the_breaker(breaker: Breaker) -> None:
    fail(breaker, times=2, now=0.0)
    assert breaker.admits(0.0)
    fail(breaker, times=1, now=0.0)
    assert not breaker.admits(0.9)


def test_a_success_makes_up_for_failures(breaker: Breaker) -> None:
    fail(breaker, times=2, now=0.0)
    breaker.succeed(breaker.begin(0.0))
    fail(breaker, times=2, now=0.0)
    assert breaker.state is BreakerState.CLOSED


def test_after_the_pause_one_request_is_the_trial(breaker: Breaker) -> None:
    fail(breaker, times=3, now=0.0)
    assert breaker.admits(1.0)
    breaker.begin(1.0)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.admits(100.0)


def test_a_good_trial_closes_the_breaker(breaker: Breaker) -> None:
    fail(breaker, times=3, now=0.0)
    breaker.succeed(breaker.begin(1.0))
    assert breaker.state is BreakerState.CLOSED


def test_each_failed_trial_doubles_the_pause_up_to_a_limit(breaker: Breaker) -> None:
    fail(breaker, times=3, now=0.0)
    now, pauses = 0.0, []
    for pause in (1.0, 2.0, 3.0, 3.0):
        assert not breaker.admits(now + pause - 0.1)
        now += pause
        pauses.append(breaker.admits(now))
        fail(breaker, times=1, now=now)
    assert pauses == [True] * 4


def test_the_pause_is_short_again_after_a_good_trial(breaker: Breaker) -> None:
    fail(breaker, times=3, now=0.0)
    fail(breaker, times=1, now=1.0)
    breaker.succeed(breaker.begin(3.0))
    fail(breaker, times=3, now=10.0)
    assert breaker.admits(11.0)


def test_an_abandoned_trial_lets_another_request_try(breaker: Breaker) -> None:
    fail(breaker, times=3, now=0.0)
    breaker.abandon(breaker.begin(1.0))
    assert breaker.admits(1.0)


def test_requests_older_than_the_opening_no_longer_count(breaker: Breaker) -> None:
    old = [breaker.begin(0.0) for _ in range(3)]
    fail(breaker, times=3, now=0.0)
    breaker.succeed(old[0])
    breaker.fail(old[1], 0.9)
    breaker.abandon(old[2])
    assert breaker.state is BreakerState.OPEN
    assert breaker.admits(1.0)


def test_who_begins_without_asking_counts_for_nothing(breaker: Breaker) -> None:
    fail(breaker, times=3, now=0.0)
    breaker.succeed(breaker.begin(0.5))
    assert breaker.state is BreakerState.OPEN


class BreakerModel(RuleBasedStateMachine):
    """Requests begin only when admitted, end in any order and any way."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(LIMITS)
        self.now = 0.0
        self.open: list[int] = []

    @rule(seconds=st.floats(0.0, 4.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.admits(self.now))
    @rule()
    def begin(self) -> None:
        self.open.append(self.breaker.begin(self.now))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "abandon"]))
    def end(self, data: st.DataObject, how: str) -> None:
        ticket = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        match how:
            case "succeed":
                self.breaker.succeed(ticket)
            case "fail":
                self.breaker.fail(ticket, self.now)
            case _:
                self.breaker.abandon(ticket)

    @invariant()
    def is_never_shut_for_good(self) -> None:
        waited = self.now + LIMITS.max_backoff_s
        # Either it admits after a pause, or a trial is under way that will end.
        assert self.breaker.admits(waited) or self.open

    @invariant()
    def has_at_most_one_trial(self) -> None:
        if self.breaker.state is BreakerState.HALF_OPEN:
            assert not self.breaker.admits(self.now + 1e6)
            assert len([t for t in self.open if t == max(self.open)]) == 1


TestBreakerModel = BreakerModel.TestCase


def test_a_breaker_that_has_opened_elsewhere_opens_here(breaker: Breaker) -> None:
    breaker.trip(10.0)
    assert not breaker.admits(10.0)
    assert breaker.admits(10.0 + LIMITS.backoff_s)


def test_what_has_opened_elsewhere_does_not_disturb_a_trial(breaker: Breaker) -> None:
    breaker.trip(10.0)
    trial = breaker.begin(10.0 + LIMITS.backoff_s)
    breaker.trip(12.0)
    breaker.succeed(trial)
    assert breaker.state is BreakerState.CLOSED
