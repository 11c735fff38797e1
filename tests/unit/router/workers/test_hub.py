from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter

from vllm_pd.config import InstanceSpec
from vllm_pd.router.workers.changes import Add, Change, Drain, Remove
from vllm_pd.router.workers.hub import Hub
from vllm_pd.router.workers.merge import Page, page_of
from vllm_pd.router.workers.messages import (
    Answers,
    Ask,
    Asked,
    Doubt,
    FileChanged,
    MakeChange,
    ShowMetrics,
    ShowReports,
    Welcome,
)

DRAIN = MakeChange(Drain("a:80"))


@pytest.fixture
def hub() -> Hub:
    """Three workers that know everything."""
    hub = Hub(["a:80"])
    for worker in range(3):
        hub.join(worker)
    return hub


def page(count: int) -> Page:
    registry = CollectorRegistry()
    Counter("n", "N.", registry=registry).inc(count)
    return page_of(registry)


def total(answers: object) -> float:
    assert isinstance(answers, Answers)
    samples = [one for page in answers.pages for family in page for one in family.samples]
    return sum(one.value for one in samples if one.name == "n_total")


def asked(hub: Hub, question: MakeChange | ShowMetrics | ShowReports, *, origin: int = 0) -> int:
    number, _ = hub.ask(origin, Ask(7, question))
    assert number is not None
    return number


def test_a_change_goes_to_all_and_is_confirmed_when_all_have_made_it(hub: Hub) -> None:
    number, outgoing = hub.ask(1, Ask(7, DRAIN))
    assert outgoing == [(worker, Asked(number or 0, DRAIN)) for worker in range(3)]
    assert hub.answer(0, number, ()) == hub.answer(1, number, ()) == []
    assert hub.answer(2, number, ()) == [(1, Answers(7, ()))]


def test_a_change_does_not_wait_for_who_has_died(hub: Hub) -> None:
    number = asked(hub, DRAIN)
    hub.answer(0, number, ())
    hub.answer(1, number, ())
    assert hub.lost(2) == [(0, Answers(7, ()))]


def test_who_has_died_is_told_nothing(hub: Hub) -> None:
    number = asked(hub, DRAIN, origin=2)
    hub.lost(2)
    assert hub.answer(0, number, ()) == hub.answer(1, number, ()) == []


def test_who_does_not_answer_is_given_up(hub: Hub) -> None:
    number = asked(hub, DRAIN)
    hub.answer(0, number, ())
    assert hub.give_up(number) == ({1, 2}, [(0, Answers(7, ()))])
    assert hub.answer(1, number, ()) == []
    assert hub.give_up(number) == (set(), [])


def test_a_newcomer_is_told_what_has_changed(hub: Hub) -> None:
    asked(hub, DRAIN)
    assert hub.join(3) == [(3, Welcome((DRAIN.change,)))]


def told(hub: Hub, *in_file: str) -> tuple[Change, ...]:
    """What a newcomer is told that has these instances from the file."""
    ((_, message),) = hub.join(3, in_file)
    assert isinstance(message, Welcome)
    return message.changes


def file_says(hub: Hub, *changes: Change) -> None:
    hub.ask(0, Ask(7, FileChanged(changes)))


ADD_B = Add(InstanceSpec(url="http://b"))


def test_a_change_of_the_file_goes_to_all_and_nobody_waits(hub: Hub) -> None:
    changed = FileChanged((ADD_B,))
    assert hub.ask(1, Ask(7, changed)) == (None, [(at, Asked(0, changed)) for at in range(3)])


def test_a_newcomer_is_not_told_of_a_drain_that_the_file_has_ended(hub: Hub) -> None:
    hub.join(2, ["b:80"])
    asked(hub, MakeChange(Drain("b:80")))
    file_says(hub, Drain("b:80"))
    file_says(hub, ADD_B)
    assert told(hub, "b:80") == (ADD_B,)


def test_a_newcomer_is_told_of_the_drain_of_what_it_has_from_the_file(hub: Hub) -> None:
    hub.join(2, ["b:80"])
    asked(hub, MakeChange(Drain("b:80")))
    assert told(hub, "b:80") == (Drain("b:80"),)


def test_what_the_file_has_dropped_is_drained_by_a_newcomer_that_is_configured_so(
    hub: Hub,
) -> None:
    file_says(hub, Add(InstanceSpec(url="http://a")))
    file_says(hub, Drain("a:80"))
    assert told(hub) == (Add(InstanceSpec(url="http://a")), Drain("a:80"))


def test_instances_that_come_and_go_are_not_remembered(hub: Hub) -> None:
    for number in range(9):
        add = Add(InstanceSpec(url=f"http://c{number}"))
        asked(hub, MakeChange(add))
        asked(hub, MakeChange(Drain(add.name)))
        file_says(hub, Add(InstanceSpec(url=f"http://d{number}")))
        file_says(hub, Drain(f"d{number}:80"))
        asked(hub, MakeChange(Remove(f"d{number}:80")))
    assert told(hub) == ()


def test_a_doubt_goes_to_the_others_and_nobody_waits(hub: Hub) -> None:
    doubt = Doubt("http://a", tripped=True)
    assert hub.ask(1, Ask(7, doubt)) == (None, [(0, Asked(0, doubt)), (2, Asked(0, doubt))])


def test_the_metrics_are_those_of_all_workers(hub: Hub) -> None:
    number = asked(hub, ShowMetrics())
    hub.answer(0, number, page(1))
    hub.answer(1, number, page(2))
    ((origin, answers),) = hub.answer(2, number, page(4))
    assert (origin, total(answers)) == (0, 7)


def test_reports_are_those_of_who_has_answered(hub: Hub) -> None:
    number = asked(hub, ShowReports())
    hub.answer(0, number, (), b"0")
    hub.answer(2, number, (), b"2")
    assert hub.give_up(number) == ({1}, [(0, Answers(7, (), (b"0", b"2")))])
    assert hub.answer(1, number, (), b"1") == []


def test_a_report_is_told_once_and_not_with_other_answers(hub: Hub) -> None:
    first, second = asked(hub, ShowReports()), asked(hub, ShowReports())
    for worker in range(3):
        hub.answer(worker, first, (), b"old")
    hub.answer(0, second, (), b"new")
    hub.answer(1, second, (), b"new")
    assert hub.answer(2, second, (), b"new") == [(0, Answers(7, (), (b"new",) * 3))]


def test_a_worker_that_is_silent_counts_with_what_it_has_shown_last(hub: Hub) -> None:
    hub.answer(2, None, page(4))
    number = asked(hub, ShowMetrics())
    hub.answer(0, number, page(1))
    hub.answer(1, number, page(2))
    _, ((_, answers),) = hub.give_up(number)
    assert total(answers) == 7


def test_what_workers_had_counted_is_not_forgotten_when_they_die(hub: Hub) -> None:
    for count, worker in ((10, 2), (20, 2)):
        hub.join(worker)
        hub.answer(worker, None, page(count))
        hub.lost(worker)
    number = asked(hub, ShowMetrics())
    hub.answer(0, number, page(1))
    ((_, answers),) = hub.answer(1, number, page(2))
    assert total(answers) == 33
