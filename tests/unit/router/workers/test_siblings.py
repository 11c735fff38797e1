from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.router.admission import Slots, Ticket
from vllm_pd.router.workers.board import Board, key_of, make_board
from vllm_pd.router.workers.siblings import PATIENCE_S, Siblings

KEY = key_of("stage", "decode")


class World:
    """The same stage in several workers, and one clock."""

    def __init__(self, num_workers: int, *, capacity: int, max_queue: int = 9) -> None:
        self.now = 0.0
        fd = make_board(num_workers)
        self.boards = [Board(fd, num_workers, own) for own in range(num_workers)]
        os.close(fd)
        self.slots = [
            Slots(
                capacity=capacity,
                max_queue=max_queue,
                siblings=Siblings(board.row(KEY), clock=lambda: self.now),
            )
            for board in self.boards
        ]


@pytest.fixture
def pair() -> tuple[Slots, Slots]:
    world = World(2, capacity=2)
    return world.slots[0], world.slots[1]


Pair = tuple[Slots, Slots]


class FullSiblings(Siblings):
    """A stage in which no queue can be shown."""

    def show(self, *, in_use: int, num_waiting: int, most_urgent: int) -> None:
        if num_waiting:
            raise OSError("no room")
        super().show(in_use=in_use, num_waiting=0, most_urgent=most_urgent)


def test_a_request_that_cannot_be_shown_does_not_wait() -> None:
    fd = make_board(1)
    slots = Slots(capacity=1, max_queue=9, siblings=FullSiblings(Board(fd, 1, 0).row(KEY)))
    os.close(fd)
    assert slots.take()
    with pytest.raises(OSError, match="no room"):
        slots.enqueue(Ticket("a"))
    slots.give_back()
    assert slots.num_waiting == 0
    assert slots.take()


def test_workers_have_no_more_slots_together_than_one_would_have(pair: Pair) -> None:
    one, other = pair
    assert one.take()
    assert other.take()
    assert not one.take()
    assert not other.take()


def test_a_slot_that_one_gives_back_is_there_for_the_other(pair: Pair) -> None:
    one, other = pair
    assert one.take()
    assert one.take()
    ticket = Ticket("ann")
    other.enqueue(ticket)
    assert other.admit_next() is None
    one.give_back()
    assert other.admit_next() is ticket


def test_who_holds_fewer_slots_goes_first(pair: Pair) -> None:
    one, other = pair
    assert one.take()
    assert one.take()
    own, others = Ticket("ann"), Ticket("bob")
    one.enqueue(own)
    other.enqueue(others)
    one.give_back()
    assert one.admit_next() is None
    assert other.admit_next() is others
    one.give_back()
    assert one.admit_next() is own


def test_who_waits_elsewhere_for_longer_is_not_overtaken_by_a_newcomer(pair: Pair) -> None:
    one, other = pair
    assert one.take()
    assert one.take()
    other.enqueue(Ticket("bob"))
    one.give_back()
    assert not one.take()


def test_the_more_urgent_request_goes_first_wherever_it_waits(pair: Pair) -> None:
    one, other = pair
    assert one.take()
    assert other.take()
    urgent = Ticket("ann", priority=-1)
    one.enqueue(urgent)
    other.enqueue(Ticket("bob", priority=0))
    other.give_back()
    assert other.admit_next() is None
    assert one.admit_next() is urgent


def test_a_worker_that_does_not_take_its_turn_is_passed_over() -> None:
    world = World(2, capacity=1)
    one, stuck = world.slots
    assert one.take()
    ticket = Ticket("ann", priority=1)
    one.enqueue(ticket)
    stuck.enqueue(Ticket("bob", priority=0))
    one.give_back()
    assert one.admit_next() is None
    world.now += PATIENCE_S
    assert one.admit_next() is ticket


def test_the_queues_of_all_workers_are_one_length() -> None:
    world = World(2, capacity=1, max_queue=2)
    one, other = world.slots
    assert one.take()
    assert one.enqueue(Ticket("ann")) is None
    assert other.enqueue(Ticket("bob")) is None
    refused = Ticket("bob")
    assert other.enqueue(refused) is refused
    assert other.num_ahead(0) == 2


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from("tgw")), max_size=40),
)
def test_a_free_slot_finds_whoever_waits(capacity: int, steps: list[tuple[int, str]]) -> None:
    world = World(3, capacity=capacity, max_queue=99)
    for worker, step in steps:
        slots = world.slots[worker]
        if step == "t" and not slots.take():
            slots.enqueue(Ticket("ann"))
        elif step == "g" and slots.in_use:
            slots.give_back()
        elif step == "w":
            slots.enqueue(Ticket("bob"))
        for _ in world.slots:  # each looks from time to time
            for each in world.slots:
                while each.admit_next() is not None:
                    pass
        in_use = sum(each.in_use for each in world.slots)
        waiting = sum(each.num_waiting for each in world.slots)
        assert in_use <= capacity
        assert in_use == capacity or not waiting
