"""One engine's worker half on real memory, without vLLM."""

from __future__ import annotations

import functools
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from tests.transport_conformance import Arena
from vllm_pd.config import ConnectorConfig
from vllm_pd.protocol.messages import Fingerprint, KVLayout, WorkerAddress
from vllm_pd.session.fetches import FetchRequest, FetchResult
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.manager import LocalWorker, Results, SessionManager
from vllm_pd.session.producer import Grant
from vllm_pd.transport.base import KVRegion, TransportOptions
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport

NUM_BLOCKS = 8
NUM_REGIONS = 2
BLOCK_LEN = 1024 * 1024  # so that six blocks make several chunks and many moves
FROM = (5, 1, 4, 2, 7, 0)  # no two adjacent, so that no two are copied at once
TO = (0, 3, 1, 6, 2, 5)
WAIT_S = 20.0
KINDS = ("shm", "readv", "tcp")

FINGERPRINT = Fingerprint(
    model="m",
    dtype="float32",
    kv_cache_dtype="float32",
    quantization="",
    num_layers=NUM_REGIONS,
    num_kv_heads=1,
    head_size=64,
    block_size=16,
    kv_layout="test",
)
LAYOUT = KVLayout(
    region_names=tuple(f"layer.{i}" for i in range(NUM_REGIONS)),
    num_rows=(1,) * NUM_REGIONS,
    head_lens=(BLOCK_LEN,) * NUM_REGIONS,
    num_heads=1,
    num_blocks=NUM_BLOCKS,
)


@functools.cache
def content(owner: str, region: int, block_id: int) -> bytes:
    """Return what a block of a role's KV cache holds at first, in any process."""
    return random.Random(f"{owner}/{region}/{block_id}").randbytes(BLOCK_LEN)


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine is."""

    engine_id: str
    port: int


@dataclass
class Engine:
    """One engine.

    Attributes:
        owner: whose content fills its KV cache.
    """

    owner: str
    engine_id: str
    arena: Arena
    regions: list[KVRegion]
    endpoint: InstanceEndpoint
    manager: SessionManager

    @property
    def address(self) -> Address:
        return Address(engine_id=self.engine_id, port=self.endpoint.port)

    def close(self) -> None:
        self.manager.close()
        self.endpoint.close()

    def grant(self, transfer_id: str) -> None:
        self.manager.grant(Grant(transfer_id, f"prefill-{transfer_id}", FROM))

    def fetch(self, producer: Address, transfer_id: str) -> None:
        request = FetchRequest(
            request_id=f"decode-{transfer_id}",
            transfer_id=transfer_id,
            remote_engine_id=producer.engine_id,
            remote_host="127.0.0.1",
            remote_port=producer.port,
            block_offset=0,
            block_ids=TO,
        )
        self.manager.fetch(request)

    def wait(self, condition: Callable[[Results], bool]) -> Results:
        """Collect results until they satisfy a condition."""
        seen = Results()
        deadline = time.monotonic() + WAIT_S
        while True:
            results = self.manager.take_results()
            seen.freed += results.freed
            seen.fetched += results.fetched
            if condition(seen):
                return seen
            assert time.monotonic() < deadline, seen
            time.sleep(0.002)

    def wait_fetched(self) -> FetchResult:
        (result,) = self.wait(lambda results: bool(results.fetched)).fetched
        return result

    def block(self, region: int, block_id: int) -> bytes:
        return self.arena.read(self.regions[region].addr + block_id * BLOCK_LEN, BLOCK_LEN)

    def overwrite(self, block_ids: tuple[int, ...]) -> None:
        """Do what vLLM does with blocks that it has got back."""
        for region in self.regions:
            for block_id in block_ids:
                self.arena.write(region.addr + block_id * BLOCK_LEN, b"\xee" * BLOCK_LEN)

    def wrong_blocks(self, owner: str | None) -> list[tuple[int, int]]:
        """Return ``(region, block id)`` of blocks that do not hold what they should.

        Args:
            owner: whose blocks have been fetched; None: nobody's, or not for certain.
        """
        fetched = dict(zip(TO, FROM, strict=True))
        wrong = []
        for region in range(NUM_REGIONS):
            for block_id in range(NUM_BLOCKS):
                if block_id not in fetched:
                    wanted = content(self.owner, region, block_id)
                elif owner is not None:
                    wanted = content(owner, region, fetched[block_id])
                else:
                    continue
                if self.block(region, block_id) != wanted:
                    wrong.append((region, block_id))
        return wrong


def make_engine(kind: str, owner: str, config: ConnectorConfig) -> Engine:
    """Start an engine.

    Args:
        kind: one of ``KINDS``.
        owner: whose content fills its KV cache.
        config: durations.
    """
    options = TransportOptions(shares_pages=kind != "readv")
    transport = TcpTransport(options) if kind == "tcp" else ShmTransport(options)
    arena = Arena(NUM_REGIONS * NUM_BLOCKS * BLOCK_LEN)
    regions = []
    for index in range(NUM_REGIONS):
        addr = arena.addr + index * NUM_BLOCKS * BLOCK_LEN
        regions.append(KVRegion(f"layer.{index}", addr, NUM_BLOCKS, BLOCK_LEN))
        for block_id in range(NUM_BLOCKS):
            arena.write(addr + block_id * BLOCK_LEN, content(owner, index, block_id))
    transport.register_regions(regions)
    engine_id = f"{owner}-{secrets.token_hex(4)}"
    endpoint = InstanceEndpoint(config, engine_id=engine_id, tp_size=1)
    local = LocalWorker(engine_id, 0, 1, FINGERPRINT, LAYOUT)
    manager = SessionManager(config, local, {transport.name: transport})
    worker = WorkerAddress(tp_rank=0, host=manager.host, port=manager.port)
    endpoint.set_workers([worker], FINGERPRINT)
    return Engine(owner, engine_id, arena, regions, endpoint, manager)
