"""The soak's traffic and judgement; nothing is started."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.endurance import judge, traffic
from benchmarks.endurance.clients import (
    BROKEN_OFF,
    LOST,
    MIX,
    RIGHT,
    LostError,
    Tally,
    judge_stream,
)
from benchmarks.endurance.judge import Rest, Sample, Soak
from benchmarks.endurance.traffic import Shape
from vllm_pd.router import body as bodies
from vllm_pd.router.replies import error_event

SHAPE = Shape(num_chunks=3, chunk_len=80)
END = traffic.DONE + b"\n\n"


def samples(*megabytes: float) -> list[Sample]:
    return [Sample(float(at), int(length * 1e6), 10) for at, length in enumerate(megabytes)]


def passed() -> Soak:
    """A soak that shows nothing bad."""
    tally = Tally({"whole": Counter({RIGHT: 5})}, [], [1.0] * 5)
    rest = Rest(num_fds=15, num_tasks=20, num_requests=0)
    return Soak(10.0, tally, {"decode": 1}, samples(*[50.0] * 10), rest, rest, 0)


def events(count: int, request_id: str = "r-1") -> bytes:
    return b"".join(traffic.event(request_id, i, SHAPE) for i in range(count))


def legs_of(request: bytes, transfer_id: str = "t-1") -> tuple[bytes, bytes]:
    """Return the legs that the router makes, the prefill leg and the decode leg."""
    body = bodies.parse(request)
    assert body is not None
    members = bodies.verbatim(request, body)
    params = bodies.kv_params_of(traffic.prefill_answer("r-1", "engine-1"))
    return (
        bodies.dump(bodies.prefill_body(members, transfer_id, path=traffic.PATH)),
        bodies.dump(bodies.decode_body(members, params)),
    )


def test_instance_reads_what_the_router_makes_of_a_request() -> None:
    prefill, decode = legs_of(traffic.request_body("once " * 5000, SHAPE, stream=True))

    asked = traffic.read_leg(prefill)
    assert (asked.is_prefill, asked.is_intact, asked.stream) == (True, True, False)
    asked = traffic.read_leg(decode)
    assert (asked.is_prefill, asked.is_intact, asked.stream) == (False, True, True)
    assert (asked.prefilled_for, asked.shape) == ("r-1", SHAPE)


def test_instance_sees_a_damaged_prompt() -> None:
    request = traffic.request_body("once upon", SHAPE, stream=False)

    assert not traffic.read_leg(request.replace(b"once", b"onve")).is_intact


@pytest.mark.parametrize("leg", [b"{}", b"", b'{"prompt":"x"}', b'{"prompt":"x","user":1'])
def test_what_is_no_leg_is_told(leg: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        traffic.read_leg(leg)


def test_whole_answer_of_another_request_is_not_right() -> None:
    answer = traffic.whole_answer("r-1", SHAPE)

    assert traffic.is_right(answer, "r-1", SHAPE)
    assert not traffic.is_right(answer, "r-2", SHAPE)
    assert not traffic.is_right(answer[:-1], "r-1", SHAPE)


def test_stream_that_is_complete_is_right() -> None:
    assert traffic.check_stream(events(3) + END, "r-1", SHAPE) is None


@pytest.mark.parametrize("count", [0, 2, 3])
def test_error_event_ends_a_stream_wherever_it_broke_off(count: int) -> None:
    stream = events(count) + error_event(502, "The decode instance failed.")

    assert traffic.check_stream(stream, "r-1", SHAPE) == count


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        events(3),
        events(2) + END,
        events(4) + END,
        events(3) + END + events(1),
        events(3)[:-9],
        events(3) + END[:-2],
        events(1) + events(2) + END,
        events(1) + events(1, "r-2"),
        events(1) + error_event(502, "x") + END,
    ],
)
def test_stream_with_anything_wrong_is_refused(stream: bytes) -> None:
    with pytest.raises(ValueError, match=r"event|stream"):
        traffic.check_stream(stream, "r-1", SHAPE)


def broken_off(count: int) -> bytes:
    return events(count) + error_event(502, "The decode instance failed.")


def test_stream_may_break_off_if_the_process_that_sent_it_was_killed() -> None:
    found = judge_stream(broken_off(2), "r-1", SHAPE, sender="a-1", killed={"a-1": "decode"})

    assert found == BROKEN_OFF


@pytest.mark.parametrize("sender", ["a-2", "b-1", None])
def test_stream_that_breaks_off_is_lost_though_another_process_was_killed(
    sender: str | None,
) -> None:
    with pytest.raises(LostError, match="was not killed"):
        judge_stream(broken_off(2), "r-1", SHAPE, sender=sender, killed={"a-1": "decode"})


def test_stream_that_breaks_off_before_it_begins_is_lost_whoever_was_killed() -> None:
    with pytest.raises(LostError, match="could be retried"):
        judge_stream(broken_off(0), "r-1", SHAPE, sender="a-1", killed={"a-1": "decode"})


def test_complete_stream_of_a_killed_process_is_right() -> None:
    found = judge_stream(events(3) + END, "r-1", SHAPE, sender="a-1", killed={"a-1": "decode"})

    assert found == RIGHT


def test_soak_that_shows_nothing_bad_has_no_failures() -> None:
    assert judge.failures(passed()) == []


def test_lost_requests_are_failures_also_those_beyond_the_ones_described() -> None:
    tally = Tally()
    for number in range(25):
        tally.note("whole", LOST, f"number {number}")

    found = judge.failures(replace(passed(), tally=tally))

    assert found[0] == "lost: whole: number 0"
    assert found[-1] == "lost: 5 more requests"


def test_soak_without_requests_is_a_failure() -> None:
    assert judge.failures(replace(passed(), tally=Tally())) == ["nobody asked anything"]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (Rest(16, 20, 0), "16 descriptors are open, 15 before"),
        (Rest(15, 21, 0), "21 tasks are left, 20 before"),
        (Rest(15, 20, 2), "2 requests seem to be open"),
    ],
)
def test_what_is_left_is_a_failure(after: Rest, words: str) -> None:
    assert judge.failures(replace(passed(), after=after)) == [words]


def test_traceback_in_the_log_is_a_failure() -> None:
    found = judge.failures(replace(passed(), num_tracebacks=2))

    assert found == ["2 tracebacks in the router's log"]


def test_memory_may_rise_while_it_warms_up_and_not_later() -> None:
    warming = samples(50, 90, 120, 140, *[150] * 16)
    leaking = samples(*(50 + 5 * i for i in range(20)))

    assert judge.failures(replace(passed(), samples=warming)) == []
    (found,) = judge.failures(replace(passed(), samples=leaking))
    assert "memory grew by" in found


def test_growth_is_that_of_the_floor_and_not_of_peaks() -> None:
    assert judge.growth_len(samples(*[50] * 10, *[51, 90] * 5)) == 1_000_000
    assert judge.growth_len(samples(*[50, 90] * 5, *[50] * 10)) == 0


def test_a_single_sample_shows_no_growth() -> None:
    assert judge.growth_len(samples(50)) == 0


def test_report_shows_the_floor_of_memory_over_the_time() -> None:
    report = judge.report(replace(passed(), samples=samples(*[50, 60] * 5, *[70, 90] * 5)))

    assert report["memory_mb"]["least_by_tenth"] == [50.0] * 5 + [70.0] * 5


def test_report_is_plain_data() -> None:
    report = judge.report(passed())

    assert json.loads(json.dumps(report)) == report
    assert (report["num_requests"], report[LOST], report["failures"]) == (5, 0, [])


def test_shares_of_the_clients_are_percent() -> None:
    assert sum(MIX.values()) == 100


@pytest.mark.parametrize(
    "argv", [["--seconds", "0"], ["--kill-percent", "101"], ["--json", "/no/such/folder/x.json"]]
)
def test_wrong_option_ends_the_program(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        soak.parse_options(argv)

    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_options_are_read(tmp_path: Path) -> None:
    options = soak.parse_options(["--seconds", "30", "--json", str(tmp_path / "x.json")])

    assert (options.seconds, options.kill_chance) == (30, 0.01)
    assert options.json_file == tmp_path / "x.json"
