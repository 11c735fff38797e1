"""How a consumer reads the memory of a producer on the same host.

Best is a mapping of the producer's pages. Where the kernel refuses that, it may
still copy from one process to another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport import memory
from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.chunks import Move, Stack, distance_of, moves_between

Run: TypeAlias = tuple[int, int, int]
"""``(src_block_id, dst_block_id, num_blocks)``."""

Inline = Mapping[int, bytes]
"""Bytes that travelled with a message, by their address in the producer."""


class Source(ABC):
    """A producer's KV cache.

    Attributes:
        regions: the producer's, with its addresses.
    """

    def __init__(self, regions: Sequence[KVRegion]) -> None:
        self.regions = tuple(regions)

    @abstractmethod
    def plan(
        self,
        index: int,
        dst: KVRegion,
        runs: Sequence[Run],
        heads: tuple[Heads | None, Heads | None],
        inline: Inline,
    ) -> tuple[list[Move], list[bytearray]]:
        """Return what ``read`` must copy to fill blocks of one region.

        Args:
            index: of the region.
            dst: our region.
            runs: ``(src_block_id, dst_block_id, num_blocks)``.
            heads: ours and the producer's; None for all.
            inline: bytes that cannot be read otherwise.

        Returns:
            The moves, and memory that must live until they are done.

        Raises:
            RemoteProtocolError: bytes of a block are neither readable nor inline.
        """

    def plan_stack(
        self,
        dst: Sequence[KVRegion],  # noqa: ARG002
        runs: Sequence[Run],  # noqa: ARG002
    ) -> tuple[list[Move], Stack, list[Run]] | None:
        """Plan to copy whole blocks of all regions at once, if that can be.

        Args:
            dst: our regions.
            runs: ``(src_block_id, dst_block_id, num_blocks)``.

        Returns:
            Moves of the first region, how they apply to the others, and the runs
            that must be planned region by region.
        """
        return None

    @abstractmethod
    def read(self, moves: Sequence[Move], stack: Stack | None = None) -> None:
        """Copy; may run on any thread, and several times at once.

        Args:
            moves: what to copy.
            stack: if each move stands for several regions, which ``plan_stack`` said.

        Raises:
            OSError: the kernel refused.
        """

    def close(self) -> None:  # noqa: B027 - nothing to do by default
        """Give up what is held of the producer; nobody reads any more."""


class MappedSource(Source):
    """Pages of the producer, mapped here."""

    def __init__(self, regions: Sequence[KVRegion], spans: Sequence[memory.MappedSpan]) -> None:
        super().__init__(regions)
        self._spans = list(spans)
        self._views = [self._view(region) for region in self.regions]
        self._distance = distance_of([region for region, _, _ in self._views])
        # Blocks that are mapped in all regions; a region of none leaves none.
        self._inside = max(v[1] for v in self._views), min(v[2] for v in self._views)

    def plan(  # noqa: D102
        self,
        index: int,
        dst: KVRegion,
        runs: Sequence[Run],
        heads: tuple[Heads | None, Heads | None],
        inline: Inline,
    ) -> tuple[list[Move], list[bytearray]]:
        ours, theirs = heads
        mapped, first, last = self._views[index]
        if all(first <= run[0] and run[0] + run[2] <= last for run in runs):
            return moves_between(dst, runs, ours, mapped, theirs), []
        moves: list[Move] = []
        patches: list[bytearray] = []
        for src_block, dst_block, count in runs:
            for i in range(count):
                run = [(src_block + i, dst_block + i, 1)]
                source = mapped
                if not first <= src_block + i < last:
                    patch = self._patch(self.regions[index], src_block + i, inline)
                    patches.append(patch)
                    source = _at_block(mapped, src_block + i, memory.address_of(patch))
                moves += moves_between(dst, run, ours, source, theirs)
        return moves, patches

    def plan_stack(  # noqa: D102
        self, dst: Sequence[KVRegion], runs: Sequence[tuple[int, int, int]]
    ) -> tuple[list[Move], Stack, list[Run]] | None:
        here = distance_of(dst)
        if self._distance is None or here is None:
            return None
        inside, rest = _split(runs, *self._inside)
        moves = moves_between(dst[0], inside, None, self._views[0][0], None)
        return moves, Stack(len(dst), here, self._distance), rest

    def read(self, moves: Sequence[Move], stack: Stack | None = None) -> None:  # noqa: D102
        if stack is None:
            memory.copy_all(moves)
            return
        strides = stack.dst_distance, stack.src_distance
        for dst, src, num_bytes in moves:
            memory.copy_rows(dst, src, num_bytes, stack.num_regions, strides)

    def close(self) -> None:  # noqa: D102
        for span in self._spans:
            memory.unmap_span(span)
        self._spans.clear()

    def _view(self, region: KVRegion) -> tuple[KVRegion, int, int]:
        """Return a region with our addresses, and which blocks of it are wholly mapped."""
        end = region.addr + region.num_blocks * region.block_len
        for span in self._spans:
            span_end = span.remote_addr + span.num_bytes
            if span.remote_addr < end and region.addr < span_end:
                first = -(-max(span.remote_addr - region.addr, 0) // region.block_len)
                last = (min(span_end, end) - region.addr) // region.block_len
                addr = span.addr + region.addr - span.remote_addr
                return _moved(region, addr), first, max(last, first)
        return region, 0, 0

    def _patch(self, region: KVRegion, block_id: int, inline: Inline) -> bytearray:
        """Put a block together from what is mapped and what came with the message."""
        addr, length = region.addr + block_id * region.block_len, region.block_len
        parts: list[tuple[int, memoryview]] = []
        for span in self._spans:
            first = max(addr, span.remote_addr)
            last = min(addr + length, span.remote_addr + span.num_bytes)
            if first < last:
                part = memory.view(span.addr + first - span.remote_addr, last - first)
                parts.append((first - addr, part))
        for start, data in inline.items():
            if addr <= start and start + len(data) <= addr + length:
                parts.append((start - addr, memoryview(data)))
        # Before memory is taken: the length is what the peer says.
        if (filled := sum(part.nbytes for _, part in parts)) != length:
            raise RemoteProtocolError(f"{filled} bytes of a block are readable, not {length}")
        block = bytearray(length)
        for offset, part in parts:
            block[offset : offset + part.nbytes] = part
        return block


class ProcessSource(Source):
    """Memory of the producer's process, read by the kernel."""

    def __init__(self, regions: Sequence[KVRegion], pid: int) -> None:
        super().__init__(regions)
        self._pid = pid

    def plan(  # noqa: D102
        self,
        index: int,
        dst: KVRegion,
        runs: Sequence[Run],
        heads: tuple[Heads | None, Heads | None],
        inline: Inline,  # noqa: ARG002 - everything is readable
    ) -> tuple[list[Move], list[bytearray]]:
        return moves_between(dst, runs, heads[0], self.regions[index], heads[1]), []

    def read(self, moves: Sequence[Move], stack: Stack | None = None) -> None:  # noqa: ARG002, D102
        memory.read_process(self._pid, moves)


def _split(runs: Sequence[Run], first: int, last: int) -> tuple[list[Run], list[Run]]:
    """Separate the source blocks from ``first`` to before ``last`` from the others."""
    inside: list[Run] = []
    rest: list[Run] = []
    for src, dst, count in runs:
        low = min(max(first - src, 0), count)
        high = max(min(last - src, count), low)
        pieces = ((rest, 0, low), (inside, low, high), (rest, high, count))
        for where, start, end in pieces:
            if start < end:
                where.append((src + start, dst + start, end - start))
    return inside, rest


def _moved(region: KVRegion, addr: int) -> KVRegion:
    return KVRegion(
        region.name,
        addr,
        region.num_blocks,
        region.block_len,
        num_rows=region.num_rows,
        num_heads=region.num_heads,
    )


def _at_block(region: KVRegion, block_id: int, addr: int) -> KVRegion:
    """Return a region of which one block is at ``addr``."""
    return _moved(region, addr - block_id * region.block_len)
