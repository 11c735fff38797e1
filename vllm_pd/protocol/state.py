"""State machines of the transfer protocol.

Everything that decides a state transition lives in this file, and nothing
here performs I/O or reads a clock: callers pass ``now``, in seconds on their
own monotonic clock.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_pd.errors import LeaseExpiredError, LocalProtocolError, RemoteProtocolError


class FetchState(enum.Enum):
    """Life of one fetch, on the consumer.

    ::

        AWAITING_PEER -> REQUESTED -> RECEIVING -> DONE
              |              |            |
              +--------------+------------+------> FAILED
    """

    AWAITING_PEER = enum.auto()  # the session's handshake is not over
    REQUESTED = enum.auto()  # FetchBlocks sent; the producer may still compute
    RECEIVING = enum.auto()  # FetchReady seen, our half of the transfer is posted
    DONE = enum.auto()
    FAILED = enum.auto()


_NEXT: dict[FetchState, frozenset[FetchState]] = {
    FetchState.AWAITING_PEER: frozenset({FetchState.REQUESTED, FetchState.FAILED}),
    FetchState.REQUESTED: frozenset({FetchState.RECEIVING, FetchState.FAILED}),
    FetchState.RECEIVING: frozenset({FetchState.DONE, FetchState.FAILED}),
    FetchState.DONE: frozenset(),
    FetchState.FAILED: frozenset(),
}


@dataclass(slots=True)
class Fetch:
    """One request's blocks on their way from one producer rank to this consumer worker.

    Attributes:
        fetch_id: unique on this consumer worker; also the transport's transfer id.
        request_id: the request here.
        transfer_id: the prefill on the producer.
        deadline: when to give up.
    """

    fetch_id: int
    request_id: str
    transfer_id: str
    deadline: float
    state: FetchState = FetchState.AWAITING_PEER

    def advance(self, to: FetchState) -> None:
        """Move to state ``to``.

        Raises:
            LocalProtocolError: ``to`` cannot follow the current state.
        """
        if to not in _NEXT[self.state]:
            raise LocalProtocolError(
                f"fetch {self.fetch_id} of {self.request_id}: {self.state.name} -> {to.name}"
            )
        self.state = to


class SessionState(enum.Enum):
    """Life of a consumer's session with one producer worker.

    ::

        GREETING -> READY
            |         |
            +---------+--> CLOSED
    """

    GREETING = enum.auto()  # Hello sent to the worker
    READY = enum.auto()
    CLOSED = enum.auto()


class LeaseEnd(enum.Enum):
    """Why a lease is over."""

    FETCHED = "fetched"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(slots=True)
class _Lease:
    request_id: str
    block_ids: tuple[int, ...]
    expires_at: float
    last_expiry: float  # renewals reach no further
    prompt_digest: str
    delivered: dict[str, set[int]] = field(default_factory=dict)  # ranks, by consumer engine
    num_reading: int = 0
    is_fetched: bool = False
    is_released: bool = False
    is_timed: bool = False  # there is an entry in the table's heap of deadlines


@dataclass(slots=True)
class LeaseTable:
    """Finished prefills whose blocks wait for their consumers, on one producer worker.

    vLLM keeps a request's blocks until one of ``end_fetch``, ``release`` and
    ``expire`` returns its request id. Each lease ends exactly once, and never
    while a fetch is reading its blocks.

    Attributes:
        lease_s: how long a lease lasts, from its grant or its last renewal.
        max_lease_s: how long renewals can make it last, from its grant.
        num_remembered: ended transfer ids that are still told apart from unknown ones.
        num_ended: leases that are over, by reason.
        num_blocks: blocks that are held for consumers.
    """

    lease_s: float
    max_lease_s: float = math.inf
    num_remembered: int = 4096
    num_ended: Counter[LeaseEnd] = field(default_factory=Counter)
    num_blocks: int = 0
    _leases: dict[str, _Lease] = field(default_factory=dict)
    _deadlines: list[tuple[float, str]] = field(default_factory=list)  # a heap
    _ended: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _unwanted: OrderedDict[str, None] = field(default_factory=OrderedDict)  # before their grant

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._leases

    def has_ended(self, transfer_id: str) -> bool:
        """Return whether this transfer id held a lease that is over."""
        return transfer_id in self._ended

    def grant(
        self,
        transfer_id: str,
        *,
        request_id: str,
        block_ids: Sequence[int],
        now: float,
        prompt_digest: str = "",
    ) -> str | None:
        """Start a lease; return the request id to free, if it was released before.

        Raises:
            LocalProtocolError: the transfer id holds a lease already.
        """
        if transfer_id in self._leases:
            raise LocalProtocolError(f"transfer {transfer_id} already holds a lease")
        self._ended.pop(transfer_id, None)
        is_unwanted = transfer_id in self._unwanted
        self._unwanted.pop(transfer_id, None)
        lease = self._leases[transfer_id] = _Lease(
            request_id,
            tuple(block_ids),
            now + min(self.lease_s, self.max_lease_s),
            now + self.max_lease_s,
            prompt_digest,
        )
        self.num_blocks += len(lease.block_ids)
        self._time(transfer_id, lease)
        return self._end(transfer_id, LeaseEnd.RELEASED) if is_unwanted else None

    def renew(self, transfer_id: str, now: float) -> None:
        """Prolong a lease whose consumer still queues; never shortens it.

        Unknown ids are ignored, as a renewal crosses with the end of its lease.
        """
        if (lease := self._leases.get(transfer_id)) and not lease.is_released:
            wanted = min(now + self.lease_s, lease.last_expiry)
            lease.expires_at = max(lease.expires_at, wanted)

    def begin_fetch(
        self, transfer_id: str, *, block_offset: int, num_blocks: int, prompt_digest: str = ""
    ) -> tuple[int, ...]:
        """Protect the blocks while one rank reads them; return the block ids to send.

        Args:
            transfer_id: the lease.
            block_offset: first block of the prefill that is wanted.
            num_blocks: number of blocks.
            prompt_digest: of the prompt whose KV is wanted; ``""`` if unknown.

        Raises:
            LeaseExpiredError: the blocks may already hold another request.
            RemoteProtocolError: the peer asks for blocks that the prefill does not have,
                or for another prompt.
        """
        lease = self._leases.get(transfer_id)
        if lease is None or lease.is_released or lease.is_fetched:
            raise LeaseExpiredError(f"no lease for transfer {transfer_id}")
        wanted = lease.block_ids[block_offset : block_offset + num_blocks]
        if len(wanted) != num_blocks:
            raise RemoteProtocolError(
                f"transfer {transfer_id} has {len(lease.block_ids)} blocks, not "
                f"{block_offset} to {block_offset + num_blocks}"
            )
        if prompt_digest and lease.prompt_digest not in ("", prompt_digest):
            raise RemoteProtocolError(
                f"transfer {transfer_id} is of another prompt, adapter, cache salt or image"
            )
        lease.num_reading += 1
        return wanted

    def end_fetch(
        self, transfer_id: str, *, consumer: str, rank: int, num_readers: int, delivered: bool
    ) -> str | None:
        """Record that one rank stopped reading; return the request id to free, if any.

        A fetch that failed leaves the lease as it was, for another try.

        Args:
            transfer_id: the lease.
            consumer: the engine of the rank that read.
            rank: the rank; it counts once, however often it reads.
            num_readers: ranks of that engine that read from this worker.
            delivered: whether it has got everything.
        """
        lease = self._leases[transfer_id]
        lease.num_reading -= 1
        if delivered:
            ranks = lease.delivered.setdefault(consumer, set())
            ranks.add(rank)
            lease.is_fetched |= len(ranks) >= num_readers
        if lease.num_reading:
            return None
        if lease.is_fetched:
            return self._end(transfer_id, LeaseEnd.FETCHED)
        if lease.is_released:
            return self._end(transfer_id, LeaseEnd.RELEASED)
        self._time(transfer_id, lease)
        return None

    def release(self, transfer_id: str) -> str | None:
        """End a lease early; return the request id to free now, if any.

        A lease that is being read ends when the read does. A release of an id that is
        not known yet ends its lease when it begins: a decode request may come before
        its prefill, and go before it.
        """
        lease = self._leases.get(transfer_id)
        if lease is None:
            if transfer_id not in self._ended:
                self._unwanted[transfer_id] = None
                _shrink(self._unwanted, self.num_remembered)
            return None
        lease.is_released = True
        return None if lease.num_reading else self._end(transfer_id, LeaseEnd.RELEASED)

    def expire(self, now: float) -> list[str]:
        """End overdue leases that nobody is reading; return their request ids."""
        ended = []
        while (expiry := self.next_expiry()) is not None and expiry <= now:
            ended.append(self._end(self._deadlines[0][1], LeaseEnd.EXPIRED))
        return ended

    def next_expiry(self) -> float | None:
        """Return when the next lease that nobody reads is overdue.

        Takes no longer for many leases: it is asked for whenever anything happens.
        """
        while self._deadlines:
            deadline, transfer_id = self._deadlines[0]
            lease = self._leases.get(transfer_id)
            if lease is not None and not lease.num_reading and lease.expires_at <= deadline:
                return lease.expires_at
            heapq.heappop(self._deadlines)  # over, being read, or renewed since
            if lease is not None:
                lease.is_timed = False
                if not lease.num_reading:
                    self._time(transfer_id, lease)
        return None

    def _time(self, transfer_id: str, lease: _Lease) -> None:
        """Have an entry for a lease; it may be too early, but never too late."""
        if not lease.is_timed:
            lease.is_timed = True
            heapq.heappush(self._deadlines, (lease.expires_at, transfer_id))

    def _end(self, transfer_id: str, reason: LeaseEnd) -> str:
        self.num_ended[reason] += 1
        self._ended[transfer_id] = None
        _shrink(self._ended, self.num_remembered)
        lease = self._leases.pop(transfer_id)
        self.num_blocks -= len(lease.block_ids)
        return lease.request_id


def _shrink(ids: OrderedDict[str, None], most: int) -> None:
    while len(ids) > most:
        ids.popitem(last=False)
