"""Who is served now, who waits and who is told to come back later, for each stage.

A stage is one role's instances. ``Slots`` decides and is pure; ``Stage`` waits.

- The most urgent priority goes first: the lowest number, as in vLLM.
- Within a priority, clients share the slots by start-time fair queueing: what is
  served of a client moves it back by the cost of it, so that a client with a
  thousand requests in the queue delays one with a single request by about one turn.
- A full queue has room for a request that is more urgent than another, or whose
  client has fewer requests in it. The other one, the last of the client with the
  most, is refused instead. Otherwise one client could fill the queue and lock
  out all others, however fairly what is in it is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from vllm_pd.errors import OverloadedError, RemoteProtocolError
from vllm_pd.router.headers import PRIORITY
from vllm_pd.router.workers.siblings import Siblings

Clock = Callable[[], float]

_MAX_PRIORITY = 2**63 - 1  # vLLM's range
_WEIGHT_OF_NEWEST = 0.1

_LOOK_INTERVAL_S = 0.005
"""Longest time that a slot is free before a request that waits in another process has it."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One request that may have to wait.

    Attributes:
        client: whose request it is; each client has the same share.
        priority: the lower, the earlier.
        cost: what it takes of the client's share, in any unit that all requests
            of the stage are measured in; positive.
    """

    client: str
    priority: int = 0
    cost: float = 1.0


@dataclass(slots=True, eq=False)
class _Flow:
    """What waits of one client in one priority, first come first.

    Attributes:
        start: virtual time at which the next of it is due.
    """

    start: float = 0.0
    tickets: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class _Level:
    """What waits in one priority; forgotten as soon as nothing does.

    Attributes:
        now: virtual time, the start of what was served last.
        flows: by client; one that waits for nothing is kept for its ``start``.
    """

    num_waiting: int = 0
    now: float = 0.0
    flows: dict[str, _Flow] = field(default_factory=dict)

    def add(self, ticket: Ticket) -> None:
        flow = self.flows.setdefault(ticket.client, _Flow())
        if not flow.tickets:  # an idle client saves nothing up
            flow.start = max(flow.start, self.now)
        flow.tickets[ticket] = None
        self.num_waiting += 1

    def remove(self, ticket: Ticket) -> None:
        del self.flows[ticket.client].tickets[ticket]
        self.num_waiting -= 1

    def pop_next(self) -> Ticket:
        due = (flow for flow in self.flows.values() if flow.tickets)
        flow = min(due, key=lambda flow: flow.start)
        ticket, _ = flow.tickets.popitem(last=False)
        self.num_waiting -= 1
        self.now = flow.start
        flow.start += ticket.cost
        return ticket

    def num_of(self, client: str) -> int:
        flow = self.flows.get(client)
        return len(flow.tickets) if flow else 0

    def longest(self) -> OrderedDict[Ticket, None]:
        return max((flow.tickets for flow in self.flows.values()), key=len)


class Slots:
    """A number of slots and the queue for them.

    Nothing waits while a slot is free, provided that ``admit_next`` is called until
    it returns None after ``give_back`` and ``resize``.

    Args:
        capacity: number of slots.
        max_queue: longest queue.
        siblings: other processes that use the same slots; each has a queue of its own.
            With them ``admit_next`` has to be called from time to time.
    """

    def __init__(self, *, capacity: int, max_queue: int, siblings: Siblings | None = None) -> None:
        self._siblings = siblings
        self._capacity = capacity
        self._max_queue = max_queue
        self._in_use = 0
        self._num_waiting = 0
        self._levels: dict[int, _Level] = {}

    @property
    def capacity(self) -> int:
        """Number of slots; more may be in use after there have been more."""
        return self._capacity

    @property
    def in_use(self) -> int:
        """Number of slots that are taken in this process."""
        return self._in_use

    @property
    def num_waiting(self) -> int:
        """Number of tickets in the queue of this process."""
        return self._num_waiting

    def num_ahead(self, priority: int) -> int:
        """Return how many tickets wait that are at least as urgent."""
        here = sum(level.num_waiting for at, level in self._levels.items() if at <= priority)
        return here + self._num_waiting_elsewhere()

    def take(self, priority: int = 0) -> bool:
        """Take a slot unless that would overtake somebody."""
        if self._num_waiting or not self._has_slot(priority):
            return False
        self._in_use += 1
        self._show()
        return True

    def give_back(self) -> None:
        """Free a slot."""
        self._in_use -= 1
        self._show()

    def resize(self, capacity: int) -> None:
        """Change the number of slots; those in use stay in use."""
        self._capacity = capacity

    def enqueue(self, ticket: Ticket) -> Ticket | None:
        """Add a ticket to the queue.

        Returns:
            The ticket that is refused for it: itself, or one that has been waiting
            and is no longer in the queue; None if there is room for all.
        """
        refused = None
        if self._num_waiting + self._num_waiting_elsewhere() >= self._max_queue:
            refused = self._least_deserving(ticket)
            if refused is ticket:
                return ticket
        self._show(ticket)  # first: if that fails, nothing has changed
        self._levels.setdefault(ticket.priority, _Level()).add(ticket)
        self._num_waiting += 1
        if refused is not None:
            self.leave(refused)
        return refused

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket that waits out of the queue."""
        self._levels[ticket.priority].remove(ticket)
        self._removed_from(ticket.priority)

    def admit_next(self) -> Ticket | None:
        """Give a free slot to the ticket whose turn it is; None if there is no such pair."""
        if not self._num_waiting or not self._has_slot(min(self._levels)):
            return None
        ticket = self._levels[min(self._levels)].pop_next()
        self._in_use += 1
        self._removed_from(ticket.priority)
        return ticket

    def _has_slot(self, priority: int) -> bool:
        if self._siblings is None:
            return self._in_use < self._capacity
        return self._siblings.may_take(
            capacity=self._capacity, in_use=self._in_use, priority=priority
        )

    def _num_waiting_elsewhere(self) -> int:
        return 0 if self._siblings is None else self._siblings.num_waiting

    def _show(self, *newcomers: Ticket) -> None:
        if self._siblings is not None:
            urgencies = (*self._levels, *(one.priority for one in newcomers))
            self._siblings.show(
                in_use=self._in_use,
                num_waiting=self._num_waiting + len(newcomers),
                most_urgent=min(urgencies, default=0),
            )

    def _removed_from(self, priority: int) -> None:
        self._num_waiting -= 1
        if not self._levels[priority].num_waiting:
            del self._levels[priority]
        self._show()

    def _least_deserving(self, newcomer: Ticket) -> Ticket:
        if not self._levels:  # no queue is wanted
            return newcomer
        last = max(self._levels)
        if newcomer.priority > last:
            return newcomer
        level = self._levels[last]
        longest = level.longest()
        if newcomer.priority == last and len(longest) <= level.num_of(newcomer.client) + 1:
            return newcomer
        return next(reversed(longest))


class HoldTime:
    """Moving mean of how long slots are held, and so of how fast they come back."""

    _mean_s: float | None = None

    def note(self, held_s: float) -> None:
        """Count one slot that came back."""
        mean_s = held_s if self._mean_s is None else self._mean_s
        self._mean_s = mean_s + _WEIGHT_OF_NEWEST * (held_s - mean_s)

    def wait_s(self, num_slots: int, *, of: int) -> float:
        """Return how long it takes until ``num_slots`` come back, of ``of`` that are held.

        0 before the first has come back, as nothing is known.
        """
        if of <= 0:
            return math.inf
        # Little's law: slots that are held for a mean of t come back at the rate of / t.
        return num_slots * (self._mean_s or 0.0) / of


class _Verdict(enum.Enum):
    ADMITTED = enum.auto()
    DISPLACED = enum.auto()
    TIMED_OUT = enum.auto()


class Stage:
    """Admission to the instances of one role, in one event loop.

    A slot is held exactly as long as the body of ``slot`` runs, whatever ends it,
    and a request that is cancelled while it waits leaves the queue at once.
    """

    def __init__(
        self,
        name: str,
        *,
        capacity: int,
        max_queue: int,
        queue_timeout_s: float,
        siblings: Siblings | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Begin without requests.

        Args:
            name: of the stage, for messages.
            capacity: number of requests served at the same time.
            max_queue: number of requests that may wait.
            queue_timeout_s: longest time that one may wait.
            siblings: the stage in other processes; None: there are none.
            clock: returns seconds.
        """
        self._name = name
        self._slots = Slots(capacity=capacity, max_queue=max_queue, siblings=siblings)
        self._looks_again = siblings is not None
        self._look: asyncio.TimerHandle | None = None
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._hold_time = HoldTime()
        self._verdicts: dict[Ticket, asyncio.Future[_Verdict]] = {}

    @property
    def capacity(self) -> int:
        """Number of requests that may be served at the same time."""
        return self._slots.capacity

    @property
    def in_use(self) -> int:
        """Number of requests being served."""
        return self._slots.in_use

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return self._slots.num_waiting

    def resize(self, capacity: int) -> None:
        """Change the capacity, e.g. with the number of healthy instances."""
        self._slots.resize(capacity)
        self._admit()

    @contextlib.asynccontextmanager
    async def slot(
        self, client: str, *, priority: int = 0, cost: float = 1.0
    ) -> AsyncIterator[float]:
        """Wait for a slot and hold it for the time of the context.

        Args:
            client: whose request it is.
            priority: the lower, the earlier.
            cost: what the request takes of the client's share.

        Yields:
            How long it waited, in seconds.

        Raises:
            OverloadedError: the queue is full of requests that deserve it more, or
                no slot became free in time.
        """
        arrived = began = self._clock()
        if not self._slots.take(priority):
            await self._wait(Ticket(client, priority, cost))
            began = self._clock()
        try:
            yield began - arrived
        finally:
            self._hold_time.note(self._clock() - began)
            self._give_back()

    async def _wait(self, ticket: Ticket) -> None:
        refused = self._slots.enqueue(ticket)
        if refused is ticket:
            raise self._overloaded(ticket, _Verdict.DISPLACED)
        if refused is not None:
            self._tell(refused, _Verdict.DISPLACED)
        loop = asyncio.get_running_loop()
        future = self._verdicts[ticket] = loop.create_future()
        timer = loop.call_later(self._queue_timeout_s, self._time_out, ticket)
        self._look_later()
        try:
            verdict = await future
        except asyncio.CancelledError:
            if self._verdicts.pop(ticket, None) is not None:
                self._slots.leave(ticket)
            elif not future.cancelled() and future.result() is _Verdict.ADMITTED:
                self._give_back()  # the slot came in the same moment
            raise
        finally:
            timer.cancel()
        if verdict is not _Verdict.ADMITTED:
            raise self._overloaded(ticket, verdict)

    def _look_later(self) -> None:
        """Look from time to time whether another process has given a slot back."""
        if self._looks_again and self._look is None and self._slots.num_waiting:
            loop = asyncio.get_running_loop()
            self._look = loop.call_later(_LOOK_INTERVAL_S, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        self._admit()
        self._look_later()

    def _time_out(self, ticket: Ticket) -> None:
        if ticket in self._verdicts:
            self._slots.leave(ticket)
            self._tell(ticket, _Verdict.TIMED_OUT)

    def _give_back(self) -> None:
        self._slots.give_back()
        self._admit()

    def _admit(self) -> None:
        while (ticket := self._slots.admit_next()) is not None:
            if not self._tell(ticket, _Verdict.ADMITTED):
                self._slots.give_back()

    def _tell(self, ticket: Ticket, verdict: _Verdict) -> bool:
        """End the wait of a request; False if it is cancelled and will not take notice."""
        future = self._verdicts.pop(ticket)
        if future.cancelled():
            return False
        future.set_result(verdict)
        return True

    def _overloaded(self, ticket: Ticket, verdict: _Verdict) -> OverloadedError:
        slots = self._slots
        wait_s = self._hold_time.wait_s(slots.num_ahead(ticket.priority) + 1, of=slots.capacity)
        if verdict is _Verdict.TIMED_OUT:
            message = f"No {self._name} instance had room within {self._queue_timeout_s:g} s."
        else:
            message = f"The {self._name} queue is full."
        return OverloadedError(message, wait_s=wait_s)


def priority_of(headers: Mapping[str, str], field_of_body: object) -> int:
    """Return the priority that a client asks for; 0 if it asks for none.

    The body's field has to be an integer to count, and counts up to the header's range:
    vLLM words what is wrong with it.

    Raises:
        RemoteProtocolError: the header is no 64-bit integer.
    """
    given = headers.get(PRIORITY)
    if given is None:
        asked = field_of_body if type(field_of_body) is int else 0
        return max(-_MAX_PRIORITY, min(asked, _MAX_PRIORITY))
    with contextlib.suppress(ValueError):
        priority = int(given)
        if -_MAX_PRIORITY <= priority <= _MAX_PRIORITY:
            return priority
    raise RemoteProtocolError(f"the header {PRIORITY} is not a 64-bit integer")
