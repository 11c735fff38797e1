"""Two engines meet, whichever thread is late, and nobody waits for one that has left."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from ascend_vllm_plugin.backend import HcclError
from ascend_vllm_plugin.meeting import Meeting
from ascend_vllm_plugin.wire import Begin, Coming, Present, Retract, Retracted, SetUpFrame

from vllm_pd.errors import RemoteProtocolError

LONG_S = 30.0
ROOT = b"root"


class Side:
    """A meeting whose frames wait in a queue until the test delivers them."""

    def __init__(self, *, is_leader: bool) -> None:
        self.sent: deque[SetUpFrame] = deque()
        self._has_sent = threading.Condition()
        self.meeting = Meeting(is_leader=is_leader, post=self._post)

    def _post(self, frame: SetUpFrame) -> None:
        with self._has_sent:
            self.sent.append(frame)
            self._has_sent.notify_all()

    def next_frame(self) -> SetUpFrame:
        with self._has_sent:
            assert self._has_sent.wait_for(lambda: bool(self.sent), LONG_S)
            return self.sent.popleft()


@pytest.fixture
def leader() -> Side:
    return Side(is_leader=True)


@pytest.fixture
def follower() -> Side:
    return Side(is_leader=False)


class Threads:
    """Runs what an engine's thread does."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def run(self, work: Callable[[], object]) -> Future[object]:
        return self._pool.submit(work)


@pytest.fixture
def engines() -> object:
    with ThreadPoolExecutor(2) as pool:
        yield Threads(pool)


def lead(side: Side) -> None:
    assert side.meeting.attend(LONG_S)
    side.meeting.begin(ROOT)


def test_both_go_on_when_both_are_there(leader: Side, follower: Side, engines: Threads) -> None:
    leading = engines.run(lambda: lead(leader))
    following = engines.run(lambda: follower.meeting.attend(LONG_S))
    leader.meeting.handle(follower.next_frame())
    begin = leader.next_frame()
    assert begin == Begin(root=ROOT)
    follower.meeting.handle(begin)
    assert following.result(LONG_S) is True
    coming = follower.next_frame()
    assert coming == Coming()
    before = leader.meeting.is_settled
    leader.meeting.handle(coming)
    leading.result(LONG_S)
    assert (before, leader.meeting.is_settled, follower.meeting.is_settled) == (False, True, True)
    assert follower.meeting.root == ROOT


def test_leader_does_not_wait_long_for_a_follower(leader: Side) -> None:
    assert leader.meeting.attend(0.0) is False
    assert not leader.sent


def test_follower_that_must_go_on_asks_for_leave(
    leader: Side, follower: Side, engines: Threads
) -> None:
    following = engines.run(lambda: follower.meeting.attend(0.0))
    assert isinstance(follower.next_frame(), Present)
    retract = follower.next_frame()
    assert isinstance(retract, Retract)
    leader.meeting.handle(Present())
    leader.meeting.handle(retract)
    answer = leader.next_frame()
    assert isinstance(answer, Retracted)
    follower.meeting.handle(answer)
    assert following.result(LONG_S) is False
    assert leader.meeting.attend(0.0) is False


def test_leave_that_crosses_with_begin_is_not_given(
    leader: Side, follower: Side, engines: Threads
) -> None:
    following = engines.run(lambda: follower.meeting.attend(0.0))
    leader.meeting.handle(follower.next_frame())
    leading = engines.run(lambda: lead(leader))
    begin = leader.next_frame()
    leader.meeting.handle(follower.next_frame())  # the Retract
    assert not leader.sent
    follower.meeting.handle(begin)
    assert following.result(LONG_S) is True
    leader.meeting.handle(follower.next_frame())
    leading.result(LONG_S)


def test_follower_can_come_again(leader: Side, follower: Side, engines: Threads) -> None:
    for _ in range(2):
        following = engines.run(lambda: follower.meeting.attend(0.0))
        leader.meeting.handle(follower.next_frame())
        leader.meeting.handle(follower.next_frame())
        follower.meeting.handle(leader.next_frame())
        assert following.result(LONG_S) is False


@pytest.mark.parametrize("is_leader", [True, False])
def test_nobody_waits_for_a_peer_that_is_gone(is_leader: bool, engines: Threads) -> None:
    side = Side(is_leader=is_leader)
    waiting = engines.run(lambda: side.meeting.attend(LONG_S))
    side.meeting.close()
    with pytest.raises(HcclError, match="the peer is gone"):
        waiting.result(LONG_S)


def test_leader_does_not_begin_alone_where_the_follower_leaves(
    leader: Side, engines: Threads
) -> None:
    leader.meeting.handle(Present())
    leading = engines.run(lambda: lead(leader))
    leader.next_frame()
    leader.meeting.close()
    with pytest.raises(HcclError, match="the peer is gone"):
        leading.result(LONG_S)
    assert not leader.meeting.is_settled


@pytest.mark.parametrize(
    ("is_leader", "frame"),
    [
        (True, Begin(root=ROOT)),
        (True, Retracted()),
        (True, Coming()),  # Begin was not sent
        (False, Present()),
        (False, Retract()),
        (False, Coming()),
    ],
)
def test_frame_for_the_other_side_blames_the_peer(is_leader: bool, frame: SetUpFrame) -> None:
    with pytest.raises(RemoteProtocolError):
        Side(is_leader=is_leader).meeting.handle(frame)
