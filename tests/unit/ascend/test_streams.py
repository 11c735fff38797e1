"""Streams of communicators: used again where they ended well, and never where they did not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from ascend_vllm_plugin.backend import Backend, Communicator, EngineStream, HcclError
from ascend_vllm_plugin.device import MAX_STREAMS, POOL_LEN, StreamPool
from ascend_vllm_plugin.engine import Engine
from ascend_vllm_plugin.jobs import ConnectJob, EndJob, Tools
from ascend_vllm_plugin.meeting import Meeting
from ascend_vllm_plugin.transport import MAX_PAIRS
from ascend_vllm_plugin.wire import Begin

from tests.unit.ascend.stand_in_hccl import StandInNpu

if TYPE_CHECKING:
    import torch

LIMIT_S = 30.0


@dataclass
class Stream:
    number: int


class TorchPool:
    """Hands out its streams in turn for ever."""

    def __init__(self) -> None:
        self._numbers = itertools.cycle(range(POOL_LEN))

    def draw(self) -> Stream:
        return Stream(next(self._numbers))


class Scripted(Backend, Communicator):
    """Makes communicators, which are all itself.

    Attributes:
        error: what the first operation raises.
    """

    name = "scripted"
    settings = ""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.num_destroyed = 0

    def make_root(self) -> bytes:
        return b"root"

    def connect(self, root: bytes, *, is_leader: bool) -> Communicator:
        return self

    def send(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        if self.error is not None:
            raise self.error
        stream.submit(lambda: None)

    def recv(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        self.send(tensor, stream)

    def check(self) -> None:
        pass

    def destroy(self) -> None:
        self.num_destroyed += 1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An engine, and set-ups in which the peer is there already or does not come."""

    def __init__(self) -> None:
        self.npu = StandInNpu()
        self.backend = Scripted()
        self.clock = Clock()
        self.engine = Engine(self.npu, lambda: None, limit_s=LIMIT_S, clock=self.clock)
        warm = self.npu.allocate_device(1)
        self._tools = Tools(self.backend, self.npu, self.npu.mark(), warm)
        self.errors: list[str | None] = []

    def put(self, *, is_peer_here: bool = True) -> ConnectJob:
        meeting = Meeting(is_leader=not is_peer_here, post=lambda _: None)
        if is_peer_here:
            meeting.handle(Begin(root=b"root"))
        job = ConnectJob(self.errors.append, meeting=meeting, tools=self._tools, sends=True)
        self.engine.put(job)
        return job

    def connect(self) -> ConnectJob:
        job = self.put()
        self.run()
        return job

    def end(self, job: ConnectJob) -> None:
        assert job.channel is not None
        self.engine.put(EndJob(job.channel, self.npu))
        self.run()

    def run(self) -> None:
        """Pump until nothing is left to do."""
        while self.engine.has_work:
            self.engine.pump()
        self.engine.take_done()

    def close(self) -> None:
        self.npu.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_communicators_that_come_and_go_take_no_more_streams_than_there_are_at_once(
    bench: Bench,
) -> None:
    for _ in range(100):
        bench.end(bench.connect())
    together = [bench.connect() for _ in range(MAX_PAIRS)]
    for job in together:
        bench.end(job)
    assert bench.backend.num_destroyed == 100 + MAX_PAIRS
    assert bench.npu.num_drawn == MAX_PAIRS


def test_communicators_at_the_same_time_have_different_streams(bench: Bench) -> None:
    channels = [bench.connect().channel for _ in range(MAX_PAIRS)]
    assert len({id(channel.stream) for channel in channels if channel}) == MAX_PAIRS


@pytest.mark.parametrize("error", [HcclError("refused"), TypeError("a bug")])
def test_set_up_that_fails_gives_its_stream_back_and_destroys_its_communicator(
    bench: Bench, error: Exception
) -> None:
    bench.backend.error = error
    for _ in range(100):
        bench.connect()
    assert bench.errors == [str(error)] * 100
    assert (bench.backend.num_destroyed, bench.npu.num_drawn) == (100, 1)


def test_set_up_that_is_withdrawn_has_given_its_stream_back(bench: Bench) -> None:
    for _ in range(3):
        job = bench.put(is_peer_here=False)
        bench.engine.pump()
        assert bench.engine.withdraw(job)
    bench.connect()
    assert bench.npu.num_drawn == 1


def test_stream_whose_operation_failed_is_not_used_again(bench: Bench) -> None:
    bench.npu.break_next(RuntimeError("execution timeout"))
    bench.end(bench.connect())
    bench.end(bench.connect())
    assert bench.errors == ["execution timeout", None]
    assert bench.npu.num_drawn == 2


@pytest.mark.parametrize("error", [None, HcclError("refused")])
def test_stream_that_was_aborted_is_not_used_again(bench: Bench, error: HcclError | None) -> None:
    bench.backend.error = error
    bench.npu.hold()
    job = bench.put()
    bench.engine.pump()
    bench.clock.now += LIMIT_S
    bench.run()
    bench.npu.resume()
    assert (bench.npu.num_aborted, job.is_left) == (1, True)
    bench.backend.error = None
    bench.connect()
    assert bench.npu.num_drawn == 2


def test_pool_of_torch_that_goes_round_gives_no_stream_twice() -> None:
    torch_pool = TorchPool()
    pool = StreamPool(torch_pool.draw)
    taken = []
    for _ in range(MAX_STREAMS):
        taken.append(pool.take().number)
        for _ in range(POOL_LEN - 1):  # others draw, too
            torch_pool.draw()
    assert len(set(taken)) == MAX_STREAMS


def test_pool_without_a_stream_that_is_well_says_so() -> None:
    pool = StreamPool(TorchPool().draw)
    streams = [pool.take() for _ in range(MAX_STREAMS)]
    assert not pool.has_more
    with pytest.raises(RuntimeError, match="24 streams are in use or did not end well"):
        pool.take()
    pool.put(streams[0])
    assert pool.take() is streams[0]
