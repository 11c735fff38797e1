"""When a pair takes a worker's turn, and when it loses it."""

from __future__ import annotations

import math
import time
from typing import cast

import msgspec
import pytest
from ascend_vllm_plugin.engine import Engine, Job
from ascend_vllm_plugin.jobs import Tools
from ascend_vllm_plugin.pairs import Local, Pair, Pairs
from ascend_vllm_plugin.wire import AnyFrame, Grant, Ready, Request

from tests.unit.ascend.test_settings import OURS
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.links import Direction

LIMIT_S = 30.0
PEER = msgspec.structs.replace(OURS, worker="peer")
LEADING, FOLLOWING = "a", "z"  # before and after the peer's id


class IdleEngine:
    """Takes jobs and runs none."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.is_issuing = False

    def put(self, job: Job) -> None:
        self.jobs.append(job)

    def withdraw(self, job: Job) -> bool:
        if self.is_issuing or job not in self.jobs:
            return False
        self.jobs.remove(job)
        return True


class Worker:
    """The pairs of one worker, and what they say."""

    def __init__(self, worker: str) -> None:
        self.engine = IdleEngine()
        self.sent: list[tuple[Pair, AnyFrame]] = []
        self.failed: list[tuple[Pair, str, bool]] = []
        self.pairs = Pairs(
            Local(worker, cast(Engine, self.engine), cast(Tools, None), LIMIT_S),
            send=lambda pair, frame: self.sent.append((pair, frame)),
            on_up=lambda _: None,
            on_failed=self._fail,
        )

    def _fail(self, pair: Pair, reason: str, has_begun: bool) -> None:
        self.failed.append((pair, reason, has_begun))
        self.pairs.end(pair)

    def begin(self, direction: Direction) -> Pair:
        return self.pairs.begin("session", direction, PEER)

    def frames_of(self, pair: Pair) -> list[AnyFrame]:
        return [frame for its, frame in self.sent if its is pair]


def long_after() -> float:
    return time.monotonic() + LIMIT_S


@pytest.fixture
def leader() -> Worker:
    return Worker(LEADING)


@pytest.fixture
def follower() -> Worker:
    return Worker(FOLLOWING)


def test_consumer_that_leads_takes_its_turn_when_the_producer_has_the_link(
    leader: Worker,
) -> None:
    pair = leader.begin(Direction.RECEIVING)
    assert (leader.sent, leader.pairs.deadline) == ([], math.inf)
    leader.pairs.handle(pair, Ready())
    assert leader.frames_of(pair) == [Request()]


def test_producer_has_the_link_and_says_so(leader: Worker, follower: Worker) -> None:
    assert leader.frames_of(leader.begin(Direction.SENDING)) == [Ready(), Request()]
    assert follower.frames_of(follower.begin(Direction.SENDING)) == [Ready()]


def test_peer_that_cannot_be_reached_holds_up_no_other_one(leader: Worker) -> None:
    leader.begin(Direction.RECEIVING)  # never linked
    other = leader.begin(Direction.RECEIVING)
    leader.pairs.handle(other, Ready())
    leader.pairs.handle(other, Grant())
    assert len(leader.engine.jobs) == 1


def test_consumer_that_says_ready_breaks_the_rules(leader: Worker) -> None:
    pair = leader.begin(Direction.SENDING)
    with pytest.raises(RemoteProtocolError):
        leader.pairs.handle(pair, Ready())


def test_leader_whose_follower_grants_nothing_loses_its_turn(leader: Worker) -> None:
    slow = leader.begin(Direction.SENDING)
    other = leader.begin(Direction.SENDING)
    leader.pairs.expire(time.monotonic())
    assert leader.failed == []
    leader.pairs.expire(long_after())
    assert leader.failed == [(slow, "the peer's engine did not come within 30 s", False)]
    assert leader.frames_of(other) == [Ready(), Request()]


def test_follower_whose_leader_never_comes_loses_its_turn(follower: Worker) -> None:
    slow, other = follower.begin(Direction.SENDING), follower.begin(Direction.SENDING)
    for pair in (slow, other):
        follower.pairs.handle(pair, Request())
    (job,) = follower.engine.jobs
    follower.pairs.expire(long_after())
    assert [pair for pair, _, _ in follower.failed] == [slow]
    assert job not in follower.engine.jobs
    assert follower.frames_of(other) == [Ready(), Grant()]


def test_turn_stays_where_the_engine_works_on_the_communicator(follower: Worker) -> None:
    pair = follower.begin(Direction.SENDING)
    follower.pairs.handle(pair, Request())
    follower.engine.is_issuing = True
    follower.pairs.expire(long_after())
    assert follower.failed == []
