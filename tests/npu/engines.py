"""Engines whose workers have KV caches on NPUs of the double, as vllm-ascend makes them.

The ranks of an engine compute in lockstep, as tensor parallelism makes them: none begins
a step before all have ended the last one. Whoever waits for a peer too long stops all.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import torch_npu  # noqa: F401 - makes torch know the NPU

from tests.npu.groups import Group, make_groups
from tests.unit.protocol.test_messages import FINGERPRINT
from vllm_pd.config import ConnectorConfig, Digests
from vllm_pd.connector.worker import PDConnectorWorker
from vllm_pd.protocol.heads import heads_of_rank
from vllm_pd.protocol.messages import WorkerAddress
from vllm_pd.session.fetches import FetchRequest
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.producer import Grant

NPU: Any = torch.get_device_module("npu")
CONFIG = ConnectorConfig(lease_s=60.0, digests=Digests.ALWAYS, transport="hccl")
AUTO = msgspec.structs.replace(CONFIG, transport="auto")
TIMEOUT_S = 60.0
LOCKSTEP_TIMEOUT_S = 30.0
NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE = 2, 7, 128

Reports = queue.SimpleQueue[tuple[set[str], set[str]]]
Cache = dict[str, tuple[torch.Tensor, ...]]


class Model:
    """A KV cache of which every element is another number.

    Args:
        num_kv_heads: of the whole model; 1 for a latent cache.
        sizes: elements of one head for one token, in K and in V.
    """

    def __init__(self, num_kv_heads: int, sizes: tuple[int, int] = (8, 8)) -> None:
        self.num_kv_heads = num_kv_heads
        self.sizes = sizes

    def content(self, first: int) -> list[list[torch.Tensor]]:
        """Return, by layer and for K and V, (blocks, tokens, heads of the model, size)."""
        layers = []
        for _ in range(NUM_LAYERS):
            parts = []
            for size in self.sizes:
                shape = NUM_BLOCKS, BLOCK_SIZE, self.num_kv_heads, size
                last = first + torch.Size(shape).numel()
                parts.append(torch.arange(first, last, dtype=torch.int32).view(shape))
                first = last
            layers.append(parts)
        return layers

    def cache_of(
        self, content: list[list[torch.Tensor]], rank: int, tp_size: int, device: str
    ) -> Cache:
        """Return what a rank registers."""
        held = heads_of_rank(rank, tp_size, self.num_kv_heads)
        return {
            f"model.layers.{i}.self_attn.attn": tuple(
                part[:, :, held.start : held.stop].contiguous().to(device) for part in layer
            )
            for i, layer in enumerate(content)
        }


GQA = Model(8)


class NpuEngine:
    """All workers of one engine, each on its own NPU."""

    def __init__(
        self,
        engine_id: str,
        devices: Sequence[int],
        model: Model,
        *,
        first: int = 0,
        config: ConnectorConfig = CONFIG,
        with_group: bool = False,
    ) -> None:
        self.engine_id = engine_id
        self.model = model
        self.content = model.content(first)
        self.endpoint = InstanceEndpoint(config, engine_id=engine_id, tp_size=len(devices))
        self.workers: list[PDConnectorWorker] = []
        self.caches: list[Cache] = []
        fingerprint = msgspec.structs.replace(
            FINGERPRINT, num_kv_heads=model.num_kv_heads, block_size=BLOCK_SIZE, kv_layout="npu"
        )
        addresses = []
        for rank, device in enumerate(devices):
            NPU.set_device(device)
            worker = PDConnectorWorker(
                config,
                engine_id=engine_id,
                tp_rank=rank,
                tp_size=len(devices),
                fingerprint=fingerprint,
            )
            cache = model.cache_of(self.content, rank, len(devices), f"npu:{device}")
            worker.register_kv_caches(cache)
            assert worker.address is not None
            host, port = worker.address
            addresses.append(WorkerAddress(tp_rank=rank, host=host, port=port))
            self.workers.append(worker)
            self.caches.append(cache)
        self.endpoint.set_workers(addresses, self.workers[0].fingerprint)
        groups = make_groups(devices) if with_group else [None] * len(devices)
        self.num_exchanges = 0
        self._groups = [group for group in groups if group is not None]
        self._reports: list[Reports] = [queue.SimpleQueue() for _ in devices]
        self._is_over = threading.Event()
        self._is_last = False  # step of all ranks
        self._lockstep = threading.Barrier(len(devices), action=self._end_step)
        self.is_held = threading.Event()  # as if a step took very long
        self.errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._compute, args=rank, daemon=True)
            for rank in zip(self.workers, devices, groups, self._reports, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _compute(
        self, worker: PDConnectorWorker, device: int, group: Group | None, reports: Reports
    ) -> None:
        """Step after step; in each one there is an all-reduce."""
        try:
            NPU.set_device(device)
            while not self._is_last:
                if group is not None:  # first, as what an asynchronous scheduler has left
                    group.exchange()
                    self.num_exchanges += 1
                if not self.is_held.is_set():
                    worker.pump()
                if not self.is_held.is_set() and any(report := worker.get_finished()):
                    reports.put(report)
                if group is not None:
                    group.wait()
                self._lockstep.wait(LOCKSTEP_TIMEOUT_S)
                time.sleep(0.0005)
        except threading.BrokenBarrierError as exc:
            if not self._is_over.is_set():
                self.errors.append(exc)
        except BaseException as exc:  # noqa: BLE001 - told to the test
            self.errors.append(exc)
            self._lockstep.abort()

    def _end_step(self) -> None:
        """Decide once for all ranks, so that none waits for one that has stopped."""
        self._is_last = self._is_over.is_set()

    def finished(self, rank: int) -> tuple[set[str], set[str]]:
        """Wait until one worker reports something."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            assert not self.errors, self.errors
            try:
                return self._reports[rank].get(timeout=0.1)
            except queue.Empty:
                continue
        raise AssertionError(f"rank {rank} of {self.engine_id} reports nothing")

    def check_caches(self, content: list[list[torch.Tensor]]) -> None:
        """Compare every element that any rank holds."""
        for rank, cache in enumerate(self.caches):
            expected = self.model.cache_of(content, rank, len(self.workers), "cpu")
            for name, layer in cache.items():
                for found, right in zip(layer, expected[name], strict=True):
                    assert torch.equal(found.cpu(), right), (rank, name)

    def close(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        for group in self._groups:
            group.close()
        for worker in self.workers:
            worker.close()
        self.endpoint.close()
        assert not self.errors, self.errors


Make = Callable[..., NpuEngine]
Set = Callable[[str, str], None]


def load(producer: NpuEngine, *, transfer_id: str = "t", **changes: object) -> FetchRequest:
    fields: dict[str, object] = {
        "request_id": f"decode-{transfer_id}",
        "transfer_id": transfer_id,
        "remote_engine_id": producer.engine_id,
        "remote_host": "127.0.0.1",
        "remote_port": producer.endpoint.port,
        "block_offset": 0,
        "block_ids": (6, 5),
    }
    return FetchRequest(**{**fields, **changes})  # type: ignore[arg-type]


def replace_blocks(
    consumer: NpuEngine, dst: Sequence[int], producer: NpuEngine, src: Sequence[int]
) -> list[list[torch.Tensor]]:
    """Return the consumer's content with blocks of the producer's."""
    expected = [[part.clone() for part in layer] for layer in consumer.content]
    for ours, theirs in zip(expected, producer.content, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            mine[list(dst)] = its[list(src)]
    return expected


def fetch_everywhere(producer: NpuEngine, consumer: NpuEngine, transfer_id: str = "t") -> None:
    """Fetch all but the first block of a prefill on all ranks; check all there is to check."""
    src, dst = (6, 1, 2, 5), (4, 6, 3)
    for worker in producer.workers:
        worker.start([], [Grant(transfer_id, "prefill-1", src)], [])
    request = load(producer, transfer_id=transfer_id, block_offset=1, block_ids=dst)
    for worker in consumer.workers:
        worker.start([request], [], [])
    for rank, worker in enumerate(consumer.workers):
        assert consumer.finished(rank) == (set(), {request.request_id})
        assert worker.take_invalid_block_ids() == set()
    for rank in range(len(producer.workers)):
        assert producer.finished(rank) == ({"prefill-1"}, set())
    consumer.check_caches(replace_blocks(consumer, dst, producer, src[1:]))
    producer.check_caches(producer.content)


def transports_used(engine: NpuEngine) -> set[str]:
    """Return the names of the transports by which fetches came."""
    used = set()
    for worker in engine.workers:
        stats = worker.take_stats()
        used |= {record.transport for record in stats.fetches} if stats else set()
    return used
