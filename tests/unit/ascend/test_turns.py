"""Any number of workers set up their pairs without waiting for each other in a circle."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from ascend_vllm_plugin.turns import Action, Step, Turns
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass
class Fleet:
    """Workers that send each other messages; the test says which arrives next."""

    pairs: dict[str, tuple[int, int]]  # name -> leader, follower
    turns: dict[int, Turns] = field(default_factory=dict)
    wires: dict[tuple[int, str], deque[Step]] = field(default_factory=dict)  # by receiver, pair
    connecting: dict[str, set[int]] = field(default_factory=dict)
    connected: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    num_connecting: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for leader, follower in self.pairs.values():
            assert leader < follower
            self.turns.setdefault(leader, Turns())
            self.turns.setdefault(follower, Turns())

    def apply(self, worker: int, actions: list[Action]) -> None:
        for action in actions:
            leader, follower = self.pairs[action.pair]
            if action.step is Step.CONNECT:
                self.connecting.setdefault(action.pair, set()).add(worker)
                self.num_connecting[worker] += 1
                assert self.num_connecting[worker] == 1, "two communicators at the same time"
            elif action.pair not in self.lost:
                peer = follower if worker == leader else leader
                self.wires.setdefault((peer, action.pair), deque()).append(action.step)

    def deliver(self, worker: int, pair: str) -> None:
        step = self.wires[worker, pair].popleft()
        turns = self.turns[worker]
        take = turns.take_request if step is Step.REQUEST else turns.take_grant
        self.apply(worker, take(pair))

    def finish(self, pair: str) -> None:
        """Both have created the communicator."""
        self.connected.add(pair)
        self._end(pair)

    def lose(self, pair: str) -> None:
        """The link of a pair is lost, with what is on its way."""
        self.lost.add(pair)
        for worker in self.pairs[pair]:
            self.wires.pop((worker, pair), None)
        self._end(pair)

    def _end(self, pair: str) -> None:
        for worker in self.connecting.pop(pair, set()):
            self.num_connecting[worker] -= 1
        for worker in self.pairs[pair]:
            self.apply(worker, self.turns[worker].end(pair))

    def moves(self) -> list[tuple[str, int, str]]:
        """Return what can happen next."""
        arrivals = [
            ("deliver", worker, pair) for (worker, pair), wire in self.wires.items() if wire
        ]
        ready = [pair for pair, workers in self.connecting.items() if len(workers) == 2]
        return arrivals + [("finish", 0, pair) for pair in ready]

    def make(self, move: tuple[str, int, str]) -> None:
        kind, worker, pair = move
        if kind == "deliver":
            self.deliver(worker, pair)
        else:
            self.finish(pair)


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Producers and consumers, all with all, with ids in any order."""
    num_producers, num_consumers = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    ids = draw(st.permutations(range(num_producers + num_consumers)))
    pairs = {}
    for producer in ids[:num_producers]:
        for consumer in ids[num_producers:]:
            ends = min(producer, consumer), max(producer, consumer)
            pairs[f"{producer}>{consumer}"] = ends
            if draw(st.booleans()):  # they fetch from each other
                pairs[f"{consumer}>{producer}"] = ends
    return Fleet(pairs)


@settings(deadline=None, max_examples=30)
@given(fleets(), st.data())
def test_all_pairs_connect_in_whatever_order_things_happen(
    fleet: Fleet, data: st.DataObject
) -> None:
    waiting = list(data.draw(st.permutations(list(fleet.pairs))))
    while waiting or fleet.moves():
        moves = fleet.moves()
        if waiting and (not moves or data.draw(st.booleans())):
            pair = waiting.pop()
            leader = fleet.pairs[pair][0]
            fleet.apply(leader, fleet.turns[leader].want(pair))
        else:
            fleet.make(data.draw(st.sampled_from(moves)))
    assert fleet.connected == set(fleet.pairs)
    assert all(turns.holder is None for turns in fleet.turns.values())


@settings(deadline=None, max_examples=30)
@given(fleets(), st.data())
def test_links_that_are_lost_hold_up_no_other_pair(fleet: Fleet, data: st.DataObject) -> None:
    doomed = data.draw(st.sets(st.sampled_from(sorted(fleet.pairs))))
    for pair, (leader, _) in fleet.pairs.items():
        fleet.apply(leader, fleet.turns[leader].want(pair))
    left = sorted(doomed)
    while left or fleet.moves():
        moves = fleet.moves()
        if left and (not moves or data.draw(st.booleans())):
            if (pair := left.pop()) not in fleet.connected:
                fleet.lose(pair)
        else:
            fleet.make(data.draw(st.sampled_from(moves)))
    assert fleet.connected | fleet.lost == set(fleet.pairs)
    assert set(fleet.pairs) - doomed <= fleet.connected
    assert all(turns.holder is None for turns in fleet.turns.values())


@pytest.fixture
def turns() -> Turns:
    return Turns()


def test_leader_asks_when_it_has_its_own_turn(turns: Turns) -> None:
    assert turns.want("a") == [Action(Step.REQUEST, "a")]
    assert turns.take_grant("a") == [Action(Step.CONNECT, "a")]


def test_second_pair_waits_for_the_first(turns: Turns) -> None:
    turns.want("a")
    assert turns.take_request("b") == []
    assert turns.end("a") == [Action(Step.GRANT, "b"), Action(Step.CONNECT, "b")]


def test_grant_that_nobody_awaits_is_ignored(turns: Turns) -> None:
    turns.want("a")
    assert turns.take_grant("b") == []
    turns.end("a")
    assert turns.take_grant("a") == []


def test_pair_that_wants_its_turn_twice_gets_it_once(turns: Turns) -> None:
    turns.want("a")
    assert turns.want("a") == []
    assert turns.end("a") == []
