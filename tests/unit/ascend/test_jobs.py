"""Jobs on a stream that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
from ascend_vllm_plugin.backend import Communicator, EngineDevice, EngineEvent, EngineStream
from ascend_vllm_plugin.engine import NotYetError
from ascend_vllm_plugin.jobs import Channel, EndJob


class Recorder:
    """A stream, its events and a communicator on it, all of which note what is called."""

    def __init__(self, *, is_over: bool = True, error: str = "") -> None:
        self.calls: list[str] = []
        self._is_over = is_over
        self._error = error

    def submit(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> EngineEvent:
        self.calls.append("record")
        return cast(EngineEvent, self)

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def handle(self) -> int:
        self.calls.append("drain")
        if self._error:
            raise RuntimeError(self._error)
        return 1

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def destroy(self) -> None:
        self.calls.append("destroy")

    def take_back(self, _: object) -> None:
        self.calls.append("take back")

    def channel(self) -> Channel:
        return Channel(cast(Communicator, self), cast(EngineStream, self))


def end_job(recorder: Recorder) -> EndJob:
    return EndJob(recorder.channel(), cast(EngineDevice, recorder))


def test_queue_is_drained_between_the_last_event_and_the_end_of_a_communicator() -> None:
    recorder = Recorder()
    end_job(recorder).issue()
    assert recorder.calls == ["record", "synchronize", "drain", "destroy", "take back"]


def test_communicator_of_a_stream_that_failed_is_destroyed_and_the_stream_not_used_again() -> None:
    recorder = Recorder(error="the device failed")
    end_job(recorder).issue()
    assert recorder.calls[-1] == "destroy"


def test_communicator_in_use_is_not_destroyed() -> None:
    recorder = Recorder(is_over=False)
    with pytest.raises(NotYetError):
        end_job(recorder).issue()
    assert recorder.calls == ["record"]
