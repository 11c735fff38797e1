"""How a transfer is cut, and where its bytes are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.transport.base import Heads, KVRegion, merge_runs
from vllm_pd.transport.chunks import (
    Chunk,
    Piece,
    moves_between,
    plan_chunks,
    scatter_of_chunk,
    slice_len,
    spans_of_chunk,
    spans_of_piece,
)


def region(
    *,
    addr: int = 1000,
    num_blocks: int = 10,
    num_rows: int = 1,
    num_heads: int = 1,
    head_len: int = 8,
) -> KVRegion:
    return KVRegion(
        "layer",
        addr,
        num_blocks,
        num_rows * num_heads * head_len,
        num_rows=num_rows,
        num_heads=num_heads,
    )


CPU = region(num_heads=4)  # blocks of 32 bytes
NPU = region(addr=5000, num_rows=3, num_heads=4)  # blocks of 96 bytes


def pieces_of(chunks: list[Chunk]) -> list[list[tuple[int, int, int]]]:
    return [[(p.region, p.first, p.num_blocks) for p in chunk.pieces] for chunk in chunks]


def test_slice_is_the_block_or_the_wanted_heads_of_all_rows() -> None:
    assert slice_len(NPU, None) == 96
    assert slice_len(NPU, (1, 2)) == 48


def test_small_transfer_is_one_chunk() -> None:
    (chunk,) = plan_chunks([CPU, NPU], None, 3, max_len=1000)
    assert chunk == Chunk((Piece(0, 0, 3), Piece(1, 0, 3)), 3 * 32 + 3 * 96)


def test_chunks_are_filled_up_over_the_ends_of_regions() -> None:
    chunks = plan_chunks([CPU, NPU], None, 4, max_len=200)
    assert pieces_of(chunks) == [[(0, 0, 4)], [(1, 0, 2)], [(1, 2, 2)]]
    assert [chunk.num_bytes for chunk in chunks] == [128, 192, 192]


def test_block_longer_than_a_chunk_is_a_chunk_by_itself() -> None:
    """All in one chunk would be one digest, and more than a staging buffer holds."""
    chunks = plan_chunks([NPU, CPU], None, 3, max_len=40)
    assert pieces_of(chunks) == [[(0, i, 1)] for i in range(3)] + [[(1, i, 1)] for i in range(3)]


GEOMETRIES = st.builds(
    region,
    num_rows=st.integers(1, 4),
    num_heads=st.just(4),
    head_len=st.integers(1, 9),
)


@given(
    regions=st.lists(GEOMETRIES, min_size=1, max_size=4),
    heads=st.sampled_from([None, (0, 4), (1, 2), (3, 1)]),
    num_blocks=st.integers(1, 20),
    max_len=st.integers(1, 300),
)
def test_chunks_are_the_whole_transfer_in_order_and_bounded(
    regions: list[KVRegion], heads: Heads | None, num_blocks: int, max_len: int
) -> None:
    chunks = plan_chunks(regions, heads, num_blocks, max_len=max_len)
    covered = [
        (piece.region, piece.first + i)
        for chunk in chunks
        for piece in chunk.pieces
        for i in range(piece.num_blocks)
    ]
    assert covered == list(itertools.product(range(len(regions)), range(num_blocks)))
    for chunk in chunks:
        lens = [p.num_blocks * slice_len(regions[p.region], heads) for p in chunk.pieces]
        assert chunk.num_bytes == sum(lens)
        is_one_block = len(chunk.pieces) == chunk.pieces[0].num_blocks == 1
        assert chunk.num_bytes <= max_len or is_one_block


def test_adjacent_blocks_are_one_span() -> None:
    assert spans_of_piece(CPU, Piece(0, 1, 4), [9, 2, 3, 4, 7], None) == [
        (2 * 32, 3 * 32),
        (7 * 32, 32),
    ]


def test_blocks_in_descending_order_stay_apart() -> None:
    assert spans_of_piece(CPU, Piece(0, 0, 2), [3, 2], None) == [(3 * 32, 32), (2 * 32, 32)]


@pytest.mark.parametrize(
    ("where", "heads", "spans"),
    [
        (CPU, (1, 2), [(2 * 32 + 8, 16), (3 * 32 + 8, 16)]),
        (CPU, (0, 4), [(2 * 32, 64)]),
        (NPU, (3, 1), [(b * 96 + row * 32 + 24, 8) for b in (2, 3) for row in range(3)]),
        (NPU, (0, 4), [(2 * 96, 192)]),
    ],
)
def test_heads_are_a_span_per_row_unless_they_touch(
    where: KVRegion, heads: Heads, spans: list[tuple[int, int]]
) -> None:
    assert spans_of_piece(where, Piece(0, 0, 2), [2, 3], heads) == spans


def test_spans_of_a_chunk_are_those_of_its_pieces_in_this_process() -> None:
    chunk = Chunk((Piece(0, 1, 1), Piece(1, 0, 1)), 128)
    assert spans_of_chunk([CPU, NPU], chunk, [4, 6], None) == [
        (1000 + 6 * 32, 32),
        (5000 + 4 * 96, 96),
    ]


def test_whole_blocks_move_in_runs() -> None:
    there = region(addr=70_000, num_heads=4)
    runs = merge_runs([5, 6, 1], [2, 3, 9])
    assert moves_between(CPU, runs, None, there, None) == [
        (1000 + 2 * 32, 70_000 + 5 * 32, 64),
        (1000 + 9 * 32, 70_000 + 1 * 32, 32),
    ]


@pytest.mark.parametrize(
    ("dst", "dst_heads", "src", "src_heads"),
    [
        (CPU, (2, 2), region(addr=70_000, num_heads=2), None),
        (region(num_heads=2), None, region(addr=70_000, num_heads=4), (1, 2)),
        (NPU, (3, 1), region(addr=70_000, num_rows=3, num_heads=2), (1, 1)),
        (NPU, (0, 4), region(addr=70_000, num_rows=3, num_heads=4), None),
    ],
)
def test_heads_move_to_their_places_row_by_row(
    dst: KVRegion, dst_heads: Heads | None, src: KVRegion, src_heads: Heads | None
) -> None:
    moves = moves_between(dst, merge_runs([4, 5], [7, 1]), dst_heads, src, src_heads)
    moved = {to + i: come + i for to, come, length in moves for i in range(length)}
    expected = {}
    first_to = (dst_heads or (0, 0))[0]
    first_from, count = src_heads or (0, src.num_heads)
    for come, to in ((4, 7), (5, 1)):
        for row, i in itertools.product(range(dst.num_rows), range(count * 8)):
            target = dst.addr + to * dst.block_len + row * dst.row_len + first_to * 8 + i
            expected[target] = (
                src.addr + come * src.block_len + row * src.row_len + first_from * 8 + i
            )
    assert moved == expected


def joined(spans: list[tuple[int, int]]) -> list[list[int]]:
    result: list[list[int]] = []
    for addr, length in spans:
        if result and sum(result[-1]) == addr:
            result[-1][1] += length
        else:
            result.append([addr, length])
    return result


@given(
    regions=st.lists(GEOMETRIES, min_size=1, max_size=4),
    heads=st.sampled_from([None, (0, 4), (1, 2), (3, 1)]),
    block_ids=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    max_len=st.integers(1, 300),
)
def test_scattered_memory_is_that_of_the_spans_with_neighbours_joined(
    regions: list[KVRegion], heads: Heads | None, block_ids: list[int], max_len: int
) -> None:
    for chunk in plan_chunks(regions, heads, len(block_ids), max_len=max_len):
        scatter = scatter_of_chunk(regions, chunk, np.array(block_ids), heads)
        assert scatter.iov.tolist() == joined(spans_of_chunk(regions, chunk, block_ids, heads))
        assert scatter.iov[:, 1].sum() == chunk.num_bytes
