"""One producer engine and some consumer engines of real sessions, on faked I/O.

It keeps the books: what was granted and freed, what was asked for and reported, and
what every block holds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from tests.unit.protocol.test_messages import FINGERPRINT
from tests.unit.session.fakes import HOST, Channel, Fabric, FakeServer, MemoryTransport, Network
from vllm_pd.config import ConnectorConfig
from vllm_pd.protocol.heads import heads_of_rank
from vllm_pd.protocol.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Describe,
    Hello,
    InstanceInfo,
    KVLayout,
    Release,
    WorkerAddress,
    decode,
    encode,
)
from vllm_pd.session.consumer import Consumer
from vllm_pd.session.fetches import FetchRequest, FetchResult
from vllm_pd.session.producer import Grant, Producer

INSTANCE_PORT = 1
NUM_BLOCKS = 1 << 20
PREFILL_BLOCKS = 3  # blocks of every prefill
CONFIG = ConnectorConfig(
    lease_s=10.0, max_lease_s=25.0, handshake_timeout_s=4.0, transfer_timeout_s=6.0
)


@dataclass(eq=False)
class ProducerRank:
    """One worker of the producer engine."""

    rank: int
    producer: Producer
    transport: MemoryTransport
    server: FakeServer
    heads: range
    granted: dict[str, tuple[int, ...]] = field(default_factory=dict)  # request id -> blocks
    freed: Counter[str] = field(default_factory=Counter)

    def collect(self) -> None:
        """Take outcomes, and what follows from them."""
        for outcome in self.transport.poll():
            assert self.producer.end_transfer(outcome)
        self.check()

    def check(self) -> None:
        """Take freed requests; nobody may read those any more."""
        for request_id in self.producer.take_freed():
            self.freed[request_id] += 1
            assert self.freed[request_id] == 1
            blocks = set(self.granted[request_id])
            assert not any(blocks & set(half.block_ids) for half in self.transport.halves)
            for block_id, head in itertools.product(blocks, range(len(self.heads))):
                self.transport.cache[block_id, head] = "another request"


@dataclass(eq=False)
class ConsumerRank:
    """One worker of a consumer engine."""

    engine_id: str
    rank: int
    consumer: Consumer
    transport: MemoryTransport
    heads: range
    asked: dict[str, FetchRequest] = field(default_factory=dict)
    reported: dict[str, FetchResult] = field(default_factory=dict)

    def collect(self, now: float) -> None:
        """Take outcomes, and what follows from them."""
        while outcomes := self.transport.poll():
            for outcome in outcomes:
                assert self.consumer.end_transfer(outcome, now)
        self.check()

    def check(self) -> None:
        """Take results; their blocks are not written any more, and right after a success."""
        for result in self.consumer.take_results():
            assert result.request_id not in self.reported
            self.reported[result.request_id] = result
            blocks = set(result.block_ids)
            assert not any(blocks & set(half.block_ids) for half in self.transport.halves)
            if result.error is None:
                assert self.content(result.block_ids) == self.expected(result.request_id)

    def content(self, block_ids: tuple[int, ...]) -> list[object]:
        places = itertools.product(block_ids, range(len(self.heads)))
        return [self.transport.cache.get(place) for place in places]

    def expected(self, request_id: str) -> list[object]:
        request = self.asked[request_id]
        positions = range(request.block_offset, request.block_offset + len(request.block_ids))
        return [(request.transfer_id, p, head) for p in positions for head in self.heads]

    @property
    def unreported(self) -> set[str]:
        return self.asked.keys() - self.reported.keys()


class World:
    """See the module.

    Args:
        tp_size: of the producer engine ``p``.
        consumers: tensor-parallel sizes by engine id.
        num_kv_heads: of the model.
    """

    def __init__(self, tp_size: int, consumers: Mapping[str, int], num_kv_heads: int) -> None:
        self.now = 100.0
        self.network = Network()
        self.fabric = Fabric()
        self.fingerprint = msgspec.structs.replace(FINGERPRINT, num_kv_heads=num_kv_heads)
        self.releases: list[tuple[int, str]] = []  # (rank, transfer id), on their way to workers
        self._numbers = itertools.count(1)
        self.producers = [self._make_producer(rank, tp_size) for rank in range(tp_size)]
        self.consumers = [
            self._make_consumer(engine_id, rank, size)
            for engine_id, size in consumers.items()
            for rank in range(size)
        ]
        self.info = InstanceInfo(
            protocol_version=PROTOCOL_VERSION,
            engine_id="p",
            tp_size=tp_size,
            workers=tuple(
                WorkerAddress(tp_rank=rank, host=HOST, port=self.port_of(rank))
                for rank in range(tp_size)
            ),
            fingerprint=self.fingerprint,
            num_leases=0,
            lease_s=CONFIG.lease_s,
        )

    @staticmethod
    def port_of(rank: int) -> int:
        return INSTANCE_PORT + 1 + rank

    # What engines order

    def grant(self, rank: int, transfer_id: str) -> None:
        """A prefill is over on one rank."""
        worker = self.producers[rank]
        request_id = f"prefill-{next(self._numbers)}"
        blocks = tuple(next(self._numbers) for _ in range(PREFILL_BLOCKS))
        for position, block_id in enumerate(blocks):
            for i, head in enumerate(worker.heads):
                worker.transport.cache[block_id, i] = (transfer_id, position, head)
        worker.granted[request_id] = blocks
        worker.producer.grant(Grant(transfer_id, request_id, blocks), self.now)

    def fetch(
        self,
        worker: ConsumerRank,
        transfer_id: str,
        *,
        offset: int = 0,
        num_blocks: int = PREFILL_BLOCKS,
        engine_id: str = "p",
        host: str = HOST,
    ) -> str:
        """A request needs blocks on one rank; return its id."""
        request_id = f"decode-{next(self._numbers)}"
        request = FetchRequest(
            request_id=request_id,
            transfer_id=transfer_id,
            remote_engine_id=engine_id,
            remote_host=host,
            remote_port=INSTANCE_PORT,
            block_offset=offset,
            block_ids=tuple(next(self._numbers) for _ in range(num_blocks)),
        )
        worker.asked[request_id] = request
        worker.consumer.start(request, self.now)
        return request_id

    def abort(self, worker: ConsumerRank, request_id: str) -> None:
        """Nobody wants a request's blocks any more."""
        worker.consumer.give_up(request_id, self.now)

    # What the network does

    def deliver_to_server(self, channel: Channel) -> None:
        self.serve(channel, decode(channel.to_server.popleft()))

    def serve(self, channel: Channel, message: AnyMessage) -> None:
        """Let the server of a channel handle a message."""
        if channel.port != INSTANCE_PORT:
            rank = channel.port - INSTANCE_PORT - 1
            self.producers[rank].producer.handle(channel.identity, message, self.now)
        elif isinstance(message, Release):
            self.releases += [(worker.rank, message.transfer_id) for worker in self.producers]
        elif isinstance(message, Describe) and not (channel.is_closed or channel.is_lost):
            channel.to_client.append(encode(self.info))

    def deliver_to_client(self, channel: Channel) -> None:
        channel.inbox.append(channel.to_client.popleft())
        self.poll_consumers()

    def poll_consumers(self) -> None:
        for worker in self.consumers:
            worker.consumer.poll(self.now)

    # What time and threads do

    def tick(self, elapsed: float) -> None:
        self.now += elapsed
        for producer in self.producers:
            producer.producer.expire(self.now)
        for consumer in self.consumers:
            consumer.consumer.expire(self.now)
        self.collect()

    def collect(self) -> None:
        for producer in self.producers:
            producer.collect()
        for consumer in self.consumers:
            consumer.collect(self.now)

    def run(self) -> None:
        """Let messages and transfers go on until nothing moves."""
        while self._deliver() or self._transfer():
            self.collect()

    def run_control(self) -> None:
        """Let messages go on until nothing moves; transfers stay as they are."""
        while self._deliver():
            pass

    def _deliver(self) -> bool:
        """Let all messages that are under way arrive; return whether there were any."""
        moved = bool(self.releases)
        for channel in self.network.channels:
            while channel.to_server:
                self.deliver_to_server(channel)
                moved = True
            while channel.to_client:
                channel.inbox.append(channel.to_client.popleft())
                moved = True
        while self.releases:
            rank, transfer_id = self.releases.pop(0)
            self.producers[rank].producer.release(transfer_id)
        self.poll_consumers()
        return moved

    def _transfer(self) -> bool:
        """Let all transfers end well that can; return whether there were any."""
        moved = False
        for _, receiver in self.fabric.startable():
            receiver.is_busy = moved = True
        for receiver in self.fabric.receivers():
            self.fabric.end_copy(receiver, None)
            moved = True
        for receiver in self.fabric.confirmable():
            receiver.finish()
            moved = True
        return moved

    @contextmanager
    def closed_at_the_end(self) -> Iterator[World]:
        """End everything, and check that nothing is left."""
        yield self
        self.drain()

    def drain(self) -> None:
        """Let time pass and everybody leave; check that nothing is left."""
        self.network.num_refused_clients = 0
        for _ in range(3):
            self.run()
            self.notice_losses()
            self.tick(1e6)
        for worker in self.consumers:
            worker.consumer.close(self.now)
        self.run()
        self.notice_losses()
        self.tick(1e6)
        for producer in self.producers:
            assert producer.freed == Counter(producer.granted.keys())
            assert len(producer.producer.leases) == 0
            assert producer.producer.next_deadline() is None
            assert producer.transport.halves == []
        for consumer in self.consumers:
            assert consumer.unreported == set()
            assert consumer.consumer.next_deadline() is None
            assert consumer.consumer.clients() == []
            assert consumer.transport.halves == []
            assert consumer.transport.peers == set()
        assert all(channel.is_closed for channel in self.network.channels)

    def cut(self, peer_id: str, is_seen_by: tuple[str, ...]) -> None:
        """Cut a data link; the engines of these names see it at once, others later."""
        self.fabric.broken.add(peer_id)
        for address, end in self.fabric.ends.items():
            if address.decode().startswith(is_seen_by):
                end.notice_loss(peer_id)

    def notice_losses(self) -> None:
        """Let both ends of every cut link see it."""
        for transport in self.fabric.ends.values():
            for peer_id in sorted(transport.peers & self.fabric.broken):
                transport.notice_loss(peer_id)
        self.collect()

    # Making it

    def _make_producer(self, rank: int, tp_size: int) -> ProducerRank:
        hello, transport, heads = self._make_worker("p", rank, tp_size)
        server = FakeServer(self.network, self.port_of(rank))
        producer = Producer(server.as_server(), hello, {transport.name: transport}, CONFIG)
        return ProducerRank(rank, producer, transport, server, heads)

    def _make_consumer(self, engine_id: str, rank: int, tp_size: int) -> ConsumerRank:
        hello, transport, heads = self._make_worker(engine_id, rank, tp_size)
        context = self.network.as_context()
        consumer = Consumer(context, hello, {transport.name: transport}, CONFIG)
        return ConsumerRank(engine_id, rank, consumer, transport, heads)

    def _make_worker(
        self, engine_id: str, rank: int, tp_size: int
    ) -> tuple[Hello, MemoryTransport, range]:
        heads = heads_of_rank(rank, tp_size, self.fingerprint.num_kv_heads)
        address = f"{engine_id}-{rank}".encode()
        transport = MemoryTransport(
            self.fabric, address, num_heads=len(heads), num_blocks=NUM_BLOCKS
        )
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            engine_id=engine_id,
            tp_rank=rank,
            tp_size=tp_size,
            fingerprint=self.fingerprint,
            layout=KVLayout(
                region_names=("layer",),
                num_rows=(1,),
                head_lens=(8,),
                num_heads=len(heads),
                num_blocks=NUM_BLOCKS,
            ),
            endpoints={transport.name: address},
        )
        return hello, transport, heads
