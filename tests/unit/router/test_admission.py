"""Admission to a stage: the pure decisions, and the waiting for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_pd.config import RouterConfig, from_mapping
from vllm_pd.errors import (
    MAX_RETRY_AFTER_S,
    ConfigError,
    OverloadedError,
    RemoteProtocolError,
)
from vllm_pd.router.admission import (
    HoldTime,
    Slots,
    Stage,
    Ticket,
    priority_of,
)
from vllm_pd.router.headers import PRIORITY


def full(*, max_queue: int = 100, capacity: int = 1) -> Slots:
    slots = Slots(capacity=capacity, max_queue=max_queue)
    while slots.take():
        pass
    return slots


def queue(slots: Slots, *tickets: Ticket) -> None:
    for ticket in tickets:
        assert slots.enqueue(ticket) is None


def served_in_turn(slots: Slots) -> list[Ticket]:
    """Let one slot go round until nothing waits."""
    served = []
    while slots.num_waiting:
        slots.give_back()
        ticket = slots.admit_next()
        assert ticket is not None
        served.append(ticket)
    return served


# --- Slots ---------------------------------------------------------------------------


def test_slots_are_taken_up_to_the_capacity() -> None:
    slots = Slots(capacity=2, max_queue=0)

    assert [slots.take() for _ in range(3)] == [True, True, False]


def test_a_request_does_not_overtake_those_that_wait() -> None:
    slots = full()
    queue(slots, Ticket("a"))
    slots.give_back()

    assert not slots.take()


def test_requests_of_one_client_are_served_as_they_came() -> None:
    slots = full()
    tickets = [Ticket("a") for _ in range(5)]
    queue(slots, *tickets)

    assert served_in_turn(slots) == tickets


def test_the_lower_priority_value_is_served_first() -> None:
    slots = full()
    late, soon, now = (Ticket("a", priority) for priority in (5, 0, -5))
    queue(slots, late, soon, now)

    assert served_in_turn(slots) == [now, soon, late]


def test_a_single_request_waits_for_one_turn_of_a_client_with_many() -> None:
    slots = full()
    many = [Ticket("many") for _ in range(20)]
    queue(slots, *many[:19])
    slots.give_back()
    assert slots.admit_next() is many[0]
    single = Ticket("single")
    queue(slots, single, many[19])

    assert single in served_in_turn(slots)[:2]


def test_clients_take_turns() -> None:
    slots = full()
    queue(slots, *(Ticket("a") for _ in range(3)), *(Ticket("b") for _ in range(3)))

    assert [ticket.client for ticket in served_in_turn(slots)] == ["a", "b", "a", "b", "a", "b"]


def test_a_client_whose_requests_cost_twice_as_much_has_half_as_many_served() -> None:
    slots = full()
    queue(slots, *(Ticket("dear", cost=2.0) for _ in range(20)), *(Ticket("a") for _ in range(20)))

    served = [ticket.client for ticket in served_in_turn(slots)[:15]]

    assert served.count("dear") == 5


def test_a_client_that_waits_with_one_request_at_a_time_does_not_starve_the_others() -> None:
    slots = full()
    queue(slots, *(Ticket("b") for _ in range(5)))
    served: list[Ticket] = []
    for _ in range(8):
        if "a" not in [ticket.client for ticket in served[-1:]]:
            queue(slots, Ticket("a"))
        slots.give_back()
        ticket = slots.admit_next()
        assert ticket is not None
        served.append(ticket)

    assert [ticket.client for ticket in served].count("b") >= 3


def test_a_client_does_not_pay_for_requests_that_left() -> None:
    slots = full()
    left = [Ticket("a") for _ in range(10)]
    stays, other = Ticket("a"), [Ticket("b"), Ticket("b")]
    queue(slots, *left, stays, *other)
    for ticket in left:
        slots.leave(ticket)

    assert served_in_turn(slots)[0] is stays


def test_a_full_queue_refuses_the_newest_of_equals() -> None:
    slots = full(max_queue=1)
    queue(slots, Ticket("a"))
    newcomer = Ticket("a")

    assert slots.enqueue(newcomer) is newcomer


def test_without_a_queue_everybody_is_refused() -> None:
    slots = full(max_queue=0)
    newcomer = Ticket("a", priority=-1)

    assert slots.enqueue(newcomer) is newcomer


def test_a_full_queue_makes_room_for_what_is_more_urgent() -> None:
    slots = full(max_queue=2)
    first, second, urgent = Ticket("a", 1), Ticket("a", 1), Ticket("a", 0)
    queue(slots, first, second)

    assert slots.enqueue(urgent) is second
    assert served_in_turn(slots) == [urgent, first]


def test_a_full_queue_refuses_what_is_less_urgent() -> None:
    slots = full(max_queue=1)
    queue(slots, Ticket("a", 0))
    newcomer = Ticket("b", 1)

    assert slots.enqueue(newcomer) is newcomer


def test_a_full_queue_makes_room_for_a_client_with_fewer_requests_in_it() -> None:
    slots = full(max_queue=3)
    many = [Ticket("many") for _ in range(3)]
    queue(slots, *many)
    newcomer = Ticket("few")

    assert slots.enqueue(newcomer) is many[2]
    assert slots.num_waiting == 3


def test_clients_with_as_many_requests_do_not_displace_each_other() -> None:
    slots = full(max_queue=3)
    queue(slots, Ticket("a"), Ticket("a"), Ticket("b"))
    newcomer = Ticket("b")

    assert slots.enqueue(newcomer) is newcomer


def test_more_capacity_admits_those_that_wait() -> None:
    slots = full()
    ticket = Ticket("a")
    queue(slots, ticket)
    slots.resize(2)

    assert slots.admit_next() is ticket


def test_less_capacity_leaves_what_runs_and_admits_nothing() -> None:
    slots = full(capacity=3)
    queue(slots, Ticket("a"))
    slots.resize(1)
    slots.give_back()

    assert slots.in_use == 2
    assert slots.admit_next() is None


def test_those_of_lower_urgency_are_not_ahead() -> None:
    slots = full()
    queue(slots, Ticket("a", 0), Ticket("a", 3), Ticket("b", 3), Ticket("a", 9))

    assert [slots.num_ahead(priority) for priority in (-1, 0, 3, 9)] == [0, 1, 3, 4]


class SlotsInAnyOrder(RuleBasedStateMachine):
    """Arrivals, ends, departures and resizes in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 2
        self.max_queue = 6
        self.slots = Slots(capacity=self.capacity, max_queue=self.max_queue)
        self.running = 0
        self.waiting: list[Ticket] = []  # as they came
        self.passed: dict[Ticket, dict[str, int]] = {}  # by client, since it was its client's first

    @rule(client=st.sampled_from("abc"), priority=st.sampled_from([0, 0, 0, 1, -1]))
    def arrive(self, client: str, priority: int) -> None:
        if self.slots.take():
            assert not self.waiting, "overtook somebody"
            assert self.running < self.capacity
            self.running += 1
            return
        assert self.waiting or self.running >= self.capacity, "waits beside a free slot"
        ticket = Ticket(client, priority)
        refused = self.slots.enqueue(ticket)
        if refused is not ticket:
            self.waiting.append(ticket)
        if refused is not None:
            assert len(self.waiting) >= self.max_queue, "refused beside a free place"
            assert refused.priority == max(t.priority for t in [*self.waiting, ticket])
            if refused is not ticket:
                self.waiting.remove(refused)

    @precondition(lambda self: self.running)
    @rule()
    def finish(self) -> None:
        self.slots.give_back()
        self.running -= 1
        self.admit()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.slots.leave(ticket)

    @rule(capacity=st.integers(0, 4))
    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots.resize(capacity)
        self.admit()

    def admit(self) -> None:
        while (ticket := self.slots.admit_next()) is not None:
            self.running += 1
            assert self.running <= self.capacity
            assert ticket.priority == min(one.priority for one in self.waiting)
            assert ticket in self.heads(), "not as they came"
            for head in self.heads():
                if head.priority == ticket.priority and head.client != ticket.client:
                    passed = self.passed.setdefault(head, {})
                    passed[ticket.client] = passed.get(ticket.client, 0) + 1
                    assert passed[ticket.client] <= 2, "more than its share"
            self.waiting.remove(ticket)

    def heads(self) -> list[Ticket]:
        """The first of each client in each priority."""
        first = {(one.client, one.priority): one for one in reversed(self.waiting)}
        return list(first.values())

    @invariant()
    def counts_agree(self) -> None:
        assert self.slots.in_use == self.running
        assert self.slots.num_waiting == len(self.waiting) <= self.max_queue

    @invariant()
    def no_slot_is_free_while_somebody_waits(self) -> None:
        assert not self.waiting or self.running >= self.capacity

    def teardown(self) -> None:
        self.resize(0)
        while self.running:
            self.finish()
        self.resize(len(self.waiting))
        assert self.slots.num_waiting == 0


TestSlotsInAnyOrder = SlotsInAnyOrder.TestCase
TestSlotsInAnyOrder.settings = settings(max_examples=60, deadline=None)


# --- HoldTime ------------------------------------------------------------------------


def test_slots_come_back_at_the_rate_that_was_measured() -> None:
    hold_time = HoldTime()
    hold_time.note(2.0)

    assert hold_time.wait_s(10, of=4) == 5.0


def test_newer_times_count_more_than_older_ones() -> None:
    hold_time = HoldTime()
    hold_time.note(10.0)
    for _ in range(60):
        hold_time.note(1.0)

    assert hold_time.wait_s(1, of=1) == pytest.approx(1.0, abs=0.05)


def test_nothing_comes_back_where_there_is_no_slot() -> None:
    assert OverloadedError("full", wait_s=HoldTime().wait_s(1, of=0)).retry_after_s == 60


@pytest.mark.parametrize(
    ("wait_s", "seconds"), [(0.0, 1), (1.0, 1), (1.2, 2), (59.5, 60), (1e9, MAX_RETRY_AFTER_S)]
)
def test_retry_after_is_whole_seconds_within_bounds(wait_s: float, seconds: int) -> None:
    assert OverloadedError("full", wait_s=wait_s).retry_after_s == seconds


# --- Stage ---------------------------------------------------------------------------


class Clock:
    """Time as the test wants it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Request:
    """A request that holds its slot until it is told to end."""

    def __init__(self, stage: Stage, client: str = "a", priority: int = 0) -> None:
        self.served = asyncio.Event()
        self.end = asyncio.Event()
        self.waited_s = -1.0
        self.task = asyncio.create_task(self._run(stage, client, priority))

    async def _run(self, stage: Stage, client: str, priority: int) -> None:
        async with stage.slot(client, priority=priority) as self.waited_s:
            self.served.set()
            await self.end.wait()

    async def finish(self) -> None:
        self.end.set()
        await self.task

    async def refusal(self) -> OverloadedError:
        with pytest.raises(OverloadedError) as caught:
            await self.task
        return caught.value

    async def cancel(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


Make = Callable[..., Stage]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(clock: Clock) -> AsyncIterator[Make]:
    def make(**options: Any) -> Stage:
        defaults = {"capacity": 1, "max_queue": 10, "queue_timeout_s": 50.0}
        return Stage("prefill", clock=clock, **(defaults | options))

    yield make
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def waiting(stage: Stage, **options: Any) -> Request:
    """Return a request that has come to wait."""
    num_waiting = stage.num_waiting
    request = Request(stage, **options)
    await asyncio.sleep(0)  # the task's first step
    assert stage.num_waiting == num_waiting + 1
    return request


async def holding(stage: Stage, **options: Any) -> Request:
    request = Request(stage, **options)
    await request.served.wait()
    return request


async def test_a_free_slot_is_held_for_the_time_of_the_context(make: Make) -> None:
    stage = make()

    async with stage.slot("a") as waited_s:
        assert (waited_s, stage.in_use) == (0.0, 1)
    assert stage.in_use == 0


async def test_a_slot_comes_back_from_a_body_that_fails(make: Make) -> None:
    stage = make()

    with pytest.raises(ZeroDivisionError):
        async with stage.slot("a"):
            raise ZeroDivisionError
    assert stage.in_use == 0


async def test_a_request_waits_for_the_slot_of_another(make: Make, clock: Clock) -> None:
    stage = make()
    first = await holding(stage)
    second = await waiting(stage)
    clock.now += 3.0
    await first.finish()
    await second.served.wait()

    assert second.waited_s == 3.0
    await second.finish()
    assert stage.in_use == 0


async def test_more_capacity_wakes_those_that_wait(make: Make) -> None:
    stage = make(capacity=0)
    first, second = await waiting(stage), await waiting(stage)

    stage.resize(2)

    await first.finish()
    await second.finish()
    assert (stage.capacity, stage.in_use) == (2, 0)


async def test_a_request_that_waits_too_long_is_refused(make: Make) -> None:
    stage = make(queue_timeout_s=0.001)
    first = await holding(stage)

    refusal = await Request(stage).refusal()

    assert "No prefill instance had room within 0.001 s" in str(refusal)
    assert stage.num_waiting == 0
    await first.finish()
    assert stage.in_use == 0


async def test_retry_after_follows_from_the_rate_and_the_queue(make: Make, clock: Clock) -> None:
    stage = make(capacity=2, max_queue=2)
    for _ in range(2):
        measured = await holding(stage)
        clock.now += 8.0
        await measured.finish()
    requests = [await holding(stage) for _ in range(2)] + [await waiting(stage) for _ in range(2)]

    refusal = await Request(stage).refusal()

    # Two wait, it would be the third; two slots of 8 s come back every 4 s.
    assert (str(refusal), refusal.retry_after_s) == ("The prefill queue is full.", 12)
    for request in requests:
        await request.finish()


async def test_a_displaced_request_is_refused_at_once(make: Make) -> None:
    stage = make(max_queue=1)
    first = await holding(stage)
    displaced = await waiting(stage, priority=1)
    urgent = Request(stage, priority=0)

    assert str(await displaced.refusal()) == "The prefill queue is full."
    await first.finish()
    await urgent.finish()
    assert (stage.in_use, stage.num_waiting) == (0, 0)


async def test_a_client_that_leaves_leaves_the_queue(make: Make) -> None:
    stage = make()
    first = await holding(stage)
    second = await waiting(stage)

    await second.cancel()

    assert stage.num_waiting == 0
    await first.finish()
    assert stage.in_use == 0


async def test_a_slot_that_comes_as_its_client_leaves_goes_to_the_next(make: Make) -> None:
    stage = make(capacity=0)
    leaves, stays = await waiting(stage), await waiting(stage)
    stage.resize(1)  # granted, but the task has not run yet
    leaves.task.cancel()

    await stays.served.wait()

    assert not leaves.served.is_set()
    await stays.finish()
    assert stage.in_use == 0


async def test_a_slot_does_not_go_to_a_client_that_has_just_left(make: Make) -> None:
    stage = make(capacity=0)
    leaves, stays = await waiting(stage), await waiting(stage)
    leaves.task.cancel()  # the task has not run yet
    stage.resize(1)

    await stays.served.wait()

    await stays.finish()
    assert (stage.in_use, stage.num_waiting) == (0, 0)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("finish"), st.integers(0, 20)),
        st.tuples(st.just("resize"), st.integers(0, 3)),
        st.tuples(st.just("run"), st.just(0)),
    ),
    max_size=40,
)


@given(steps=STEPS)
def test_no_slot_is_lost_whatever_happens_in_the_same_moment(
    steps: list[tuple[str, int]],
) -> None:
    async def run() -> None:
        stage = Stage("decode", capacity=2, max_queue=4, queue_timeout_s=50.0)
        requests: list[Request] = []
        for action, number in steps:
            if action == "arrive":
                requests.append(Request(stage, client="abc"[number]))
            elif action == "resize":
                stage.resize(number)
            elif action == "run":
                await asyncio.sleep(0)
            elif requests and action == "cancel":
                requests[number % len(requests)].task.cancel()
            elif requests and action == "finish":
                requests[number % len(requests)].end.set()
            num_served = sum(r.served.is_set() and not r.task.done() for r in requests)
            assert num_served <= stage.in_use
            assert stage.num_waiting <= 4
        for request in requests:
            request.end.set()
        stage.resize(2)
        results = await asyncio.gather(*(r.task for r in requests), return_exceptions=True)
        allowed = (type(None), OverloadedError, asyncio.CancelledError)
        assert all(isinstance(result, allowed) for result in results)
        assert (stage.in_use, stage.num_waiting) == (0, 0)

    asyncio.run(run())


# --- What clients and operators say ---------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "field", "priority"),
    [
        ({}, None, 0),
        ({}, 7, 7),
        ({PRIORITY: "-3"}, 7, -3),
        ({}, "7", 0),
        ({}, True, 0),
        ({}, 1.5, 0),
        ({}, 2**63, 2**63 - 1),
        ({}, -(2**70), 1 - 2**63),
    ],
)
def test_the_header_counts_before_the_field(
    headers: dict[str, str], field: object, priority: int
) -> None:
    assert priority_of(headers, field) == priority


@pytest.mark.parametrize("value", ["", "high", "1.5", str(2**63), "9" * 5000])
def test_a_header_that_is_no_priority_is_refused_by_name(value: str) -> None:
    with pytest.raises(RemoteProtocolError, match=PRIORITY):
        priority_of({PRIORITY: value}, None)


@pytest.mark.parametrize(
    "option",
    [
        {"prefill_max_concurrent": 0},
        {"decode_max_concurrent": -1},
        {"max_queue": -1},
        {"queue_timeout_s": 0},
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        from_mapping(RouterConfig, option, source="router")
