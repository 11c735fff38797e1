"""How the bytes of a transfer are ordered and cut; both sides compute the same. Pure.

A transfer moves some heads of a list of blocks, in all regions: region after
region, in each block after block, in each row after row. A chunk is a stretch of
that order: the unit of sending, of staging and of digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.scatter import Scatter

Move: TypeAlias = tuple[int, int, int]
"""``(dst, src, num_bytes)``, addresses of one process each."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive blocks of one region.

    Attributes:
        region: index of the region.
        first: position of the first block in the transfer's list of block ids.
        num_blocks: number of blocks.
    """

    region: int
    first: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a transfer; ``num_bytes`` is the length of all of its pieces."""

    pieces: tuple[Piece, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Stack:
    """Regions that lie at equal distances, here and at the peer, as vLLM allocates layers.

    A move of one region then stands for all of them.

    Attributes:
        num_regions: number of regions.
        dst_distance: bytes from one region here to the next.
        src_distance: the same at the peer.
    """

    num_regions: int
    dst_distance: int
    src_distance: int


def distance_of(regions: Sequence[KVRegion]) -> int | None:
    """Return the bytes from each region to the next, if all are alike and equally spaced."""
    first = regions[0]
    distance = regions[1].addr - first.addr if len(regions) > 1 else first.block_len
    is_even = distance >= first.num_blocks * first.block_len or len(regions) == 1
    for index, region in enumerate(regions):
        is_even &= region.addr == first.addr + index * distance
        is_even &= (region.block_len, region.num_blocks) == (first.block_len, first.num_blocks)
    return distance if is_even else None


def slice_len(region: KVRegion, heads: Heads | None) -> int:
    """Return the bytes of one block of a region that a transfer of ``heads`` moves."""
    return region.block_len if heads is None else region.num_rows * heads[1] * region.head_len


def plan_chunks(
    regions: Sequence[KVRegion], heads: Heads | None, num_blocks: int, *, max_len: int
) -> list[Chunk]:
    """Cut a transfer into chunks of at most ``max_len`` bytes, and of at least one block."""
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    filled = 0
    for index, region in enumerate(regions):
        length = slice_len(region, heads)
        first = 0
        while first < num_blocks:
            count = min(max(max_len - filled, 0) // length, num_blocks - first)
            if count == 0 and pieces:
                chunks.append(Chunk(tuple(pieces), filled))
                pieces, filled = [], 0
                continue
            count = max(count, 1)
            pieces.append(Piece(index, first, count))
            filled += count * length
            first += count
    if pieces:
        chunks.append(Chunk(tuple(pieces), filled))
    return chunks


def spans_of_chunk(
    regions: Sequence[KVRegion], chunk: Chunk, block_ids: Sequence[int], heads: Heads | None
) -> list[tuple[int, int]]:
    """Return where a chunk's bytes are, in order, as ``(addr, num_bytes)``."""
    return [
        (regions[piece.region].addr + offset, length)
        for piece in chunk.pieces
        for offset, length in spans_of_piece(regions[piece.region], piece, block_ids, heads)
    ]


def scatter_of_chunk(
    regions: Sequence[KVRegion],
    chunk: Chunk,
    block_ids: npt.NDArray[np.int64],
    heads: Heads | None,
) -> Scatter:
    """Return the same places for many blocks at once; the memory is the regions'."""
    places = [
        _places(regions[p.region], block_ids[p.first : p.first + p.num_blocks], heads)
        for p in chunk.pieces
    ]
    addrs = np.concatenate([piece_addrs for piece_addrs, _ in places])
    lens = np.repeat([length for _, length in places], [len(found) for found, _ in places])
    is_first = np.ones(len(addrs), bool)
    np.not_equal(addrs[1:], addrs[:-1] + lens[:-1], out=is_first[1:])
    (firsts,) = np.nonzero(is_first)
    return Scatter(np.stack([addrs[firsts], np.add.reduceat(lens, firsts)], axis=1))


def _places(
    region: KVRegion, block_ids: npt.NDArray[np.int64], heads: Heads | None
) -> tuple[npt.NDArray[np.int64], int]:
    """Return the addresses of some heads of blocks, row by row, and how long each is."""
    addrs = block_ids * region.block_len + region.addr
    if heads is None:
        return addrs, region.block_len
    first, count = heads
    rows = np.arange(region.num_rows) * region.row_len + first * region.head_len
    return (addrs[:, np.newaxis] + rows).ravel(), count * region.head_len


def spans_of_piece(
    region: KVRegion, piece: Piece, block_ids: Sequence[int], heads: Heads | None
) -> list[tuple[int, int]]:
    """Return where a piece's bytes are in its region, as ``(offset, num_bytes)``, joined."""
    wanted = block_ids[piece.first : piece.first + piece.num_blocks]
    if heads is None:
        block_len = region.block_len
        first, count = wanted[0], 1
        spans = []
        for block_id in wanted[1:]:
            if block_id == first + count:
                count += 1
                continue
            spans.append((first * block_len, count * block_len))
            first, count = block_id, 1
        spans.append((first * block_len, count * block_len))
        return spans
    spans = []
    for addr, length in _spans(region, wanted, heads):
        offset = addr - region.addr
        if spans and spans[-1][0] + spans[-1][1] == offset:
            spans[-1] = (spans[-1][0], spans[-1][1] + length)
        else:
            spans.append((offset, length))
    return spans


def moves_between(
    dst: KVRegion,
    dst_runs: Sequence[tuple[int, int, int]],
    dst_heads: Heads | None,
    src: KVRegion,
    src_heads: Heads | None,
) -> list[Move]:
    """Return what to copy between two regions whose heads and rows match.

    Args:
        dst: where the bytes go.
        dst_runs: ``(src_block_id, dst_block_id, num_blocks)``, see ``merge_runs``.
        dst_heads: heads to write; None for all.
        src: where they come from.
        src_heads: heads to read, as many as ``dst_heads``; None for all.
    """
    if dst_heads is None and src_heads is None:
        length, to_addr, from_addr = dst.block_len, dst.addr, src.addr
        return [
            (to_addr + to * length, from_addr + come * length, count * length)
            for come, to, count in dst_runs
        ]
    moves: list[Move] = []
    for come, to, count in dst_runs:
        pairs = zip(
            _spans(dst, range(to, to + count), dst_heads),
            _spans(src, range(come, come + count), src_heads),
            strict=True,
        )
        moves += [(to_addr, from_addr, length) for (to_addr, length), (from_addr, _) in pairs]
    return moves


def _spans(
    region: KVRegion, block_ids: Sequence[int], heads: Heads | None
) -> Iterator[tuple[int, int]]:
    """Yield the bytes of some heads of blocks, row by row, not joined."""
    first, count = heads if heads is not None else (0, region.num_heads)
    offset, length = first * region.head_len, count * region.head_len
    row_len = region.row_len
    for block_id in block_ids:
        addr = region.addr + block_id * region.block_len + offset
        for row in range(region.num_rows):
            yield addr + row * row_len, length
