"""Who sets up a communicator with whom, and when. Pure: no sockets, threads or clocks.

A worker creates its communicators one after the other, and both ends of one must
create it at the same time. With N producers and M consumers, each waiting for another
one, nobody might ever begin. So every worker has one *turn*, and a pair needs the
turns of both of its workers. The worker with the lower id, the pair's leader, takes
its own turn first and then asks for the other's; both queue those who come later.
All pairs thus take turns in ascending order of ids, so no circle of workers can wait
for each other, and no turn is ever refused and asked for again.

::

    leader                          follower
    has its own turn
    REQUEST          ->             queues the pair for its own turn
                     <-  GRANT      when the turn is the pair's
    both create the communicator; each gives its own turn back when that is over
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass


class Step(enum.Enum):
    """What a worker has to do for a pair."""

    REQUEST = enum.auto()  # tell the follower: I have my turn, give me yours
    GRANT = enum.auto()  # tell the leader: you have my turn
    CONNECT = enum.auto()  # both turns are the pair's


@dataclass(frozen=True, slots=True)
class Action:
    """A step, and for which pair."""

    step: Step
    pair: str


class Turns:
    """The turn of one worker, and the pairs that want it. One thread calls all methods."""

    def __init__(self) -> None:
        self._queue: deque[str] = deque()
        self._leading: set[str] = set()
        self._holder: str | None = None

    @property
    def holder(self) -> str | None:
        """The pair that has this worker's turn."""
        return self._holder

    def want(self, pair: str) -> list[Action]:
        """Begin to set up a pair that this worker leads."""
        self._leading.add(pair)
        return self._enqueue(pair)

    def take_request(self, pair: str) -> list[Action]:
        """React to the leader's REQUEST."""
        return self._enqueue(pair)

    def take_grant(self, pair: str) -> list[Action]:
        """React to the follower's GRANT; one that is not awaited is ignored."""
        if pair in self._leading and self._holder == pair:
            return [Action(Step.CONNECT, pair)]
        return []

    def end(self, pair: str) -> list[Action]:
        """Give the turn back, or wait for it no more; unknown pairs are ignored."""
        self._leading.discard(pair)
        if pair in self._queue:
            self._queue.remove(pair)
        if self._holder != pair:
            return []
        self._holder = None
        return self._pass_on()

    def _enqueue(self, pair: str) -> list[Action]:
        if pair == self._holder or pair in self._queue:
            return []
        self._queue.append(pair)
        return self._pass_on()

    def _pass_on(self) -> list[Action]:
        """Give the turn to whoever waits longest, if nobody has it."""
        if self._holder is not None or not self._queue:
            return []
        self._holder = pair = self._queue.popleft()
        if pair in self._leading:
            return [Action(Step.REQUEST, pair)]
        return [Action(Step.GRANT, pair), Action(Step.CONNECT, pair)]
