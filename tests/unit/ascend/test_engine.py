"""Jobs of the engine's thread: what becomes of those that the device does not end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from ascend_vllm_plugin.engine import Engine, Job

from tests.unit.ascend.stand_in_hccl import StandInNpu

if TYPE_CHECKING:
    from ascend_vllm_plugin.backend import EngineEvent

LIMIT_S = 35.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Event:
    is_over = False

    def synchronize(self) -> None:
        assert self.is_over


class Stream:
    """What several jobs have in common."""

    def __init__(self, *, can_abort: bool = True) -> None:
        self.can_abort = can_abort
        self.is_lost = False
        self.num_asked = 0


class Work(Job):
    """A job on a stream, which ends when the test says so."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(self._end)
        self._stream = stream
        self.event = Event()
        self.errors: list[str | None] = []

    def _end(self, error: str | None) -> None:
        self.errors.append(error)

    def issue(self) -> EngineEvent | None:
        return self.event

    @property
    def is_lost(self) -> bool:
        return self._stream.is_lost

    def give_up(self) -> None:
        self._stream.num_asked += 1
        if not self._stream.can_abort:
            raise RuntimeError("no such call")
        self._stream.is_lost = True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock: Clock) -> Iterator[Engine]:
    npu = StandInNpu()
    yield Engine(npu, lambda: None, limit_s=LIMIT_S, clock=clock)
    npu.close()


def issue(engine: Engine, *jobs: Work) -> None:
    for job in jobs:
        engine.put(job)
    engine.pump()


def pump(engine: Engine) -> bool:
    has_ended = engine.pump()
    engine.take_done()
    return has_ended


def test_job_that_ends_in_time_is_not_given_up(engine: Engine, clock: Clock) -> None:
    job = Work(Stream())
    issue(engine, job)
    clock.now += LIMIT_S - 1
    assert not pump(engine)
    job.event.is_over = True
    clock.now += 2
    assert pump(engine)
    assert (job.errors, job.is_left) == ([None], False)


def test_job_that_the_device_does_not_end_fails_at_its_limit(
    engine: Engine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    job = Work(Stream())
    issue(engine, job)
    clock.now += LIMIT_S
    assert pump(engine)
    assert job.errors == ["the device did not end an operation within 35 s"]
    assert job.is_left
    assert "its stream is aborted" in caplog.text
    assert not engine.has_work


def test_jobs_behind_one_that_is_given_up_go_with_it(engine: Engine, clock: Clock) -> None:
    stream = Stream()
    old, young, other = Work(stream), Work(stream), Work(Stream())
    issue(engine, old)
    clock.now += LIMIT_S
    issue(engine, young, other)
    pump(engine)
    assert (len(old.errors), young.errors) == (1, ["its stream was aborted"])
    assert (young.is_left, other.errors) == (True, [])
    assert stream.num_asked == 1


def test_job_that_cannot_be_aborted_is_waited_for_and_has_failed(
    engine: Engine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream(can_abort=False)
    job = Work(stream)
    issue(engine, job)
    for _ in range(3):
        clock.now += LIMIT_S
        assert not pump(engine)
    assert job.errors == []  # its blocks may still be written to
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "restart this instance" in errors[0].getMessage()
    assert (len(errors), stream.num_asked) == (1, 1)
    job.event.is_over = True
    assert pump(engine)
    assert job.errors == ["the device did not end an operation within 35 s"]
    assert not job.is_left


def test_time_in_which_nobody_looked_is_counted(engine: Engine, clock: Clock) -> None:
    job = Work(Stream())
    issue(engine, job)
    clock.now += 1.0
    pump(engine)
    clock.now += 0.25  # a step
    job.event.is_over = True
    pump(engine)
    assert job.unseen_s == 0.25
