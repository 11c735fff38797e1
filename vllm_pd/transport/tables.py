"""A chunk of KV cache as rows of tables, for devices that move rows by number.

Whatever the heads of a transfer, a region is viewed as a contiguous table of equal
rows, so that each piece of a chunk is one ``index_select`` or ``index_put_`` of
exact bytes. Writing through a strided view instead, torch_npu would make the whole
tensor contiguous and copy it back afterwards, and with it blocks that others write
meanwhile; and its ``index_copy_`` reads every index on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_pd.errors import LocalProtocolError, TransportUnavailableError
from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.chunks import Chunk

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Cut:
    """Some heads of a block as rows of a table.

    Attributes:
        unit_len: bytes of a row of the table.
        rows_per_block: rows of the table in one block.
        wanted: numbers of the wanted rows in block 0, in the order of the payload.
    """

    unit_len: int
    rows_per_block: int
    wanted: torch.Tensor


class Table:
    """The tensor of a region, to be viewed as rows. Any thread may call any method.

    Raises:
        TransportUnavailableError: the tensor is not the region's contiguous blocks.
    """

    def __init__(self, region: KVRegion) -> None:
        import torch

        if region.tensor is None:
            raise TransportUnavailableError(f"{region.name}: no tensor to stage")
        self.region = region
        try:
            self._flat: torch.Tensor = region.tensor.view(torch.uint8).view(-1)
        except RuntimeError as exc:
            raise TransportUnavailableError(f"{region.name}: not contiguous") from exc
        if self._flat.numel() != region.num_blocks * region.block_len:
            raise TransportUnavailableError(
                f"{region.name}: a tensor of {self._flat.numel()} bytes is not "
                f"{region.num_blocks} blocks of {region.block_len}"
            )
        self._cuts: dict[Heads | None, Cut] = {}

    @property
    def shortest_unit(self) -> int:
        """Bytes of the shortest row that a cut can have."""
        return self.region.block_len if self.region.num_heads == 1 else self.region.head_len

    def cut(self, heads: Heads | None) -> Cut:
        """Return the longest rows that some heads can be put together from.

        Raises:
            LocalProtocolError: there are no such heads.
        """
        if heads not in self._cuts:
            self._cuts[heads] = self._make_cut(heads)
        return self._cuts[heads]

    def rows(self, unit_len: int, offset: int) -> torch.Tensor:
        """Return the table, in a dtype that the payload at ``offset`` can be viewed in, too."""
        dtype = _word(unit_len, offset, int(self._flat.storage_offset()))
        return self._flat.view(dtype).view(-1, unit_len // dtype.itemsize)

    def number_rows(self, cut: Cut, block_ids: Sequence[int]) -> torch.Tensor:
        """Return the numbers of the wanted rows of some blocks, in host memory.

        On the host it takes microseconds, while 64-bit arithmetic is slow on an NPU;
        and a wrong block is found here, where it does not cost the device's context.

        Raises:
            LocalProtocolError: a block id is out of range.
        """
        import torch

        numbers = torch.tensor(block_ids, dtype=torch.int64)
        if numbers.min() < 0 or numbers.max() >= self.region.num_blocks:
            raise LocalProtocolError(f"block ids out of range 0 to {self.region.num_blocks - 1}")
        return (numbers.unsqueeze(1) * cut.rows_per_block + cut.wanted).flatten()

    def _make_cut(self, heads: Heads | None) -> Cut:
        import torch

        region = self.region
        first, count = heads or (0, region.num_heads)
        if first < 0 or count < 1 or first + count > region.num_heads:
            raise LocalProtocolError(f"{count} heads from {first}, of {region.num_heads}")
        if count == region.num_heads:
            return Cut(region.block_len, 1, torch.zeros(1, dtype=torch.int64))
        unit = math.gcd(first, count, region.num_heads)
        per_row = region.num_heads // unit
        row = torch.arange(region.num_rows).unsqueeze(1) * per_row
        wanted = row + torch.arange(first // unit, (first + count) // unit)
        return Cut(unit * region.head_len, region.num_rows * per_row, wanted.flatten())


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of a chunk: rows of a table, and their place in the payload.

    Attributes:
        rows: the table.
        first: position of the first row number in the chunk's list of them.
        num_rows: how many rows.
        offset: bytes of payload before them.
        length: bytes of them.
    """

    rows: torch.Tensor
    first: int
    num_rows: int
    offset: int
    length: int


def plan_steps(
    tables: Sequence[Table],
    chunk: Chunk,
    block_ids: Sequence[int],
    heads: Heads | None,
    numbers: torch.Tensor,
) -> tuple[list[Step], int]:
    """Turn a chunk into steps and write the row numbers that they refer to.

    Args:
        tables: one per region.
        chunk: what to move.
        block_ids: blocks of the whole transfer.
        heads: heads of each block; None for all.
        numbers: host memory for the row numbers.

    Returns:
        The steps, and how many row numbers were written.

    Raises:
        LocalProtocolError: the chunk does not fit the transfer or the KV cache.
    """
    written: dict[tuple[int, ...], tuple[int, int]] = {}
    steps: list[Step] = []
    num_numbers = offset = 0
    for piece in chunk.pieces:
        table = tables[piece.region]
        cut = table.cut(heads)
        region = table.region
        same = (
            piece.first,
            piece.num_blocks,
            region.num_rows,
            region.num_heads,
            region.num_blocks,
        )
        length = piece.num_blocks * cut.wanted.numel() * cut.unit_len
        if offset + length > chunk.num_bytes:
            raise LocalProtocolError(f"a chunk of more than {chunk.num_bytes} bytes")
        if same not in written:  # regions mostly have the same
            ids = block_ids[piece.first : piece.first + piece.num_blocks]
            if piece.num_blocks < 1 or len(ids) != piece.num_blocks:
                raise LocalProtocolError(
                    f"{piece.num_blocks} blocks from {piece.first}, of {len(block_ids)}"
                )
            rows = table.number_rows(cut, ids)
            numbers[num_numbers : num_numbers + rows.numel()].copy_(rows)
            written[same] = (num_numbers, rows.numel())
            num_numbers += rows.numel()
        steps.append(Step(table.rows(cut.unit_len, offset), *written[same], offset, length))
        offset += length
    if offset != chunk.num_bytes:
        raise LocalProtocolError(f"a chunk of {offset} bytes, not {chunk.num_bytes}")
    return steps, num_numbers


def _word(*multiples: int) -> torch.dtype:
    """Return the dtype to move bytes in: 32 bits where possible.

    Devices index words faster than bytes, and the 910B has no fast kernel that
    writes unsigned bytes, 16-bit or 64-bit integers by index.
    """
    import torch

    return torch.int8 if math.gcd(*multiples) % 4 else torch.int32
