"""A transport on a bad day: any other one, with faults that ``VLLM_PD_FAULTS`` asks for.

The faults are those of networks, memory and peers, not those of a broken backend:
also with them the contract of ``Transport`` holds. What was dropped fails when its
peer is removed, outcomes come in the order of posting, and bytes are damaged
before they are verified.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vllm_pd.config import Digests
from vllm_pd.errors import LocalProtocolError, PDError, PeerLostError, TransferError
from vllm_pd.transport.base import (
    Heads,
    KVRegion,
    TransferOutcome,
    Transport,
    TransportOptions,
    check_selection,
)
from vllm_pd.transport.fault_spec import MEMFD, FaultSpec
from vllm_pd.transport.links import Direction
from vllm_pd.transport.timer import Timer

logger = logging.getLogger(__name__)


class _Dice:
    """Decisions of one kind; the n-th is the same in every run with the same seed."""

    def __init__(self, seed: int, name: str, probability: float) -> None:
        self._random = random.Random(f"{seed}/{name}")
        self._probability = probability
        self._lock = threading.Lock()  # bytes arrive on several threads

    def throw(self) -> bool:
        """Decide."""
        with self._lock:
            return self._random.random() < self._probability

    def below(self, end: int) -> int:
        """Return a number from 0 on."""
        with self._lock:
            return self._random.randrange(end)


class _State(enum.Enum):
    """Life of one half of a transfer."""

    HELD = enum.auto()  # not handed to the transport yet
    DROPPED = enum.auto()  # nor will it be
    POSTED = enum.auto()
    OVER = enum.auto()


@dataclass(slots=True, eq=False)
class _Half:
    """One half of a transfer.

    Attributes:
        transfer_id: the same on both sides.
        post: hands it to the transport.
        state: where it is.
        due: when to post it.
        may_be_passed: whether those behind it need not wait for it.
        cuts: whether the links are cut once it is posted.
        outcome: its end, once it is over.
    """

    transfer_id: int
    post: Callable[[], None]
    state: _State = _State.HELD
    due: float = 0.0
    may_be_passed: bool = False
    cuts: bool = False
    outcome: TransferOutcome | None = None


_Key = tuple[str, Direction]


class FaultyTransport(Transport):
    """Hands halves of transfers to another transport: late, in another order, or never.

    Args:
        inner: the transport; closed by ``close``.
        spec: the faults. ``corrupt`` and ``refuse`` are not among those injected here,
            see ``faulty_options``.
    """

    def __init__(self, inner: Transport, spec: FaultSpec) -> None:
        self._inner = inner
        self._spec = spec
        self.needs_pump = inner.needs_pump
        self.name = inner.name  # type: ignore[misc]  # stands for it, in the handshake too
        self._regions: Sequence[KVRegion] = ()
        self._peers: set[str] = set()
        self._cut: set[str] = set()  # peers that the inner transport has lost by our doing
        self._halves: dict[_Key, deque[_Half]] = {}
        self._dice = {
            (direction, name): _Dice(spec.seed, f"{self.name}/{direction.name}/{name}", chance)
            for direction in Direction
            for name, chance in (
                ("drop", spec.drop),
                ("delay", spec.delay),
                ("reorder", spec.reorder),
                ("cut", spec.cut),
            )
        }
        self._timer = Timer()
        self._epoll = select.epoll()
        self._epoll.register(self._timer.fileno(), select.EPOLLIN)

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        self._inner.register_regions(regions)
        self._regions = tuple(regions)
        self._epoll.register(self._inner.fileno(), select.EPOLLIN)

    def local_endpoint(self) -> bytes:  # noqa: D102
        return self._inner.local_endpoint()

    def can_reach(self, endpoint: bytes) -> bool:  # noqa: D102
        return self._inner.can_reach(endpoint)

    @property
    def mode(self) -> tuple[str, str]:  # noqa: D102
        mode, reason = self._inner.mode
        return mode, "; ".join(part for part in (reason, f"faults: {self._spec}") if part)

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:  # noqa: D102
        if peer_id in self._cut:
            raise LocalProtocolError(f"peer {peer_id} is there already")
        self._inner.add_peer(peer_id, endpoint)
        self._peers.add(peer_id)

    def remove_peer(self, peer_id: str) -> None:  # noqa: D102
        self._inner.remove_peer(peer_id)
        self._peers.discard(peer_id)
        self._cut.discard(peer_id)
        self._fail(peer_id, f"peer {peer_id} was removed")
        self._wake()

    def send_blocks(  # noqa: D102
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        def post() -> None:
            self._inner.send_blocks(peer_id, transfer_id, block_ids, heads=heads, digests=digests)

        check_selection(self._regions, block_ids, heads)
        self._take((peer_id, Direction.SENDING), _Half(transfer_id, post))

    def recv_blocks(  # noqa: D102
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        def post() -> None:
            self._inner.recv_blocks(peer_id, transfer_id, block_ids, heads=heads, digests=digests)

        check_selection(self._regions, block_ids, heads)
        self._take((peer_id, Direction.RECEIVING), _Half(transfer_id, post))

    def fileno(self) -> int:  # noqa: D102
        return self._epoll.fileno()

    def poll(self) -> list[TransferOutcome]:  # noqa: D102
        now = time.monotonic()
        for peer_id in {key[0] for key, queue in self._halves.items() if _has_cut(queue)}:
            self._cut_links(peer_id)
        for key in list(self._halves):
            self._post_due(key, now)
        strays = [outcome for outcome in self._inner.poll() if not self._record(outcome)]
        outcomes = strays + self._drain()
        self._wake()
        return outcomes

    def pump(self) -> bool:  # noqa: D102
        return self._inner.pump()

    def close(self) -> None:  # noqa: D102
        self._inner.close()
        for peer_id in {peer_id for peer_id, _ in self._halves}:
            self._fail(peer_id, "the transport was closed")
        self._peers.clear()
        self._cut.clear()
        self._timer.close()
        self._epoll.close()

    def _take(self, key: _Key, half: _Half) -> None:
        """Let chance decide about a half, and post it if it may be.

        Raises:
            LocalProtocolError: see ``Transport.send_blocks``.
        """
        peer_id, direction = key
        if peer_id not in self._peers:
            raise LocalProtocolError(f"unknown peer {peer_id}")
        queue = self._halves.setdefault(key, deque())
        if any(other.transfer_id == half.transfer_id for other in queue):
            raise LocalProtocolError(f"transfer {half.transfer_id} is posted already")
        now = time.monotonic()
        self._decide(direction, half, now)
        queue.append(half)
        self._post_due(key, now)
        self._wake()

    def _decide(self, direction: Direction, half: _Half, now: float) -> None:
        # All dice are thrown each time, so that one fault does not change the others.
        hit = {
            name: self._dice[direction, name].throw()
            for name in ("drop", "delay", "reorder", "cut")
        }
        half.cuts = hit["cut"]
        half.due = now
        if hit["drop"]:
            half.state, half.cuts = _State.DROPPED, False
        elif hit["delay"]:
            half.due += self._spec.delay_s
        elif hit["reorder"]:
            half.due += self._spec.reorder_s
            half.may_be_passed = True
        for name in ("drop", "delay", "reorder"):
            if hit[name]:
                logger.warning(
                    "injected fault: %s, transfer %d, %s",
                    name,
                    half.transfer_id,
                    direction.name.lower(),
                )
                break

    def _post_due(self, key: _Key, now: float) -> None:
        """Post what is due; what is held for being passed comes after the one that passed it."""
        waiting: list[_Half] = []
        for half in self._halves.get(key, ()):
            if half.state is not _State.HELD:
                continue
            if half.due > now:
                if not half.may_be_passed:
                    return
                waiting.append(half)
                continue
            self._post(key, half)
            for passed in waiting:
                self._post(key, passed)
            waiting = []

    def _post(self, key: _Key, half: _Half) -> None:
        half.state = _State.POSTED
        if key[0] in self._cut:
            self._end(key, half, PeerLostError(f"{self.name}: links to {key[0]} were cut"))
            return
        try:
            half.post()
        except PDError as exc:
            self._end(key, half, TransferError(str(exc)))

    def _cut_links(self, peer_id: str) -> None:
        """Take the peer from the inner transport, which fails what runs; it stays so."""
        logger.warning("injected fault: cut, links to peer %s", peer_id)
        for direction in Direction:
            for half in self._halves.get((peer_id, direction), ()):
                half.cuts = half.cuts and half.state is _State.HELD
        self._inner.remove_peer(peer_id)
        if peer_id in self._peers:
            self._cut.add(peer_id)

    def _record(self, outcome: TransferOutcome) -> bool:
        """Note the end of a half; False if it is none of ours."""
        for direction in Direction:
            for half in self._halves.get((outcome.peer_id, direction), ()):
                if half.transfer_id == outcome.transfer_id and half.state is _State.POSTED:
                    half.state, half.outcome = _State.OVER, outcome
                    return True
        return False

    def _end(self, key: _Key, half: _Half, error: TransferError) -> None:
        half.state = _State.OVER
        half.outcome = TransferOutcome(key[0], half.transfer_id, 0, error)

    def _fail(self, peer_id: str, reason: str) -> None:
        """End what the inner transport does not know of."""
        for direction in Direction:
            key = peer_id, direction
            for half in self._halves.get(key, ()):
                if half.state in (_State.HELD, _State.DROPPED):
                    self._end(key, half, PeerLostError(f"{self.name}: {reason}"))

    def _drain(self) -> list[TransferOutcome]:
        outcomes = []
        for key, queue in list(self._halves.items()):
            while queue and queue[0].outcome is not None:
                outcomes.append(queue[0].outcome)
                queue.popleft()
            if not queue:
                del self._halves[key]
        return outcomes

    def _wake(self) -> None:
        """Set the timer to when ``poll`` has something to do by itself."""
        queues = self._halves.values()
        if any(queue[0].outcome is not None or _has_cut(queue) for queue in queues if queue):
            self._timer.set(0.0)
            return
        self._timer.set(min((due for queue in queues for due in _times(queue)), default=None))


def _times(queue: deque[_Half]) -> Iterator[float]:
    """Yield when halves are due that do not wait for another one."""
    for half in queue:
        if half.state is _State.HELD:
            yield half.due
            if not half.may_be_passed:
                return


def _has_cut(queue: deque[_Half]) -> bool:
    """Return whether a half that was posted takes the links with it."""
    return any(half.cuts and half.state in (_State.POSTED, _State.OVER) for half in queue)


def faulty_options(options: TransportOptions, spec: FaultSpec, name: str) -> TransportOptions:
    """Return the options of a transport that refuses and damages what ``spec`` says.

    Args:
        options: without faults.
        spec: the faults.
        name: of the transport.
    """
    options = dataclasses.replace(
        options, shares_pages=options.shares_pages and MEMFD not in spec.refuse
    )
    if not spec.corrupt:
        return options
    dice = _Dice(spec.seed, f"{name}/corrupt", spec.corrupt)
    before = options.on_received

    def damage(data: memoryview) -> None:
        if before is not None:
            before(data)
        if dice.throw():
            place = dice.below(data.nbytes)
            data[place] ^= 0xFF
            logger.warning("injected fault: corrupt, byte %d of a transfer", place)

    return dataclasses.replace(options, on_received=damage)
