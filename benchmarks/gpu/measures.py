"""What is measured of a device's KV cache. Runs on any device that torch and staging know."""

from __future__ import annotations

import select
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.transfer.pair import BenchError
from vllm_pd.config import Digests
from vllm_pd.errors import PDError
from vllm_pd.transport.base import Heads, KVRegion, Transport, TransportOptions
from vllm_pd.transport.chunks import plan_chunks
from vllm_pd.transport.registry import create
from vllm_pd.transport.staging import Stager
from vllm_pd.transport.tables import Table

if TYPE_CHECKING:
    import torch

    from vllm_pd.transport.device import DeviceInterface

NUM_HEADS = 8
HEAD_LEN = 256
"""Bytes of a head: 128 elements of two bytes."""

CHUNK_LEN = 4 << 20
_PEER = "benchmark"
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Layout:
    """How the KV cache lies in memory: blocks of rows (tokens) of heads, K and V apart.

    Attributes:
        name: for reports.
        block_size: tokens of a block.
    """

    name: str
    block_size: int

    @property
    def block_len(self) -> int:
        """Bytes of a block in one region."""
        return self.block_size * NUM_HEADS * HEAD_LEN


LAYOUTS = (Layout("cuda, blocks of 16 tokens", 16), Layout("npu, blocks of 128 tokens", 128))
"""vLLM's usual block sizes on CUDA and on Ascend; heads are strided inside a token's row."""


def make_regions(
    layout: Layout, num_bytes: int, device: str, *, num_regions: int = 32
) -> list[KVRegion]:
    """Allocate a KV cache of about ``num_bytes`` with random content."""
    import torch

    num_blocks = max(1, num_bytes // num_regions // layout.block_len)
    shape = (num_blocks, layout.block_size, NUM_HEADS, HEAD_LEN // 2)
    regions = []
    for index in range(num_regions):
        tensor = torch.randint(-(2**15), 2**15 - 1, shape, dtype=torch.int16, device=device)
        regions.append(
            KVRegion(
                f"layer.{index}",
                tensor.data_ptr(),
                num_blocks,
                layout.block_len,
                device=tensor.device.type,
                num_rows=layout.block_size,
                num_heads=NUM_HEADS,
                tensor=tensor,
            )
        )
    return regions


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels that staging uses, without copies to the host.

    Args:
        synchronize: waits until the device has done what it was told.
    """

    synchronize: Callable[[], object]

    def copy(self, regions: Sequence[KVRegion], rounds: int) -> float:
        """Copy everything within the device; return GB/s of payload."""
        import torch

        targets = [torch.empty_like(region.tensor) for region in regions]

        def work() -> None:
            for region, target in zip(regions, targets, strict=True):
                target.copy_(region.tensor, non_blocking=True)

        return self._rate(work, _total_len(regions, None), rounds)

    def gather(
        self,
        regions: Sequence[KVRegion],
        block_ids: Sequence[int],
        heads: Heads | None,
        rounds: int,
    ) -> float:
        """Gather blocks into a contiguous buffer; return GB/s of payload."""
        import torch

        moves = [_Move(region, block_ids, heads) for region in regions]

        def work() -> None:
            for move in moves:
                torch.index_select(move.rows, 0, move.index, out=move.payload)

        return self._rate(work, sum(move.num_bytes for move in moves), rounds)

    def scatter(
        self,
        regions: Sequence[KVRegion],
        block_ids: Sequence[int],
        heads: Heads | None,
        rounds: int,
    ) -> float:
        """Scatter a contiguous buffer into blocks; return GB/s of payload."""
        moves = [_Move(region, block_ids, heads) for region in regions]

        def work() -> None:
            for move in moves:
                move.rows.index_put_((move.index,), move.payload)

        return self._rate(work, sum(move.num_bytes for move in moves), rounds)

    def host_copy(
        self, host: torch.Tensor, device: torch.Tensor, rounds: int
    ) -> tuple[float, float]:
        """Copy a pinned buffer; return GB/s to the host and to the device."""
        out = self._rate(lambda: host.copy_(device, non_blocking=True), host.nbytes, rounds)
        back = self._rate(lambda: device.copy_(host, non_blocking=True), host.nbytes, rounds)
        return out, back

    def _rate(self, work: Callable[[], object], num_bytes: int, rounds: int) -> float:
        work()
        self.synchronize()
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return num_bytes / statistics.median(times) / 1e9


class _Move:
    """Some heads of some blocks of a region, and a buffer for them."""

    def __init__(self, region: KVRegion, block_ids: Sequence[int], heads: Heads | None) -> None:
        import torch

        table = Table(region)
        cut = table.cut(heads)
        self.rows = table.rows(cut.unit_len, 0)
        self.index = table.number_rows(cut, block_ids).to(region.tensor.device)
        shape = (len(self.index), self.rows.shape[1])
        self.payload = torch.empty(shape, dtype=self.rows.dtype, device=region.tensor.device)
        self.num_bytes = self.payload.nbytes


def stage_out(
    regions: Sequence[KVRegion],
    device: DeviceInterface,
    block_ids: Sequence[int],
    heads: Heads | None,
    rounds: int,
) -> float:
    """Gather blocks and copy them to pinned host memory, pipelined; return GB/s.

    Raises:
        BenchError: the device failed.
    """
    news = threading.Event()
    stager = Stager(regions, device, buffer_len=CHUNK_LEN, num_buffers=8, wake=news.set)
    try:
        chunks = plan_chunks(regions, heads, len(block_ids), max_len=CHUNK_LEN)
        times = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            for number, chunk in enumerate(chunks):
                stager.gather(number, chunk, block_ids, heads)
            _drain(stager, news, len(chunks))
            times.append(time.perf_counter() - started)
    finally:
        stager.close()
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    return num_bytes / statistics.median(times[1:]) / 1e9


def move_by(
    make: Callable[[], Transport],
    regions: tuple[Sequence[KVRegion], Sequence[KVRegion]],
    block_ids: tuple[Sequence[int], Sequence[int]],
    heads: Heads | None,
    rounds: int,
) -> float:
    """Move blocks from one KV cache to another by a transport; return GB/s.

    Both ends are in this process and take turns on one thread, as two workers on a
    busy host would; digests are off.

    Args:
        make: makes a transport, for each end.
        regions: of producer and consumer.
        block_ids: of producer and consumer.
        heads: heads of each block; None for all.
        rounds: how often, beside once to warm up.

    Raises:
        BenchError: the transport cannot reach this memory, or a transfer failed.
    """
    producer, consumer = make(), make()
    try:
        _introduce(producer, consumer, regions)
        times = []
        for number in range(rounds + 1):
            started = time.perf_counter()
            producer.send_blocks(_PEER, number, block_ids[0], heads=heads, digests=Digests.OFF)
            consumer.recv_blocks(_PEER, number, block_ids[1], heads=heads, digests=Digests.OFF)
            _drive(producer, consumer)
            times.append(time.perf_counter() - started)
    except PDError as exc:
        raise BenchError(str(exc)) from exc
    finally:
        producer.close()
        consumer.close()
    num_bytes = _total_len(regions[0], heads) * len(block_ids[0]) // regions[0][0].num_blocks
    return num_bytes / statistics.median(times[1:]) / 1e9


def transport_of(name: str) -> Transport:
    """Return one of this project's transports, with its usual options."""
    return create(name, TransportOptions())


def _total_len(regions: Sequence[KVRegion], heads: Heads | None) -> int:
    part = (heads or (0, NUM_HEADS))[1]
    return sum(region.num_blocks * region.block_len for region in regions) * part // NUM_HEADS


def _introduce(
    producer: Transport,
    consumer: Transport,
    regions: tuple[Sequence[KVRegion], Sequence[KVRegion]],
) -> None:
    for transport, its_regions in zip((producer, consumer), regions, strict=True):
        transport.register_regions(its_regions)
    producer.add_peer(_PEER, consumer.local_endpoint())
    consumer.add_peer(_PEER, producer.local_endpoint())


def _drive(*transports: Transport) -> None:
    """Poll until each has one outcome."""
    waiting = {transport.fileno(): transport for transport in transports}
    everyone = dict(waiting)
    deadline = time.monotonic() + _TIMEOUT_S
    while waiting:
        if not select.select(list(everyone), [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise BenchError(f"a transfer did not end within {_TIMEOUT_S:g} s")
        for fd, transport in everyone.items():
            for outcome in transport.poll():
                if outcome.error is not None:
                    raise outcome.error
                waiting.pop(fd, None)


def _drain(stager: Stager, news: threading.Event, count: int) -> None:
    """Take so many gathers, and give their buffers back."""
    while count:
        if not news.wait(_TIMEOUT_S):
            raise BenchError(f"the device did not answer within {_TIMEOUT_S:g} s")
        news.clear()
        for staged in stager.take_done():
            if staged.error is not None or staged.buffer is None:
                raise BenchError(f"the device failed: {staged.error}")
            stager.release(staged.buffer)
            count -= 1


def is_moved(
    regions: tuple[Sequence[KVRegion], Sequence[KVRegion]],
    block_ids: tuple[Sequence[int], Sequence[int]],
    heads: Heads | None,
) -> bool:
    """Return whether the consumer's blocks have the producer's content."""
    import torch

    first, count = heads or (0, NUM_HEADS)
    picked: list[Any] = []
    for theirs, ours in zip(*regions, strict=True):
        picked.append(
            torch.equal(
                theirs.tensor[list(block_ids[0]), :, first : first + count],
                ours.tensor[list(block_ids[1]), :, first : first + count],
            )
        )
    return all(picked)
