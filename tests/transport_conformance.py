"""The Transport contract as tests. A backend passes by subclassing this."""

from __future__ import annotations

import ctypes
import functools
import mmap
import random
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from vllm_pd.config import Digests
from vllm_pd.errors import (
    DigestMismatchError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    TransferError,
)
from vllm_pd.transport.base import Heads, KVRegion, TransferOutcome, Transport, TransportOptions


@dataclass(frozen=True)
class Shape:
    """Geometry of a block of one region."""

    num_rows: int
    num_heads: int
    head_len: int

    @property
    def block_len(self) -> int:
        return self.num_rows * self.num_heads * self.head_len


NUM_BLOCKS = 8
SHAPES = (Shape(1, 1, 3 * 4096), Shape(1, 1, 1000))  # the second is not page-friendly
BLOCK_LENS = tuple(shape.block_len for shape in SHAPES)
MISALIGNED = 64  # bytes from the start of a page, as PyTorch's allocations are
TIMEOUT_S = 60.0  # far more than is needed, as other work may keep the machine busy
SESSION = "session-1"  # the peer id on both sides
MIB = 1 << 20


def with_heads(num_heads: int) -> tuple[Shape, ...]:
    """Regions with one row per block, as on CPU, and with one per token, as on NPU."""
    return Shape(1, num_heads, 700), Shape(16, num_heads, 24), Shape(3, num_heads, 40)


def of_many_chunks(num_heads: int = 2) -> tuple[Shape, ...]:
    """Regions whose blocks are larger than any chunk, or in more parts than one call takes."""
    return Shape(1, num_heads, MIB), Shape(16, num_heads, MIB // 16), Shape(512, num_heads, 32)


@functools.cache
def noise(seed: int, num_bytes: int) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


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
    regions: list[KVRegion]  # with addresses of this process, whatever the transport knows

    def block(self, region: int, block_id: int) -> bytes:
        span = self.regions[region]
        return self.arena.read(span.addr + block_id * span.block_len, span.block_len)

    def heads(self, region: int, block_id: int, heads: Heads) -> list[bytes]:
        """Return the bytes of some heads, row by row."""
        span, block = self.regions[region], self.block(region, block_id)
        first, last = heads[0] * span.head_len, sum(heads) * span.head_len
        starts = range(0, span.block_len, span.row_len)
        return [block[start + first : start + last] for start in starts]

    def fill(self, region: int, block_id: int, value: int) -> None:
        span = self.regions[region]
        self.arena.write(span.addr + block_id * span.block_len, noise(value, span.block_len))

    def content(self) -> list[list[bytes]]:
        """Return all blocks of all regions."""
        return [
            [self.block(index, block_id) for block_id in range(region.num_blocks)]
            for index, region in enumerate(self.regions)
        ]


def make_worker(
    name: str,
    transport: Transport,
    *,
    shapes: Sequence[Shape] = SHAPES,
    num_blocks: int = NUM_BLOCKS,
    locate: Callable[[KVRegion], KVRegion] = lambda region: region,
    make_arena: Callable[[int], Arena] = Arena,
) -> Worker:
    """Make regions in one allocation, one behind the other, and register them.

    Args:
        name: of the worker; the content depends on it.
        transport: of the worker.
        shapes: of the regions.
        num_blocks: blocks of every region.
        locate: tells the transport another place of a region.
        make_arena: allocates the memory of all regions.
    """
    arena = make_arena(num_blocks * sum(shape.block_len for shape in shapes))
    regions, addr = [], arena.addr
    for index, shape in enumerate(shapes):
        regions.append(
            KVRegion(
                f"layer.{index}",
                addr,
                num_blocks,
                shape.block_len,
                num_rows=shape.num_rows,
                num_heads=shape.num_heads,
            )
        )
        addr += num_blocks * shape.block_len
    worker = Worker(name, transport, arena, regions)
    for region in range(len(shapes)):
        for block_id in range(num_blocks):
            worker.fill(region, block_id, value=1000 * region + 31 * block_id + len(name))
    transport.register_regions([locate(region) for region in regions])
    return worker


def introduce(left: Worker, right: Worker, peer_id: str = SESSION) -> None:
    left.transport.add_peer(peer_id, right.transport.local_endpoint())
    right.transport.add_peer(peer_id, left.transport.local_endpoint())


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


Pair = tuple[Worker, Worker]
Make = Callable[..., Worker]
Connect = Callable[..., Pair]


class TransportConformance(ABC):
    """Subclass as ``TestX`` and provide ``make_transport``."""

    @abstractmethod
    def make_transport(self) -> Transport:
        """Return a fresh transport."""

    def locate(self, region: KVRegion) -> KVRegion:
        """Return a region as the transport is to see it."""
        return region

    def make_arena(self, num_bytes: int) -> Arena:
        """Allocate the memory of a worker's regions."""
        return Arena(num_bytes)

    @pytest.fixture
    def make(self) -> Iterator[Make]:
        """Makes workers, and closes their transports at the end."""
        workers: list[Worker] = []

        def make(
            name: str,
            shapes: Sequence[Shape] = SHAPES,
            *,
            num_blocks: int = NUM_BLOCKS,
            transport: Transport | None = None,
        ) -> Worker:
            transport = transport or self.make_transport()
            workers.append(
                make_worker(
                    name,
                    transport,
                    shapes=shapes,
                    num_blocks=num_blocks,
                    locate=self.locate,
                    make_arena=self.make_arena,
                )
            )
            return workers[-1]

        yield make
        for worker in workers:
            worker.transport.close()

    @pytest.fixture
    def connect(self, make: Make) -> Connect:
        """Makes a producer and a consumer, peers of each other."""

        def connect(
            theirs: Sequence[Shape], ours: Sequence[Shape], *, num_blocks: int = NUM_BLOCKS
        ) -> Pair:
            producer = make("p0", theirs, num_blocks=num_blocks)
            consumer = make("decode", ours, num_blocks=num_blocks)
            introduce(producer, consumer)
            return producer, consumer

        return connect

    @pytest.fixture
    def pair(self, connect: Connect) -> Pair:
        """Return a producer and a consumer, peers of each other, with two regions."""
        return connect(SHAPES, SHAPES)

    def test_registration_keeps_content_and_addresses(self, make: Make) -> None:
        worker = make("p0")
        for region, block_id in ((0, 0), (0, 7), (1, 3)):
            before = worker.block(region, block_id)
            worker.fill(region, block_id, value=1000 * region + 31 * block_id + len("p0"))
            assert worker.block(region, block_id) == before

    def test_blocks_arrive_where_asked(self, pair: Pair) -> None:
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

    def test_every_block_of_every_region_can_travel(self, pair: Pair) -> None:
        producer, consumer = pair
        block_ids = [7, 0, 1, 2, 6, 5, 4, 3]
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=block_ids)
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=block_ids)
        assert outcomes_of(consumer, producer)[consumer.name][0].error is None
        for region in range(2):
            for block_id in range(NUM_BLOCKS):
                assert consumer.block(region, block_id) == producer.block(region, block_id)

    def test_what_is_written_after_registration_is_what_travels(self, pair: Pair) -> None:
        producer, consumer = pair
        for region in range(2):
            for block_id in range(NUM_BLOCKS):
                producer.fill(region, block_id, value=200)
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0, 7])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0, 7])
        outcomes_of(producer, consumer)
        assert consumer.block(0, 0) == producer.block(0, 0)
        assert consumer.block(1, 7) == producer.block(1, 7)

    def test_receiver_may_post_first(self, pair: Pair) -> None:
        producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[3])
        drive(producer, consumer, until=lambda: True)
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[4])
        outcomes_of(producer, consumer)
        assert consumer.block(0, 3) == producer.block(0, 4)

    def test_both_directions_at_once(self, pair: Pair) -> None:
        left, right = pair
        theirs, ours = right.block(0, 1), left.block(0, 2)
        left.transport.send_blocks(SESSION, 1, [2])
        right.transport.recv_blocks(SESSION, 1, [3])
        right.transport.send_blocks(SESSION, 1, [1])
        left.transport.recv_blocks(SESSION, 1, [4])
        outcomes_of(left, right, count=2)
        assert right.block(0, 3) == ours
        assert left.block(0, 4) == theirs

    def test_source_may_be_overwritten_after_its_outcome(self, pair: Pair) -> None:
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

    def test_outcomes_come_in_posting_order(self, pair: Pair) -> None:
        producer, consumer = pair
        for transfer_id, block_id in ((1, 3), (2, 0), (7, 5)):
            producer.transport.send_blocks(SESSION, transfer_id, [block_id])
            consumer.transport.recv_blocks(SESSION, transfer_id, [block_id])
        seen = outcomes_of(producer, consumer, count=3)
        for worker in pair:
            assert [outcome.transfer_id for outcome in seen[worker.name]] == [1, 2, 7]

    def test_losing_a_peer_fails_its_transfers_once(self, pair: Pair) -> None:
        _producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.remove_peer(SESSION)
        (outcome,) = outcomes_of(consumer)[consumer.name]
        assert isinstance(outcome.error, PeerLostError)
        assert consumer.transport.poll() == []

    def test_removing_an_unknown_peer_is_ignored(self, pair: Pair) -> None:
        producer, _ = pair
        producer.transport.remove_peer("nobody")
        assert producer.transport.poll() == []

    def test_producer_that_closes_fails_the_consumer(self, pair: Pair) -> None:
        producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        drive(producer, consumer, until=lambda: True)
        producer.transport.close()
        (outcome,) = outcomes_of(consumer)[consumer.name]
        assert isinstance(outcome.error, PeerLostError)

    def test_consumer_that_closes_fails_the_producer(self, pair: Pair) -> None:
        producer, consumer = pair
        # A first transfer, so that the link is up.
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        outcomes_of(producer, consumer)
        producer.transport.send_blocks(SESSION, transfer_id=2, block_ids=[0])
        consumer.transport.close()
        (outcome,) = outcomes_of(producer)[producer.name]
        assert isinstance(outcome.error, PeerLostError)

    def test_unequal_block_counts_fail_both_sides(self, pair: Pair) -> None:
        producer, consumer = pair
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0, 1])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        seen = outcomes_of(producer, consumer)
        assert seen[producer.name][0].error is not None
        assert seen[consumer.name][0].error is not None

    def test_close_fails_what_is_posted_and_may_be_repeated(self, pair: Pair) -> None:
        _producer, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.close()
        consumer.transport.close()
        (outcome,) = consumer.transport.poll()
        assert isinstance(outcome.error, TransferError)
        assert consumer.transport.poll() == []

    def test_peer_can_come_back_after_removal(self, pair: Pair) -> None:
        producer, consumer = pair
        producer.transport.remove_peer(SESSION)
        consumer.transport.remove_peer(SESSION)
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[5])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[6])
        outcomes_of(producer, consumer)
        assert consumer.block(0, 6) == producer.block(0, 5)

    def test_unknown_peer_is_our_bug(self, pair: Pair) -> None:
        producer, _ = pair
        with pytest.raises(LocalProtocolError):
            producer.transport.send_blocks("nobody", transfer_id=1, block_ids=[0])

    def test_posting_a_transfer_twice_is_our_bug(self, pair: Pair) -> None:
        _, consumer = pair
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        with pytest.raises(LocalProtocolError):
            consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])

    @pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS])
    def test_block_out_of_range_is_our_bug(self, pair: Pair, block_id: int) -> None:
        producer, _consumer = pair
        with pytest.raises(LocalProtocolError):
            producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[block_id])

    def test_foreign_endpoint_blames_the_peer(self, pair: Pair) -> None:
        producer, _ = pair
        with pytest.raises(RemoteProtocolError):
            producer.transport.add_peer("x", b"\xc1 not an endpoint")

    def test_peers_reach_each_other(self, pair: Pair) -> None:
        producer, consumer = pair
        assert consumer.transport.can_reach(producer.transport.local_endpoint())

    def test_idle_transport_has_nothing_to_poll(self, pair: Pair) -> None:
        producer, consumer = pair
        producer.transport.send_blocks(SESSION, transfer_id=1, block_ids=[0])
        consumer.transport.recv_blocks(SESSION, transfer_id=1, block_ids=[0])
        outcomes_of(producer, consumer)
        drive(producer, consumer, until=lambda: True)
        ready, _, _ = select.select([producer.transport.fileno()], [], [], 0.05)
        assert ready == []

    # Heads

    @pytest.mark.parametrize(
        ("num_theirs", "num_ours", "theirs", "ours"),
        [
            (4, 2, (0, 2), None),
            (4, 2, (2, 2), None),
            (4, 2, (1, 1), (1, 1)),
            (2, 4, None, (0, 2)),
            (2, 4, None, (2, 2)),
            (2, 4, (1, 1), (3, 1)),
            (4, 4, (1, 2), (2, 2)),
            (4, 4, (0, 4), None),
            (4, 4, None, (0, 4)),
            (1, 4, None, (2, 1)),
        ],
    )
    def test_heads_arrive_where_asked_and_nothing_else_changes(
        self,
        connect: Connect,
        num_theirs: int,
        num_ours: int,
        theirs: Heads | None,
        ours: Heads | None,
    ) -> None:
        producer, consumer = connect(with_heads(num_theirs), with_heads(num_ours))
        sent, expected = producer.content(), consumer.content()
        pairs = list(zip([6, 2, 3, 7, 0], [0, 5, 6, 1, 7], strict=True))
        producer.transport.send_blocks(
            SESSION, 1, [src for src, _ in pairs], heads=theirs, digests=Digests.ALWAYS
        )
        consumer.transport.recv_blocks(SESSION, 1, [dst for _, dst in pairs], heads=ours)

        seen = outcomes_of(producer, consumer)

        from_head, count = theirs or (0, num_theirs)
        to_head = (ours or (0, num_ours))[0]
        num_bytes = 0
        for index, (src, dst) in enumerate(zip(producer.regions, consumer.regions, strict=True)):
            num_bytes += len(pairs) * src.num_rows * count * src.head_len
            for src_id, dst_id in pairs:
                block = bytearray(expected[index][dst_id])
                for row in range(src.num_rows):
                    come = row * src.row_len + from_head * src.head_len
                    go = row * dst.row_len + to_head * dst.head_len
                    length = count * src.head_len
                    block[go : go + length] = sent[index][src_id][come : come + length]
                expected[index][dst_id] = bytes(block)
        assert consumer.content() == expected
        assert producer.content() == sent
        assert seen[consumer.name] == [TransferOutcome(SESSION, 1, num_bytes)]
        assert seen[producer.name] == [TransferOutcome(SESSION, 1, num_bytes)]

    def test_heads_of_two_senders_come_together(self, make: Make) -> None:
        left, right = make("p0", with_heads(2)), make("p1-", with_heads(2))
        consumer = make("decode", with_heads(4))
        for worker, first in ((left, 0), (right, 2)):
            introduce(worker, consumer, worker.name)
            worker.transport.send_blocks(consumer_id := worker.name, 1, [3, 1])
            consumer.transport.recv_blocks(consumer_id, 1, [2, 6], heads=(first, 2))
        everybody = (left, right, consumer)
        seen = {worker.name: 0 for worker in everybody}

        def count() -> bool:
            return seen == {left.name: 1, right.name: 1, consumer.name: 2}

        deadline = time.monotonic() + TIMEOUT_S
        while not count():
            assert time.monotonic() < deadline
            for worker in everybody:
                outcomes = worker.transport.poll()
                assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
                seen[worker.name] += len(outcomes)
            select.select([worker.transport.fileno() for worker in everybody], [], [], 0.05)
        for region in range(3):
            for src, dst in ((3, 2), (1, 6)):
                assert consumer.heads(region, dst, (0, 2)) == left.heads(region, src, (0, 2))
                assert consumer.heads(region, dst, (2, 2)) == right.heads(region, src, (0, 2))

    @pytest.mark.parametrize(
        ("num_theirs", "num_ours", "theirs", "ours"),
        [(4, 4, (0, 1), (0, 2)), (4, 4, (0, 2), (0, 1)), (4, 2, None, None), (2, 4, None, None)],
    )
    def test_unequal_head_counts_fail_both_sides_and_write_nothing(
        self,
        connect: Connect,
        num_theirs: int,
        num_ours: int,
        theirs: Heads | None,
        ours: Heads | None,
    ) -> None:
        producer, consumer = connect(with_heads(num_theirs), with_heads(num_ours))
        before = consumer.content()
        producer.transport.send_blocks(SESSION, 1, [0, 1], heads=theirs)
        consumer.transport.recv_blocks(SESSION, 1, [2, 3], heads=ours)
        seen = outcomes_of(producer, consumer)
        assert seen[producer.name][0].error is not None
        assert seen[consumer.name][0].error is not None
        assert consumer.content() == before

    @pytest.mark.parametrize("heads", [(-1, 1), (0, 0), (3, 2), (0, 5), (4, 1)])
    def test_heads_out_of_range_are_our_bug(self, connect: Connect, heads: Heads) -> None:
        producer, consumer = connect(with_heads(4), with_heads(4))
        with pytest.raises(LocalProtocolError):
            producer.transport.send_blocks(SESSION, 1, [0], heads=heads)
        with pytest.raises(LocalProtocolError):
            consumer.transport.recv_blocks(SESSION, 1, [0], heads=heads)

    def test_transfer_of_nothing_is_our_bug(self, pair: Pair) -> None:
        producer, consumer = pair
        with pytest.raises(LocalProtocolError):
            producer.transport.send_blocks(SESSION, 1, [])
        with pytest.raises(LocalProtocolError):
            consumer.transport.recv_blocks(SESSION, 1, [])

    # Many chunks

    @pytest.mark.parametrize(
        ("heads", "digests"),
        [(None, Digests.OFF), (None, Digests.ALWAYS), ((1, 1), Digests.SAMPLED)],
    )
    def test_transfer_of_many_chunks_arrives(
        self, connect: Connect, heads: Heads | None, digests: Digests
    ) -> None:
        producer, consumer = connect(of_many_chunks(), of_many_chunks(), num_blocks=4)
        producer.transport.send_blocks(SESSION, 1, [3, 0, 1], heads=heads, digests=digests)
        consumer.transport.recv_blocks(SESSION, 1, [2, 3, 0], heads=heads)
        seen = outcomes_of(producer, consumer)
        assert [outcomes[0].error for outcomes in seen.values()] == [None, None], seen
        for region in range(3):
            for src, dst in ((3, 2), (0, 3), (1, 0)):
                moved = heads or (0, 2)
                there, here = producer.heads(region, src, moved), consumer.heads(region, dst, moved)
                assert here == there

    @pytest.mark.parametrize("digests", Digests)
    def test_sender_that_is_early_waits_for_the_receiver(
        self, connect: Connect, digests: Digests
    ) -> None:
        producer, consumer = connect(of_many_chunks(), of_many_chunks(), num_blocks=4)
        producer.transport.send_blocks(SESSION, 1, [0])
        consumer.transport.recv_blocks(SESSION, 1, [1])
        outcomes_of(producer, consumer)
        before = consumer.content()
        for transfer_id, blocks in ((2, [1, 2]), (3, [3])):
            producer.transport.send_blocks(SESSION, transfer_id, blocks, digests=digests)
        for _ in range(20):
            drive(producer, consumer, until=lambda: True)
        assert consumer.content() == before
        consumer.transport.recv_blocks(SESSION, 2, [2, 3])
        consumer.transport.recv_blocks(SESSION, 3, [0])
        seen = outcomes_of(producer, consumer, count=2)
        assert [outcome.error for outcome in seen[consumer.name]] == [None, None]
        for region in range(3):
            for src, dst in ((1, 2), (2, 3), (3, 0)):
                assert consumer.block(region, dst) == producer.block(region, src)

    def test_nothing_is_written_after_the_outcome_of_a_lost_transfer(
        self, connect: Connect
    ) -> None:
        producer, consumer = connect(of_many_chunks(), of_many_chunks(), num_blocks=4)
        producer.transport.send_blocks(SESSION, 1, [0, 1, 2, 3], digests=Digests.ALWAYS)
        consumer.transport.recv_blocks(SESSION, 1, [0, 1, 2, 3])
        for _ in range(3):
            producer.transport.poll()
            if consumer.transport.poll():
                pytest.skip("faster than we can cut it")
        consumer.transport.remove_peer(SESSION)
        (outcome,) = outcomes_of(consumer)[consumer.name]
        after = consumer.content()
        assert isinstance(outcome.error, PeerLostError)
        producer.transport.remove_peer(SESSION)  # there may have been no link yet
        (outcome,) = outcomes_of(producer)[producer.name]
        assert outcome.error is not None
        assert consumer.content() == after
        assert drive(consumer, producer, until=lambda: True) == {"decode": [], "p0": []}

    def test_peers_are_lost_apart(self, make: Make) -> None:
        producer, other = make("p0"), make("p1-")
        consumer = make("decode")
        introduce(producer, consumer, "a")
        introduce(other, consumer, "b")
        for peer_id in ("a", "b"):
            consumer.transport.recv_blocks(peer_id, 1, [0 if peer_id == "a" else 1])
        drive(producer, other, consumer, until=lambda: True)
        producer.transport.close()
        (outcome,) = outcomes_of(consumer)[consumer.name]
        assert (outcome.peer_id, type(outcome.error)) == ("a", PeerLostError)
        other.transport.send_blocks("b", 1, [5])
        assert outcomes_of(consumer, other)[consumer.name][0].error is None
        assert consumer.block(0, 1) == other.block(0, 5)


class Damage:
    """Flips a byte of one transfer; see ``TransportOptions.on_received``.

    Args:
        victim: what the transfer begins with; None for the first that comes.
    """

    def __init__(self, victim: bytes | None = None) -> None:
        self.num_damaged = 0
        self._victim = victim

    def __call__(self, first_bytes: memoryview) -> None:
        is_victim = self._victim is None or first_bytes[: len(self._victim)] == self._victim
        if is_victim and not self.num_damaged:
            first_bytes[0] ^= 0x80
            self.num_damaged += 1


class HostTransportConformance(TransportConformance):
    """Subclass as ``TestX`` and provide ``make_with``, for transports that take options."""

    @abstractmethod
    def make_with(self, options: TransportOptions) -> Transport:
        """Return a fresh transport."""

    def make_transport(self) -> Transport:
        return self.make_with(TransportOptions())

    @pytest.fixture
    def damage(self) -> Damage:
        return Damage()

    @pytest.fixture
    def damaged(self, make: Make, damage: Damage) -> Pair:
        """Return a producer and a consumer whose memory is bad."""
        producer = make("p0")
        consumer = make("decode", transport=self.make_with(TransportOptions(on_received=damage)))
        introduce(producer, consumer)
        return producer, consumer

    def test_damage_is_found(self, damaged: Pair) -> None:
        producer, consumer = damaged
        producer.transport.send_blocks(SESSION, 1, [0], digests=Digests.ALWAYS)
        consumer.transport.recv_blocks(SESSION, 1, [3])
        seen = outcomes_of(producer, consumer)
        (ours,), (theirs,) = seen[consumer.name], seen[producer.name]
        assert isinstance(ours.error, DigestMismatchError), seen
        assert (ours.num_bytes, theirs.num_bytes) == (0, 0)
        assert isinstance(theirs.error, TransferError), seen

    def test_damage_to_all_there_is_to_sample_is_found(self, make: Make, damage: Damage) -> None:
        producer = make("p0", SHAPES[:1])
        transport = self.make_with(TransportOptions(on_received=damage))
        consumer = make("decode", SHAPES[:1], transport=transport)
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, 1, [2], digests=Digests.SAMPLED)
        consumer.transport.recv_blocks(SESSION, 1, [5])
        seen = outcomes_of(consumer, producer)
        assert isinstance(seen[consumer.name][0].error, DigestMismatchError), seen

    def test_damage_to_one_transfer_leaves_others_alone(self, make: Make) -> None:
        producer = make("p0")
        damage = Damage(producer.block(0, 2)[:16])
        consumer = make("decode", transport=self.make_with(TransportOptions(on_received=damage)))
        introduce(producer, consumer)
        for block_id in (1, 2, 3):
            producer.transport.send_blocks(SESSION, block_id, [block_id], digests=Digests.ALWAYS)
            consumer.transport.recv_blocks(SESSION, block_id, [block_id + 3])
        seen = outcomes_of(producer, consumer, count=3)
        errors = [type(outcome.error) for outcome in seen[consumer.name]]
        assert errors == [type(None), DigestMismatchError, type(None)], seen
        assert [o.error is None for o in seen[producer.name]] == [True, False, True], seen
        assert consumer.block(0, 4) == producer.block(0, 1)
        assert consumer.block(0, 6) == producer.block(0, 3)

    def test_peer_can_try_again_after_damage(self, damaged: Pair) -> None:
        producer, consumer = damaged
        errors = []
        for transfer_id in (1, 2):
            producer.transport.send_blocks(SESSION, transfer_id, [7], digests=Digests.ALWAYS)
            consumer.transport.recv_blocks(SESSION, transfer_id, [2])
            seen = outcomes_of(producer, consumer)
            errors.append([outcomes[0].error is None for outcomes in seen.values()])
        assert errors == [[False, False], [True, True]]
        assert consumer.block(0, 2) == producer.block(0, 7)

    def test_damage_to_some_heads_is_found(self, make: Make, damage: Damage) -> None:
        producer = make("p0", with_heads(4))
        transport = self.make_with(TransportOptions(on_received=damage))
        consumer = make("decode", with_heads(2), transport=transport)
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, 1, [5], heads=(2, 2), digests=Digests.ALWAYS)
        consumer.transport.recv_blocks(SESSION, 1, [0])
        assert isinstance(
            outcomes_of(consumer, producer)[consumer.name][0].error, DigestMismatchError
        )

    def test_damage_to_one_of_many_chunks_is_found(self, make: Make, damage: Damage) -> None:
        producer = make("p0", of_many_chunks(), num_blocks=2)
        transport = self.make_with(TransportOptions(on_received=damage))
        consumer = make("decode", of_many_chunks(), num_blocks=2, transport=transport)
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, 1, [0, 1], digests=Digests.ALWAYS)
        consumer.transport.recv_blocks(SESSION, 1, [1, 0])
        seen = outcomes_of(consumer, producer)
        assert isinstance(seen[consumer.name][0].error, DigestMismatchError)
        assert seen[producer.name][0].error is not None

    def test_without_digests_damage_goes_unnoticed(self, damaged: Pair, damage: Damage) -> None:
        producer, consumer = damaged
        producer.transport.send_blocks(SESSION, 1, [0], digests=Digests.OFF)
        consumer.transport.recv_blocks(SESSION, 1, [3])
        seen = outcomes_of(producer, consumer)
        assert [outcomes[0].error for outcomes in seen.values()] == [None, None]
        assert damage.num_damaged == 1
        assert [consumer.block(region, 3) == producer.block(region, 0) for region in (0, 1)] == [
            False,
            True,
        ]

    def test_time_of_verifying_is_reported(self, pair: Pair) -> None:
        producer, consumer = pair
        producer.transport.send_blocks(SESSION, 1, [0, 1, 2], digests=Digests.ALWAYS)
        consumer.transport.recv_blocks(SESSION, 1, [0, 1, 2])
        assert outcomes_of(consumer, producer)[consumer.name][0].verify_s > 0
