"""What a consumer and its producers agree on, step by step; I/O is faked."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.session.world import CONFIG, ConsumerRank, World
from vllm_pd.errors import (
    DigestMismatchError,
    IncompatiblePeerError,
    LeaseExpiredError,
    PDError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
)
from vllm_pd.session.stats import Outcome


@pytest.fixture
def world() -> World:
    """Return two producer ranks and a consumer that gets a head from each."""
    return World(2, {"d": 1}, 2)


@pytest.fixture
def consumer(world: World) -> ConsumerRank:
    return world.consumers[0]


def error_of(consumer: ConsumerRank) -> PDError | None:
    """Return how the only fetch ended."""
    consumer.check()
    (result,) = consumer.reported.values()
    return result.error


def grant_everywhere(world: World, transfer_id: str = "a") -> None:
    for worker in world.producers:
        world.grant(worker.rank, transfer_id)


@pytest.mark.parametrize(
    "changes",
    [
        {"tp_size": 0},
        {"tp_size": -2},
        {"tp_size": 3},
        {"tp_size": 1 << 40},
        {"workers": ()},
        {"engine_id": "another"},
    ],
    ids=str,
)
def test_description_that_cannot_be_fails_the_fetch_at_once(
    world: World, consumer: ConsumerRank, changes: dict[str, object]
) -> None:
    world.info = msgspec.structs.replace(world.info, **changes)
    world.fetch(consumer, "a")
    world.run()
    assert isinstance(error_of(consumer), (IncompatiblePeerError, PeerLostError))
    world.drain()


def test_worker_on_a_host_that_may_not_be_reached_is_not_spoken_to(
    world: World, consumer: ConsumerRank
) -> None:
    workers = [msgspec.structs.replace(w, host="192.0.2.1") for w in world.info.workers]
    world.info = msgspec.structs.replace(world.info, workers=tuple(workers))
    world.fetch(consumer, "a")
    world.run()
    assert isinstance(error_of(consumer), IncompatiblePeerError)
    assert len(world.network.channels) == 2  # the instance endpoint: described, released


def test_producer_that_answers_describe_with_something_else_is_given_up(
    world: World, consumer: ConsumerRank
) -> None:
    world.fetch(consumer, "a")
    (channel,) = world.network.channels
    channel.inbox.append(msgspec.msgpack.encode({"type": "goodbye"}))
    world.poll_consumers()
    assert "instead of a description" in str(error_of(consumer))


def test_one_description_and_one_session_per_worker_serve_all_fetches(
    world: World, consumer: ConsumerRank
) -> None:
    for transfer_id in "abc":
        grant_everywhere(world, transfer_id)
        world.fetch(consumer, transfer_id)
        world.fetch(consumer, transfer_id)
    world.run()
    ports = [channel.port for channel in world.network.channels if not channel.is_closed]
    assert sorted(ports) == [world.port_of(0), world.port_of(1)]
    world.drain()


def test_fetch_ends_when_its_last_part_does_and_the_first_error_counts(
    world: World, consumer: ConsumerRank
) -> None:
    grant_everywhere(world)
    world.fetch(consumer, "a")
    world.run_control()
    (_, first), (_, second) = world.fabric.startable()
    second.is_busy = True
    world.fabric.end_copy(first, DigestMismatchError("damaged"))
    world.collect()
    assert consumer.reported == {}
    world.fabric.end_copy(second, TransferError("later"))
    world.collect()
    assert isinstance(error_of(consumer), DigestMismatchError)


def test_failed_fetch_gives_the_blocks_back_on_all_ranks(
    world: World, consumer: ConsumerRank
) -> None:
    grant_everywhere(world)
    world.fetch(consumer, "a")
    world.run_control()
    _, receiver = world.fabric.startable()[0]
    world.fabric.end_copy(receiver, DigestMismatchError("damaged"))
    world.run()
    for producer in world.producers:
        assert list(producer.freed) == list(producer.granted)


def test_fetch_whose_producer_is_lost_while_bytes_move_waits_for_the_transport(
    world: World, consumer: ConsumerRank
) -> None:
    grant_everywhere(world)
    world.fetch(consumer, "a")
    world.run_control()
    for _, receiver in world.fabric.startable():
        receiver.is_busy = True
    for channel in world.network.channels:
        channel.lose()
    world.poll_consumers()
    world.collect()
    assert consumer.reported == {}
    for receiver in world.fabric.receivers():
        world.fabric.end_copy(receiver, None)
    world.collect()
    assert isinstance(error_of(consumer), PeerLostError)


def test_failed_transfer_leaves_the_lease_for_another_try(
    world: World, consumer: ConsumerRank
) -> None:
    grant_everywhere(world)
    world.fetch(consumer, "a")
    world.run_control()
    for _, receiver in world.fabric.startable():
        world.fabric.end_copy(receiver, TransferError("once"))
    world.collect()
    assert all(not producer.freed for producer in world.producers)
    again = world.fetch(consumer, "a")
    world.network.channels = [c for c in world.network.channels if c.port != 1]  # no release
    world.run()
    assert consumer.reported[again].error is None


def test_session_that_is_lost_is_made_anew_for_the_next_fetch(
    world: World, consumer: ConsumerRank
) -> None:
    grant_everywhere(world)
    first = world.fetch(consumer, "a")
    world.run()
    for channel in world.network.channels:
        channel.lose()
    world.poll_consumers()
    grant_everywhere(world, "b")
    second = world.fetch(consumer, "b")
    world.run()
    assert [consumer.reported[request].error for request in (first, second)] == [None, None]


def test_producer_that_does_not_answer_is_given_up_in_time(
    world: World, consumer: ConsumerRank
) -> None:
    world.fetch(consumer, "a")
    assert consumer.consumer.next_deadline() == world.now + CONFIG.handshake_timeout_s
    world.tick(CONFIG.handshake_timeout_s)
    assert isinstance(error_of(consumer), TransferTimeoutError)
    assert consumer.consumer.num_handshake_failures == {"timeout": 1}


def test_worker_that_does_not_answer_is_given_up_in_time(
    world: World, consumer: ConsumerRank
) -> None:
    world.fetch(consumer, "a")
    (channel,) = world.network.channels
    world.deliver_to_server(channel)
    world.deliver_to_client(channel)
    world.tick(CONFIG.handshake_timeout_s)
    assert isinstance(error_of(consumer), TransferTimeoutError)
    assert consumer.consumer.num_handshake_failures == {"timeout": 2}


def test_prefill_that_does_not_come_is_given_up_in_time(
    world: World, consumer: ConsumerRank
) -> None:
    world.fetch(consumer, "a")
    world.run()
    world.tick(CONFIG.transfer_timeout_s)
    world.run()
    assert isinstance(error_of(consumer), (TransferTimeoutError, LeaseExpiredError))
    grant_everywhere(world)  # nobody waits for it any more
    world.run()
    world.tick(CONFIG.lease_s)
    for producer in world.producers:
        assert list(producer.freed) == list(producer.granted)


def test_rank_of_which_nothing_is_needed_is_told_so_and_frees_at_once() -> None:
    world = World(2, {"d": 1}, 1)
    (consumer,) = world.consumers
    grant_everywhere(world)
    world.fetch(consumer, "a")
    world.run_control()
    world.collect()
    assert len(world.fabric.startable()) == 1
    assert list(world.producers[1].freed) == list(world.producers[1].granted)
    assert consumer.reported == {}
    world.run()
    assert error_of(consumer) is None


@pytest.fixture
def copied() -> World:
    """Return two producer ranks that hold the same head, and a consumer that reads from the first.

    Both have granted, and the consumer greets them.
    """
    world = World(2, {"d": 1}, 1)
    grant_everywhere(world)
    world.fetch(world.consumers[0], "a")
    (describing,) = world.network.channels
    world.deliver_to_server(describing)
    world.deliver_to_client(describing)
    return world


def cut_off(world: World, rank: int) -> None:
    """Cut the connections to one worker that there are now."""
    for channel in world.network.channels:
        if channel.port == world.port_of(rank):
            channel.lose()
    world.poll_consumers()


def test_rank_that_could_not_be_told_frees_at_once_while_another_is_read(copied: World) -> None:
    cut_off(copied, rank=1)
    copied.run_control()
    copied.collect()
    assert list(copied.producers[1].freed) == list(copied.producers[1].granted)
    assert not copied.producers[0].freed
    copied.run()
    assert error_of(copied.consumers[0]) is None
    copied.drain()


def test_rank_that_could_not_be_told_in_time_frees_its_blocks_when_it_gets_them() -> None:
    world = World(2, {"d": 1}, 1)
    world.grant(0, "a")
    world.fetch(world.consumers[0], "a")
    world.run()
    cut_off(world, rank=1)
    world.run()
    world.grant(1, "a")
    world.collect()
    assert list(world.producers[1].freed) == list(world.producers[1].granted)
    world.drain()


def test_rank_of_which_nothing_is_needed_frees_at_once_when_the_fetch_is_aborted(
    copied: World,
) -> None:
    (request_id,) = copied.consumers[0].unreported
    copied.abort(copied.consumers[0], request_id)
    copied.run()
    assert all(list(p.freed) == list(p.granted) for p in copied.producers)
    copied.drain()


def test_rank_whose_lease_is_over_is_not_told_again(copied: World) -> None:
    copied.producers[1].producer.release("a")
    copied.run()
    ports = [c.port for c in copied.network.channels if c.port == copied.port_of(1)]
    assert len(ports) == 1
    copied.drain()


def test_fetch_needs_nothing_of_a_rank_that_only_holds_copies() -> None:
    """Its part may fail without harm: the bytes come from another one."""
    world = World(2, {"d": 1}, 1)
    (consumer,) = world.consumers
    world.grant(0, "a")
    world.fetch(consumer, "a")
    world.run()
    assert error_of(consumer) is None


def test_record_says_how_it_went(world: World, consumer: ConsumerRank) -> None:
    grant_everywhere(world)
    request = world.fetch(consumer, "a", offset=1, num_blocks=2)
    world.now += 1.0
    world.run_control()
    world.now += 2.0
    world.run()
    record = consumer.reported[request].record
    assert (record.outcome, record.transport, record.request_id) == (
        Outcome.OK,
        "memory",
        request,
    )
    assert record.num_bytes == 2 * 2  # the double counts blocks, of two parts
    assert record.num_bytes_saved == 2 * 8  # block 0: two heads of 8 bytes
    timeline = record.timeline
    assert (timeline.handshake_s, timeline.transfer_s, timeline.total_s) == (1.0, 2.0, 3.0)


def test_closed_consumer_says_goodbye(world: World, consumer: ConsumerRank) -> None:
    grant_everywhere(world)
    world.fetch(consumer, "a")
    world.run()
    assert all(producer.transport.peers for producer in world.producers)
    consumer.consumer.close(world.now)
    world.run()
    assert not any(producer.transport.peers for producer in world.producers)
