"""This project's transports and sessions, as an engine's worker drives them.

The only module of the benchmark that knows their interfaces.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.transfer.arena import Arena
from benchmarks.transfer.mover import GO, Mover
from benchmarks.transfer.plan import Plan
from benchmarks.transfer.wire import Wire
from vllm_pd.config import ConnectorConfig, Digests
from vllm_pd.protocol.messages import Fingerprint, KVLayout, WorkerAddress
from vllm_pd.session.fetches import FetchRequest
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.manager import LocalWorker, SessionManager
from vllm_pd.session.producer import Grant
from vllm_pd.transport.base import KVRegion, Transport, TransportOptions
from vllm_pd.transport.registry import create

_PEER = "benchmark"
_ROUND_TIMEOUT_S = 60.0
_BLOCK_SIZE = 128  # tokens per block
_NUM_HEADS = 8  # KV heads; all of them are moved


class _OurMover(Mover):
    """Named after the transport, with or without what is verified: ``shm+always``."""

    def __init__(self, link: Wire, name: str) -> None:
        super().__init__(link, name)
        self._transport_name, _, digests = name.partition("+")
        self._digests = Digests(digests) if digests else ConnectorConfig().digests
        self._transport: Transport | None = None
        self._num_transfers = 0
        self._block_ids: list[int] = []

    @property
    def transport(self) -> Transport:
        """The transport that is prepared."""
        if self._transport is None:
            raise RuntimeError("prepare comes first")
        return self._transport

    def _connect(self, plan: Plan, arena: Arena) -> None:
        self._transport = create(self._transport_name, TransportOptions())
        self._transport.register_regions(make_regions(plan, arena))
        theirs = bytes.fromhex(self._swap(self._transport.local_endpoint().hex()))
        if not self._transport.can_reach(theirs):
            raise RuntimeError(f"the {self.name} transport cannot reach its peer")
        self._transport.add_peer(_PEER, theirs)
        self._swap(GO)  # nobody connects before both know each other

    def _wait(self) -> None:
        """Sleep in select and poll, as the session thread does, until the transfer ends."""
        transport = self.transport
        fds = [transport.fileno()]
        while not (outcomes := transport.poll()):
            if not select.select(fds, [], [], _ROUND_TIMEOUT_S)[0]:
                raise TimeoutError("the transfer does not end")
        if outcomes[0].error is not None:
            raise outcomes[0].error

    def _release(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None
            self._arena = None  # its pages may be a memfd's now


class OurProducer(_OurMover):
    """Posts the producer's half when the consumer says so."""

    def run(self) -> float:  # noqa: D102
        self._link.receive()
        started = time.perf_counter()
        self._num_transfers += 1
        self.transport.send_blocks(
            _PEER, self._num_transfers, self._block_ids, digests=self._digests
        )
        self._wait()
        return time.perf_counter() - started

    def _set_up(self, plan: Plan, arena: Arena) -> None:
        arena.fill()
        self._connect(plan, arena)
        self._block_ids, _ = plan.block_ids()


class OurConsumer(_OurMover):
    """Asks the producer to post its half, posts its own, and waits for the outcome."""

    def run(self) -> float:  # noqa: D102
        started = time.perf_counter()
        self._link.send(GO)
        self._num_transfers += 1
        self.transport.recv_blocks(_PEER, self._num_transfers, self._block_ids)
        self._wait()
        return time.perf_counter() - started

    def _set_up(self, plan: Plan, arena: Arena) -> None:
        self._connect(plan, arena)
        _, self._block_ids = plan.block_ids()


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of one instance that transfers need, without vLLM."""

    engine_id: str
    arena: Arena
    endpoint: InstanceEndpoint
    manager: SessionManager

    @property
    def port(self) -> int:
        """Port of the instance endpoint."""
        return self.endpoint.port

    def grant(self, transfer_ids: Iterable[str], block_ids: Iterable[int]) -> None:
        """Offer the same blocks under several transfer ids."""
        block_ids = tuple(block_ids)
        for transfer_id in transfer_ids:
            self.manager.grant(Grant(transfer_id, f"prefill-{transfer_id}", block_ids))

    def start_fetch(
        self, remote_engine_id: str, port: int, transfer_id: str, block_ids: tuple[int, ...]
    ) -> None:
        """Begin to fetch all blocks of a transfer."""
        self.manager.fetch(
            FetchRequest(
                request_id=f"decode-{transfer_id}",
                transfer_id=transfer_id,
                remote_engine_id=remote_engine_id,
                remote_host="127.0.0.1",
                remote_port=port,
                block_offset=0,
                block_ids=block_ids,
            )
        )

    def take_fetched(self) -> bool:
        """Return whether a fetch has ended since the last call.

        Raises:
            PDError: it failed.
        """
        for result in self.manager.take_results().fetched:
            if result.error is not None:
                raise result.error
            return True
        return False

    def close(self) -> None:
        """Stop the threads and close everything."""
        self.manager.close()
        self.endpoint.close()


def make_engine(engine_id: str, transport: str, plan: Plan, arena: Arena) -> Engine:
    """Start an instance endpoint and one worker's sessions over a KV cache."""
    config = ConnectorConfig(lease_s=600.0)
    regions = make_regions(plan, arena)
    layout = KVLayout(
        region_names=tuple(region.name for region in regions),
        num_rows=tuple(region.num_rows for region in regions),
        head_lens=tuple(region.head_len for region in regions),
        num_heads=_NUM_HEADS,
        num_blocks=plan.num_blocks,
    )
    fingerprint = Fingerprint(
        model="benchmark",
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        quantization="",
        num_layers=plan.num_regions,
        num_kv_heads=_NUM_HEADS,
        head_size=max(1, regions[0].head_len // (_BLOCK_SIZE * 4)),  # K and V, two bytes each
        block_size=_BLOCK_SIZE,
        kv_layout="benchmark",
    )
    mover = create(transport, TransportOptions())
    mover.register_regions(regions)
    endpoint = InstanceEndpoint(config, engine_id=engine_id, tp_size=1)
    manager = SessionManager(
        config, LocalWorker(engine_id, 0, 1, fingerprint, layout), {transport: mover}
    )
    address = WorkerAddress(tp_rank=0, host=manager.host, port=manager.port)
    endpoint.set_workers([address], fingerprint)
    return Engine(engine_id, arena, endpoint, manager)


def make_regions(plan: Plan, arena: Arena) -> list[KVRegion]:
    """Return the plan's regions in an arena."""
    return [
        KVRegion(
            f"layer.{i}",
            arena.addr + i * plan.region_len,
            plan.num_blocks,
            plan.block_len,
            num_heads=_NUM_HEADS,
        )
        for i in range(plan.num_regions)
    ]
