from __future__ import annotations

import msgspec
import pytest

from vllm_pd.config import Role
from vllm_pd.router.activity import SLICE_S, Activity, Tally, Timed, window_of
from vllm_pd.router.health import BreakerState
from vllm_pd.router.instance import State
from vllm_pd.router.reports import Finding, Queue, Report, merged

URL = "http://a:80"
NOW = 1000.0


def finding(*, accepting: bool = True, num_failed: int = 0, failed_at: float = 0.0) -> Finding:
    return Finding(
        accepting,
        State.HEALTHY if accepting else State.UNHEALTHY,
        BreakerState.CLOSED,
        num_failed,
        f"at {failed_at}" if failed_at else "",
        failed_at or None,
    )


def busy(now: float, *codes: str) -> Report:
    """A process that has just answered requests, in a second each."""
    activity = Activity(lambda: now)
    for code in codes:
        activity.count(Tally.CODE, code)
        activity.time(Timed.REQUEST, 1.0)
    return Report(slices=activity.slices)


def test_nobody_says_nothing() -> None:
    assert merged([]) == Report(queues=dict.fromkeys(Role, Queue()))


def test_what_is_open_is_added_up() -> None:
    reports = [
        Report(in_flight=3, queues={Role.DECODE: Queue(1, 2)}),
        Report(in_flight=4, queues={Role.DECODE: Queue(10, 20), Role.PREFILL: Queue(5, 5)}),
    ]
    whole = merged(reports)
    assert whole.in_flight == 7
    assert whole.queues == {Role.DECODE: Queue(11, 22), Role.PREFILL: Queue(5, 5)}


def test_the_router_is_as_old_as_its_oldest_process() -> None:
    assert merged([Report(age_s=5.0), Report(age_s=600.0), Report(age_s=1.0)]).age_s == 600.0


def test_slices_of_the_same_time_are_one() -> None:
    whole = merged([busy(NOW, "200", "503"), busy(NOW, "200"), busy(NOW - SLICE_S, "200")])
    *_, before, last = window_of(whole.slices, NOW)
    assert last.counts == {(Tally.CODE, "200"): 2, (Tally.CODE, "503"): 1}
    assert before.counts == {(Tally.CODE, "200"): 1}
    assert last.spreads[Timed.REQUEST].num == 3


def test_putting_slices_together_does_not_change_them() -> None:
    report = busy(NOW, "200")
    for _ in range(2):
        assert window_of([*report.slices, *report.slices], NOW)[-1].total(Tally.CODE) == 2


def test_an_instance_is_as_bad_as_the_process_says_that_sends_it_nothing() -> None:
    for findings in ([finding(), finding(accepting=False)], [finding(accepting=False), finding()]):
        found = merged([Report(findings={URL: one}) for one in findings]).findings[URL]
        assert (found.accepting, found.state) == (False, State.UNHEALTHY)


def test_failures_of_an_instance_are_added_up_and_the_latest_is_told() -> None:
    findings = [
        finding(num_failed=2, failed_at=7.0),
        finding(num_failed=1, failed_at=9.0),
        finding(),
    ]
    found = merged([Report(findings={URL: one}) for one in findings]).findings[URL]
    assert (found.num_failed, found.last_failure, found.failed_at) == (3, "at 9.0", 9.0)


def test_an_instance_that_not_all_know_is_there() -> None:
    whole = merged([Report(), Report(findings={URL: finding()})])
    assert list(whole.findings) == [URL]


@pytest.mark.parametrize("report", [Report(), busy(NOW, "200", "503")])
def test_a_report_is_the_same_in_another_process(report: Report) -> None:
    sent = msgspec.structs.replace(
        report, queues={Role.DECODE: Queue(1, 2)}, findings={URL: finding(num_failed=1)}
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Report) == sent
