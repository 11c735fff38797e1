"""From a link between two workers to a communicator between their NPUs.

A pair wants turns only when both workers have the link, so that nobody's turn waits for a
peer that cannot be reached; and one that has a turn and does not get on loses it, after
as long as a transfer may take. What HCCL itself has begun ends with HCCL's own timeout.

Runs on the session's thread; the communicator itself is created by the engine's. When
both workers have their turn, see ``turns``, both put a job for their engines, which
meet, see ``meeting``.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ascend_vllm_plugin.engine import Engine
from ascend_vllm_plugin.jobs import Channel, ConnectJob, EndJob, Tools
from ascend_vllm_plugin.meeting import Meeting
from ascend_vllm_plugin.turns import Action, Step, Turns
from ascend_vllm_plugin.wire import (
    Address,
    AnyFrame,
    Grant,
    Ready,
    Request,
    SetUpFrame,
    TurnFrame,
)
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.links import Direction

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Pair:
    """This worker and another one, in one direction of transfers.

    Attributes:
        name: unique on this worker, also over time.
        peer_id: the session's.
        direction: which half of transfers is here.
        address: of the other one.
        meeting: of the engines.
        job: what creates the communicator, once both have their turn.
        channel: once it is created, until the pair ends.
        turn_since: when it got this worker's turn, of ``time.monotonic``.
        started: when the job was put, likewise.
        blocked_s: time that HCCL held the engine for it.
        is_over: the link is lost; a new link is a new pair.
    """

    name: str
    peer_id: str
    direction: Direction
    address: Address
    meeting: Meeting
    job: ConnectJob | None = None
    channel: Channel | None = None
    turn_since: float = 0.0
    started: float = 0.0
    blocked_s: float = 0.0
    is_over: bool = False

    @property
    def worker(self) -> str:
        """Id of the other one."""
        return self.address.worker


@dataclass(frozen=True, slots=True)
class Local:
    """What a worker's pairs have in common.

    Attributes:
        worker: id of this worker.
        engine: runs the jobs.
        tools: create communicators.
        limit_s: longest time that a pair has the worker's turn and does not get on.
    """

    worker: str
    engine: Engine
    tools: Tools
    limit_s: float


class Pairs:
    """All pairs of a worker that are being set up or in use.

    Args:
        local: this worker.
        send: sends a frame to the pair's peer, from any thread.
        on_up: called with a pair that can be used.
        on_failed: called with a pair that could not be set up, why, and whether HCCL was
            asked for it.
    """

    def __init__(
        self,
        local: Local,
        *,
        send: Callable[[Pair, AnyFrame], None],
        on_up: Callable[[Pair], None],
        on_failed: Callable[[Pair, str, bool], None],
    ) -> None:
        self._local = local
        self._send = send
        self._on_up = on_up
        self._on_failed = on_failed
        self._turns = Turns()
        self._pairs: dict[str, Pair] = {}
        self._numbers = itertools.count()

    @property
    def deadline(self) -> float:
        """When ``expire`` has something to do, of ``time.monotonic``; any thread may ask."""
        pair = self._pairs.get(self._turns.holder or "")
        return math.inf if pair is None else pair.turn_since + self._local.limit_s

    def expire(self, now: float) -> None:
        """Take the turn from a pair that does not get on; it has failed.

        Args:
            now: of ``time.monotonic``.
        """
        if now < self.deadline:
            return
        pair = self._pairs[self._turns.holder or ""]
        if pair.job is not None and not self._local.engine.withdraw(pair.job):
            return  # HCCL has begun, or the engine's thread just looks for the peer's
        pair.job = None
        reason = f"the peer's engine did not come within {self._local.limit_s:g} s"
        has_begun = False
        self._on_failed(pair, reason, has_begun)

    def begin(self, peer_id: str, direction: Direction, address: Address) -> Pair:
        """Set a pair up; return it. A producer has the link, a consumer may still wait for it."""
        pair: Pair

        def post(frame: SetUpFrame) -> None:
            self._send(pair, frame)

        is_leader = self._local.worker < address.worker
        name = f"{next(self._numbers)}:{direction.name}:{peer_id}"
        pair = Pair(name, peer_id, direction, address, Meeting(is_leader=is_leader, post=post))
        self._pairs[pair.name] = pair
        if direction is Direction.SENDING:
            self._send(pair, Ready())
            self._want(pair)
        return pair

    def _want(self, pair: Pair) -> None:
        """Both workers have the link."""
        if pair.meeting.is_leader:
            self._take(self._turns.want(pair.name))

    def handle(self, pair: Pair, frame: TurnFrame | SetUpFrame) -> None:
        """React to a frame of the peer.

        Raises:
            RemoteProtocolError: it is not allowed here.
        """
        if isinstance(frame, Ready):
            if pair.direction is Direction.SENDING:
                raise RemoteProtocolError("Ready from a consumer")
            if pair.job is not None or pair.channel is not None:
                raise RemoteProtocolError("Ready for a pair that has its turn already")
            self._want(pair)
        elif isinstance(frame, Request):
            if pair.meeting.is_leader:
                raise RemoteProtocolError("Request from the follower")
            self._take(self._turns.take_request(pair.name))
        elif isinstance(frame, Grant):
            self._take(self._turns.take_grant(pair.name))
        else:
            pair.meeting.handle(frame)

    def end(self, pair: Pair) -> None:
        """Forget a pair whose link is lost; its communicator ends after what uses it."""
        if pair.is_over:
            return
        pair.is_over = True
        self._pairs.pop(pair.name, None)
        pair.meeting.close()
        if pair.job is None or self._local.engine.withdraw(pair.job):
            self._take(self._turns.end(pair.name))
        if pair.channel is not None:
            self._put_end(pair.channel)

    def close(self) -> None:
        """Let no engine wait for a meeting any more."""
        for pair in self._pairs.values():
            pair.meeting.close()

    def _put_end(self, channel: Channel) -> None:
        self._local.engine.put(EndJob(channel, self._local.tools.device))

    def _take(self, actions: list[Action]) -> None:
        for action in actions:
            pair = self._pairs[action.pair]
            match action.step:
                case Step.REQUEST:
                    pair.turn_since = time.monotonic()
                    self._send(pair, Request())
                case Step.GRANT:
                    pair.turn_since = time.monotonic()
                    self._send(pair, Grant())
                case Step.CONNECT:
                    self._connect(pair)

    def _connect(self, pair: Pair) -> None:
        local = self._local
        pair.started = time.monotonic()
        pair.job = ConnectJob(
            lambda error: self._finish(pair, error),
            meeting=pair.meeting,
            tools=local.tools,
            sends=pair.direction is Direction.SENDING,
        )
        local.engine.put(pair.job)

    def _finish(self, pair: Pair, error: str | None) -> None:
        """Take note of the end of a set-up."""
        assert pair.job is not None
        job, pair.job = pair.job, None
        pair.blocked_s = job.blocked_s
        self._take(self._turns.end(pair.name))
        if job.channel is not None and (error is not None or pair.is_over):
            self._put_end(job.channel)
        if error is not None:
            self._on_failed(pair, error, pair.meeting.is_settled)
        elif not pair.is_over:
            pair.channel = job.channel
            logger.info(
                "hccl: communicator with worker %s (%s), made in %.0f ms",
                pair.worker,
                self._local.tools.backend.settings,
                (time.monotonic() - pair.started) * 1e3,
            )
            self._on_up(pair)
