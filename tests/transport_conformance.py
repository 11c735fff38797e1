"""The Transport contract as tests. A backend passes by subclassing this."""

from __future__ import annotations

import ctypes
import mmap
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from vllm_pd.errors import LocalProtocolError, PeerLostError, RemoteProtocolError, TransferError
from vllm_pd.transport.base import KVRegion, TransferOutcome, Transport

NUM_BLOCKS = 8
BLOCK_LENS = (3 * 4096, 1000)  # bytes per block of each region; the second is not page-friendly
MISALIGNED = 64  # bytes from the start of a page, as PyTorch's allocations are
TIMEOUT_S = 10.0
SESSION = "session-1"  # the peer id on both sides


class Arena:
    """Private anonymous memory that starts off a page boundary, like a KV cache."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, num_bytes + 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
        self._pin = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        self.addr = ctypes.addressof(self._pin) + MISALIGNED
        self.num_bytes = num_bytes

    def read(self, addr: int, num_bytes: int) -> bytes:
        return ctypes.string_at(addr, num_bytes)

    def write(self, addr: int, data: bytes) -> None:
        ctypes.memmove(addr, data, len(data))


@dataclass
class Worker:
    """One end of a pair: a transport and the KV cache memory it registered."""

    name: str
    transport: Transport
    arena: Arena
    regions: list[KVRegion]

    def block(self, region: int, block_id: int) -> bytes:
        span = self.regions[region]
        return self.arena.read(span.addr + block_id * span.block_len, span.block_len)

    def fill(self, region: int, block_id: int, value: int) -> None:
        span = self.regions[region]
        data = bytes((value + i) % 256 for i in range(span.block_len))
        self.arena.write(span.addr + block_id * span.block_len, data)


def make_worker(name: str, transport: Transport, *, num_blocks: int = NUM_BLOCKS) -> Worker:
    """Make two regions in one allocation, one behind the other, and register them."""
    arena = Arena(num_blocks * sum(BLOCK_LENS))
    regions, addr = [], arena.addr
    for index, block_len in enumerate(BLOCK_LENS):
        regions.append(KVRegion(f"layer.{index}", addr, num_blocks, block_len))
        addr += num_blocks * block_len
    worker = Worker(name, transport, arena, regions)
    for region in range(len(BLOCK_LENS)):
        for block_id in range(num_blocks):
            worker.fill(region, block_id, value=17 * region + 31 * block_id + len(name))
    transport.register_regions(regions)
    return worker


def introduce(left: Worker, right: Worker) -> None:
    left.transport.add_peer(SESSION, right.transport.local_endpoint())
    right.transport.add_peer(SESSION, left.transport.local_endpoint())


def drive(*workers: Worker, until: Callable[[], bool]) -> dict[str, list[TransferOutcome]]:
    """Poll the workers, blocking on their descriptors, until a condition holds."""
    outcomes: dict[str, list[TransferOutcome]] = {worker.name: [] for worker in workers}
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        for worker in workers:
            outcomes[worker.name] += worker.transport.poll()
        if until():
            return outcomes
        assert time.monotonic() < deadline, outcomes
        select.select([worker.transport.fileno() for worker in workers], [], [], 0.05)


def outcomes_of(*workers: Worker, count: int = 1) -> dict[str, list[TransferOutcome]]:
    """Poll until each worker has ``count`` outcomes."""
    seen: dict[str, list[TransferOutcome]] = {worker.name: [] for worker in workers}
    deadline = time.monotonic() + TIMEOUT_S
    while any(len(found) < count for found in seen.values()):
        assert time.monotonic() < deadline, seen
        for worker in workers:
            seen[worker.name] += worker.transport.poll()
        select.select([worker.transport.fileno() for worker in workers], [], [], 0.05)
    return seen


class TransportConformance(ABC):
    """Subclass as ``TestX`` and provide ``make_transport``."""

    @abstractmethod
    def make_transport(self) -> Transport:
        """Return a fresh transport."""

    @pytest.fixture
    def pair(self) -> Iterator[tuple[Worker, Worker]]:
        """Return a producer and a consumer, peers of each other, with two regions."""
        producer = make_worker("p0", self.make_transport())
        consumer = make_worker("decode", self.make_transport())
        introduce(producer, consumer)
        yield producer, consumer
        producer.transport.close()
        consumer.transport.close()

    def test_registration_keeps_content_and_addresses(self) -> None:
        worker = make_worker("p0", self.make_transport())
        twin = make_worker("p0", self.make_transport())  # same content by construction
        assert [worker.block(r, b) for r in range(2) for b in range(NUM_BLOCKS)] == [
            twin.block(r, b) for r in range(2) for b in range(NUM_BLOCKS)
        ]
        worker.transport.close()
        twin.transport.close()

    def test_blocks_arrive_where_asked(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        untouched = [consumer.block(r, b) for r in range(2) for b in (1, 2, 3, 4, 6)]
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[6, 2])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0, 5])

        seen = outcomes_of(producer, consumer)

        num_bytes = 2 * sum(BLOCK_LENS)
        assert seen[producer.name] == [TransferOutcome(SESSION, 1, num_bytes)]
        assert seen[consumer.name] == [TransferOutcome(SESSION, 1, num_bytes)]
        for region in range(2):
            assert consumer.block(region, 0) == producer.block(region, 6)
            assert consumer.block(region, 5) == producer.block(region, 2)
        assert untouched == [consumer.block(r, b) for r in range(2) for b in (1, 2, 3, 4, 6)]

    def test_every_block_of_every_region_can_travel(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        block_ids = [7, 0, 1, 2, 6, 5, 4, 3]
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=block_ids)
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=block_ids)
        assert outcomes_of(consumer, producer)[consumer.name][0].error is None
        for region in range(2):
            for block_id in range(NUM_BLOCKS):
                assert consumer.block(region, block_id) == producer.block(region, block_id)

    def test_what_is_written_after_registration_is_what_travels(
        self, pair: tuple[Worker, Worker]
    ) -> None:
        producer, consumer = pair
        for region in range(2):
            for block_id in range(NUM_BLOCKS):
                producer.fill(region, block_id, value=200)
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0, 7])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0, 7])
        outcomes_of(producer, consumer)
        assert consumer.block(0, 0) == producer.block(0, 0)
        assert consumer.block(1, 7) == producer.block(1, 7)

    def test_receiver_may_post_first(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[3])
        drive(producer, consumer, until=lambda: True)
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[4])
        outcomes_of(producer, consumer)
        assert consumer.block(0, 3) == producer.block(0, 4)

    def test_both_directions_at_once(self, pair: tuple[Worker, Worker]) -> None:
        left, right = pair
        theirs, ours = right.block(0, 1), left.block(0, 2)
        left.transport.send_blocks(SESSION, 1, [2])
        right.transport.recv_blocks(SESSION, 1, [3])
        right.transport.send_blocks(SESSION, 1, [1])
        left.transport.recv_blocks(SESSION, 1, [4])
        outcomes_of(left, right, count=2)
        assert right.block(0, 3) == ours
        assert left.block(0, 4) == theirs

    def test_source_may_be_overwritten_after_its_outcome(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        original = producer.block(0, 0)
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        sent: list[TransferOutcome] = []
        deadline = time.monotonic() + TIMEOUT_S
        while not sent and time.monotonic() < deadline:
            consumer.transport.poll()
            sent += producer.transport.poll()
        assert sent
        producer.fill(0, 0, value=99)
        drive(producer, consumer, until=lambda: True)
        assert consumer.block(0, 0) == original

    def test_outcomes_come_in_posting_order(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        for transfer_id, block_id in ((1, 3), (2, 0), (7, 5)):
            producer.transport.send_blocks(SESSION, transfer_id, [block_id])
            consumer.transport.recv_blocks(SESSION, transfer_id, [block_id])
        seen = outcomes_of(producer, consumer, count=3)
        for worker in pair:
            assert [outcome.transfer_id for outcome in seen[worker.name]] == [1, 2, 7]

    def test_losing_a_peer_fails_its_transfers_once(self, pair: tuple[Worker, Worker]) -> None:
        _producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.remove_peer(SESSION)
        (outcome,) = outcomes_of(consumer)[consumer.name]
        assert isinstance(outcome.error, PeerLostError)
        assert consumer.transport.poll() == []

    def test_removing_an_unknown_peer_is_ignored(self, pair: tuple[Worker, Worker]) -> None:
        producer, _ = pair
        producer.transport.remove_peer("nobody")
        assert producer.transport.poll() == []

    def test_producer_that_closes_fails_the_consumer(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        drive(producer, consumer, until=lambda: True)
        producer.transport.close()
        (outcome,) = outcomes_of(consumer)[consumer.name]
        assert isinstance(outcome.error, PeerLostError)

    def test_consumer_that_closes_fails_the_producer(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        # A first transfer, so that the link is up.
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        outcomes_of(producer, consumer)
        producer.transport.send_blocks(SESSION, transfer_id=2, block_ids=[0])
        consumer.transport.close()
        (outcome,) = outcomes_of(producer)[producer.name]
        assert isinstance(outcome.error, PeerLostError)

    def test_unequal_block_counts_fail_both_sides(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0, 1])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        seen = outcomes_of(producer, consumer)
        assert seen[producer.name][0].error is not None
        assert seen[consumer.name][0].error is not None

    def test_close_fails_what_is_posted_and_may_be_repeated(
        self, pair: tuple[Worker, Worker]
    ) -> None:
        _producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.close()
        consumer.transport.close()
        (outcome,) = consumer.transport.poll()
        assert isinstance(outcome.error, TransferError)
        assert consumer.transport.poll() == []

    def test_peer_can_come_back_after_removal(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        producer.transport.remove_peer(SESSION)
        consumer.transport.remove_peer(SESSION)
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[5])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[6])
        outcomes_of(producer, consumer)
        assert consumer.block(0, 6) == producer.block(0, 5)

    def test_unknown_peer_is_our_bug(self, pair: tuple[Worker, Worker]) -> None:
        producer, _ = pair
        with pytest.raises(LocalProtocolError):
            producer.transport.send_blocks("nobody", transfer_id=1, block_ids=[0])

    def test_posting_a_transfer_twice_is_our_bug(self, pair: tuple[Worker, Worker]) -> None:
        _, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        with pytest.raises(LocalProtocolError):
            consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])

    @pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS])
    def test_block_out_of_range_is_our_bug(
        self, pair: tuple[Worker, Worker], block_id: int
    ) -> None:
        producer, _consumer = pair
        with pytest.raises(LocalProtocolError):
            producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[block_id])

    def test_foreign_endpoint_blames_the_peer(self, pair: tuple[Worker, Worker]) -> None:
        producer, _ = pair
        with pytest.raises(RemoteProtocolError):
            producer.transport.add_peer("x", b"\xc1 not an endpoint")

    def test_peers_reach_each_other(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        assert consumer.transport.can_reach(producer.transport.local_endpoint())

    def test_idle_transport_has_nothing_to_poll(self, pair: tuple[Worker, Worker]) -> None:
        producer, consumer = pair
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        outcomes_of(producer, consumer)
        drive(producer, consumer, until=lambda: True)
        ready, _, _ = select.select([producer.transport.fileno()], [], [], 0.05)
        assert ready == []
