"""Blocks of the KV cache to and from a contiguous buffer on the device.

Rows are moved by number (``index_select``, ``index_put_``), and as one piece where
they are adjacent. Row numbers of a whole transfer go to the device once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.chunks import Chunk
from vllm_pd.transport.device import DeviceInterface
from vllm_pd.transport.tables import Cut, Table

if TYPE_CHECKING:
    import torch

_INDEX_LEN = 8  # bytes of a row number


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of a chunk.

    Attributes:
        rows: the KV cache as a table of rows.
        first: position of the first row number among those of the transfer.
        num_rows: how many rows.
        offset: bytes of the buffer before them.
        length: bytes of them.
        run: number of the first row if all are adjacent, else None.
    """

    rows: torch.Tensor
    first: int
    num_rows: int
    offset: int
    length: int
    run: int | None


class Plan:
    """How the chunks of one transfer are moved.

    Args:
        chunks: the steps of each.
        numbers: row numbers that the steps refer to, in pinned memory.
        device: where the buffer and the KV cache are.
    """

    def __init__(
        self, chunks: Sequence[Sequence[Step]], numbers: torch.Tensor, device: DeviceInterface
    ) -> None:
        self._chunks = chunks
        self._numbers = numbers
        self._device = device
        self._index: torch.Tensor | None = None

    def load(self) -> None:
        """Bring the row numbers to the device; first on every stream that moves chunks."""
        import torch

        if self._numbers.numel() and self._index is None:
            index = self._device.allocate_device(self._numbers.numel() * _INDEX_LEN)
            self._index = index.view(torch.int64)
            self._index.copy_(self._numbers, non_blocking=True)

    def gather(self, chunk: int, buffer: torch.Tensor) -> None:
        """Copy a chunk to the buffer, on the current stream."""
        import torch

        with torch.inference_mode():
            self.load()
            for step in self._chunks[chunk]:
                payload = _payload(step, buffer)
                if step.run is not None:
                    payload.copy_(step.rows[step.run : step.run + step.num_rows])
                else:
                    torch.index_select(step.rows, 0, self._index_of(step), out=payload)

    def scatter(self, chunk: int, buffer: torch.Tensor) -> None:
        """Copy a chunk from the buffer, on the current stream."""
        import torch

        with torch.inference_mode():
            self.load()
            for step in self._chunks[chunk]:
                payload = _payload(step, buffer)
                if step.run is not None:
                    step.rows[step.run : step.run + step.num_rows].copy_(payload)
                else:
                    step.rows.index_put_((self._index_of(step),), payload)

    def _index_of(self, step: Step) -> torch.Tensor:
        assert self._index is not None
        return self._index[step.first : step.first + step.num_rows]


def _payload(step: Step, buffer: torch.Tensor) -> torch.Tensor:
    part = buffer[step.offset : step.offset + step.length]
    return part.view(step.rows.dtype).view(step.num_rows, -1)


class Planner:
    """Plans transfers of one KV cache.

    Args:
        regions: the KV cache, every region with its tensor.
        device: what holds it.

    Raises:
        TransportUnavailableError: a tensor is not the region's contiguous blocks.
    """

    def __init__(self, regions: Sequence[KVRegion], device: DeviceInterface) -> None:
        self._tables = [Table(region) for region in regions]
        self._device = device

    def plan(self, chunks: Sequence[Chunk], block_ids: Sequence[int], heads: Heads | None) -> Plan:
        """Plan to move chunks of a transfer; any thread may ask.

        Args:
            chunks: what to move.
            block_ids: blocks of the whole transfer.
            heads: heads of each block; None for all.

        Raises:
            LocalProtocolError: a block or a head is out of range.
        """
        import torch

        found: dict[tuple[int, ...], int] = {}  # position of the row numbers, by geometry
        arrays: list[torch.Tensor] = []
        num_numbers = 0
        planned = []
        for chunk in chunks:
            steps = []
            offset = 0
            for piece in chunk.pieces:
                table = self._tables[piece.region]
                cut = table.cut(heads)
                per_block = int(cut.wanted.numel())
                run = _run_of(cut, block_ids[piece.first : piece.first + piece.num_blocks])
                base = 0
                if run is None:
                    key = _geometry(table.region)
                    if key not in found:
                        arrays.append(table.number_rows(cut, block_ids))
                        found[key] = num_numbers
                        num_numbers += arrays[-1].numel()
                    base = found[key]
                length = piece.num_blocks * per_block * cut.unit_len
                steps.append(
                    Step(
                        table.rows(cut.unit_len, offset),
                        base + piece.first * per_block,
                        piece.num_blocks * per_block,
                        offset,
                        length,
                        run,
                    )
                )
                offset += length
            planned.append(steps)
        if not arrays:
            return Plan(planned, torch.empty(0, dtype=torch.int64), self._device)
        numbers = self._device.allocate_host(num_numbers * _INDEX_LEN).view(torch.int64)
        numbers.copy_(torch.cat(arrays))
        return Plan(planned, numbers, self._device)


def _geometry(region: KVRegion) -> tuple[int, ...]:
    return region.num_rows, region.num_heads, region.num_blocks


def _run_of(cut: Cut, block_ids: Sequence[int]) -> int | None:
    """Return the first row of blocks that are whole and adjacent."""
    if cut.rows_per_block != 1:
        return None
    is_run = all(right - left == 1 for left, right in itertools.pairwise(block_ids))
    return block_ids[0] if is_run else None
