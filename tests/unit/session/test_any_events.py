"""Producer and Consumer together, under events in any order.

Whatever happens: every grant is freed once and never while it is read, every fetch is
reported once, a success means the right bytes, and nothing is left at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.unit.session.fakes import Channel, Half
from tests.unit.session.world import PREFILL_BLOCKS, ConsumerRank, World
from vllm_pd.errors import DigestMismatchError, TransferError
from vllm_pd.protocol.messages import decode

T = TypeVar("T")

SHAPES = [  # tensor-parallel sizes of p and d, KV heads
    (1, 1, 2),
    (2, 2, 2),
    (2, 1, 2),
    (1, 2, 2),
    (4, 2, 4),
    (2, 4, 4),
    (2, 1, 1),  # a rank of p that nobody needs
    (1, 2, 1),
    (4, 2, 2),
]


@pytest.mark.parametrize(("tp_size", "consumer_tp_size", "num_kv_heads"), SHAPES)
def test_undisturbed_fetches_succeed_and_free_everything(
    tp_size: int, consumer_tp_size: int, num_kv_heads: int
) -> None:
    world = World(tp_size, {"d": consumer_tp_size}, num_kv_heads)
    with world.closed_at_the_end():
        for rank in range(tp_size):
            world.grant(rank, "a")
        for offset, transfer_id in ((0, "a"), (1, "b")):
            for worker in world.consumers:
                world.fetch(worker, transfer_id, offset=offset, num_blocks=PREFILL_BLOCKS - offset)
        world.run()
        for rank in range(tp_size):
            world.grant(rank, "b")
        world.run()
        for worker in world.consumers:
            assert [result.error for result in worker.reported.values()] == [None, None]
        for producer in world.producers:
            assert list(producer.freed) == list(producer.granted)
            assert not producer.server.num_dropped


class _Loud(logging.Handler):
    """Keeps the errors that sessions caught although they should not happen."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.records.append(record)


def choose(options: Sequence[T], pick: int) -> T:
    return options[pick % len(options)]


class Sessions(RuleBasedStateMachine):
    """One producer engine, two consumer engines, and everything that can go wrong."""

    picks = st.integers(0, 1 << 16)
    transfers = st.sampled_from("ab")
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.loud = _Loud()
        logging.getLogger("vllm_pd.session").addHandler(self.loud)

    @initialize(shape=st.sampled_from(SHAPES))
    def start(self, shape: tuple[int, int, int]) -> None:
        tp_size, consumer_tp_size, num_kv_heads = shape
        self.world = World(tp_size, {"d": consumer_tp_size, "e": 1}, num_kv_heads)

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.world.drain()
            assert self.loud.records == []
        finally:
            logging.getLogger("vllm_pd.session").removeHandler(self.loud)

    # Orders

    @rule(transfer_id=transfers)
    def grant_everywhere(self, transfer_id: str) -> None:
        for worker in self.world.producers:
            self.world.grant(worker.rank, transfer_id)

    @rule(transfer_id=transfers, pick=picks)
    def grant_on_one_rank(self, transfer_id: str, pick: int) -> None:
        self.world.grant(choose(self.world.producers, pick).rank, transfer_id)

    @rule(transfer_id=transfers, engine_id=st.sampled_from("de"), offset=st.integers(0, 2))
    def fetch_on_all_ranks(self, transfer_id: str, engine_id: str, offset: int) -> None:
        for worker in self.world.consumers:
            if worker.engine_id == engine_id:
                num_blocks = PREFILL_BLOCKS - offset
                self.world.fetch(worker, transfer_id, offset=offset, num_blocks=num_blocks)

    @rule(
        transfer_id=transfers,
        pick=picks,
        offset=st.integers(0, 3),
        num_blocks=st.integers(1, 3),
        engine_id=st.sampled_from(["p", "p", "p", "restarted"]),
        host=st.sampled_from(["127.0.0.1"] * 3 + ["192.0.2.1"]),
    )
    def fetch_anything(
        self,
        transfer_id: str,
        pick: int,
        offset: int,
        num_blocks: int,
        engine_id: str,
        host: str,
    ) -> None:
        self.world.fetch(
            choose(self.world.consumers, pick),
            transfer_id,
            offset=offset,
            num_blocks=num_blocks,
            engine_id=engine_id,
            host=host,
        )

    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        fetches = [(w, request_id) for w in self.world.consumers for request_id in sorted(w.asked)]
        if fetches:
            self.world.abort(*choose(fetches, pick))

    @rule(transfer_id=transfers, pick=picks)
    def release(self, transfer_id: str, pick: int) -> None:
        choose(self.world.producers, pick).producer.release(transfer_id)

    @precondition(lambda self: self.world.releases)
    @rule(pick=picks)
    def release_that_a_consumer_asked_for(self, pick: int) -> None:
        rank, transfer_id = self.world.releases.pop(pick % len(self.world.releases))
        self.world.producers[rank].producer.release(transfer_id)

    @rule(transfer_id=transfers, pick=picks)
    def renew(self, transfer_id: str, pick: int) -> None:
        choose(self.world.producers, pick).producer.renew(transfer_id, self.world.now)

    # Time

    @rule(elapsed=st.sampled_from([0.0, 0.5, 0.5, 1.0, 3.0, 7.0, 1e6]))
    def time_passes(self, elapsed: float) -> None:
        self.world.tick(elapsed)
        self.world.tick(0.0)  # a read that was given up may have outlasted its lease
        for producer in self.world.producers:
            deadline = producer.producer.next_deadline()
            assert deadline is None or deadline > self.world.now
        for consumer in self.world.consumers:
            deadline = consumer.consumer.next_deadline()
            assert deadline is None or deadline > self.world.now

    # The control network

    def channels(self, condition: Callable[[Channel], object]) -> list[Channel]:
        return [channel for channel in self.world.network.channels if condition(channel)]

    @precondition(lambda self: self.channels(lambda c: c.to_server))
    @rule(pick=picks)
    def message_reaches_a_server(self, pick: int) -> None:
        self.world.deliver_to_server(choose(self.channels(lambda c: c.to_server), pick))

    @precondition(lambda self: self.channels(lambda c: c.to_client))
    @rule(pick=picks)
    def message_reaches_a_client(self, pick: int) -> None:
        self.world.deliver_to_client(choose(self.channels(lambda c: c.to_client), pick))

    # Transfers

    @precondition(lambda self: self.world.fabric.startable())
    @rule(pick=picks)
    def copy_begins(self, pick: int) -> None:
        _, receiver = choose(self.world.fabric.startable(), pick)
        receiver.is_busy = True

    @precondition(lambda self: self.world.fabric.receivers())
    @rule(pick=picks, how=st.sampled_from([None, None, DigestMismatchError, TransferError]))
    def copy_ends(self, pick: int, how: type[TransferError] | None) -> None:
        receiver: Half = choose(self.world.fabric.receivers(), pick)
        self.world.fabric.end_copy(receiver, how("damaged") if how else None)

    @precondition(lambda self: self.world.fabric.startable())
    @rule(pick=picks, how=st.sampled_from([DigestMismatchError, TransferError]))
    def copy_is_damaged(self, pick: int, how: type[TransferError]) -> None:
        _, receiver = choose(self.world.fabric.startable(), pick)
        self.world.fabric.end_copy(receiver, how("damaged"))

    @precondition(lambda self: self.world.fabric.confirmable())
    @rule(pick=picks)
    def copy_is_confirmed(self, pick: int) -> None:
        choose(self.world.fabric.confirmable(), pick).finish()

    @rule()
    def outcomes_are_taken(self) -> None:
        self.world.collect()

    @rule()
    def all_messages_arrive(self) -> None:
        self.world.run_control()

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        self.world.run()

    # What goes wrong; one rule, so that it does not go wrong all the time

    @rule(
        fault=st.sampled_from(
            [
                "message reaches a server twice",
                "message reaches a client twice",
                "messages to a client change places",
                "control connection is lost",
                "data link is cut",
                "descriptors run out once",
            ]
        ),
        pick=picks,
        is_seen_by=st.sampled_from([(), ("p",), ("d", "e"), ("p", "d", "e")]),
    )
    def goes_wrong(self, fault: str, pick: int, is_seen_by: tuple[str, ...]) -> None:
        to_servers = self.channels(lambda c: c.to_server)
        to_clients = self.channels(lambda c: c.to_client)
        connected = self.channels(lambda c: not c.is_closed and not c.is_lost)
        halves = [half for end in self.world.fabric.ends.values() for half in end.halves]
        match fault:
            case "message reaches a server twice" if to_servers:
                channel = choose(to_servers, pick)
                message = decode(channel.to_server[0])
                self.world.deliver_to_server(channel)
                self.world.serve(channel, message)
            case "message reaches a client twice" if to_clients:
                channel = choose(to_clients, pick)
                channel.to_client.appendleft(channel.to_client[0])
                self.world.deliver_to_client(channel)
            case "messages to a client change places" if to_clients:
                choose(to_clients, pick).to_client.rotate(1)
            case "control connection is lost" if connected:
                choose(connected, pick).lose()
                self.world.poll_consumers()
            case "data link is cut" if halves:
                self.world.cut(choose(halves, pick).peer_id, is_seen_by)
            case "descriptors run out once":
                self.world.network.num_refused_clients = 1
            case _:
                pass  # there is nothing that this could happen to

    # What must hold at any time

    @invariant()
    def what_is_freed_or_reported_is_left_alone(self) -> None:
        for producer in self.world.producers:
            producer.check()
        for consumer in self.world.consumers:
            consumer.check()
            self.check_that_no_fetch_waits_for_ever(consumer)

    def check_that_no_fetch_waits_for_ever(self, worker: ConsumerRank) -> None:
        for request_id in worker.unreported:
            blocks = set(worker.asked[request_id].block_ids)
            is_moving = any(blocks & set(half.block_ids) for half in worker.transport.halves)
            assert is_moving or worker.consumer.next_deadline() is not None

    @invariant()
    def sessions_raise_nothing_that_they_do_not_expect(self) -> None:
        assert self.loud.records == []


TestSessionsUnderAnyEvents = Sessions.TestCase
TestSessionsUnderAnyEvents.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None
)
