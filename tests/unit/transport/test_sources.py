"""How a consumer plans and reads what a producer on the same host holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest

from tests.transport_conformance import Arena, noise
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport import memory
from vllm_pd.transport.base import Heads, KVRegion, merge_runs
from vllm_pd.transport.chunks import distance_of
from vllm_pd.transport.sources import MappedSource, ProcessSource, Source

NUM_BLOCKS = 10
NUM_ROWS, NUM_HEADS, HEAD_LEN = 5, 4, 60
BLOCK_LEN = NUM_ROWS * NUM_HEADS * HEAD_LEN  # 1200: three and a bit per page


def region(addr: int, num_heads: int = NUM_HEADS) -> KVRegion:
    return KVRegion(
        "layer",
        addr,
        NUM_BLOCKS,
        NUM_ROWS * num_heads * HEAD_LEN,
        num_rows=NUM_ROWS,
        num_heads=num_heads,
    )


@pytest.fixture
def theirs() -> Arena:
    """Return the producer's memory; some of its blocks lie on partial pages."""
    arena = Arena(NUM_BLOCKS * BLOCK_LEN)
    arena.write(arena.addr, noise(5, NUM_BLOCKS * BLOCK_LEN))
    return arena


@pytest.fixture
def ours() -> Arena:
    return Arena(NUM_BLOCKS * BLOCK_LEN)


@pytest.fixture
def mapped(theirs: Arena) -> Iterator[MappedSource]:
    """Return the producer's whole pages, mapped at other addresses."""
    span = memory.share_pages(*memory.page_interior(theirs.addr, theirs.num_bytes))
    source = MappedSource(
        [region(theirs.addr)], [memory.map_span(span.addr, span.num_bytes, span.fd)]
    )
    os.close(span.fd)
    yield source
    source.close()


def inline_of(theirs: Arena) -> dict[int, bytes]:
    """Return what the whole pages do not hold, as a producer cuts it: block by block."""
    addr, num_bytes = memory.page_interior(theirs.addr, theirs.num_bytes)
    inline = {}
    for block_id in range(NUM_BLOCKS):
        first = theirs.addr + block_id * BLOCK_LEN
        last = first + BLOCK_LEN
        for lo, hi in ((first, min(last, addr)), (max(first, addr + num_bytes), last)):
            if lo < hi:
                inline[lo] = theirs.read(lo, hi - lo)
    return inline


def fetch(
    source: Source,
    theirs: Arena,
    ours: Arena,
    *,
    heads: tuple[Heads | None, Heads | None] = (None, None),
    num_heads: int = NUM_HEADS,
    inline: Mapping[int, bytes] | None = None,
) -> None:
    """Read all blocks in another order, and compare with what is expected."""
    src, dst = list(range(NUM_BLOCKS)), [3, 4, 5, 0, 9, 8, 7, 6, 1, 2]
    target = region(ours.addr, num_heads)
    if inline is None:
        inline = inline_of(theirs)
    moves, keep = source.plan(0, target, merge_runs(src, dst), heads, inline)
    source.read(moves)
    del keep
    to, come = heads[0] or (0, num_heads), heads[1] or (0, NUM_HEADS)
    for src_id, dst_id in zip(src, dst, strict=True):
        for row in range(NUM_ROWS):
            there = theirs.addr + src_id * BLOCK_LEN + (row * NUM_HEADS + come[0]) * HEAD_LEN
            here = ours.addr + dst_id * target.block_len + (row * num_heads + to[0]) * HEAD_LEN
            length = come[1] * HEAD_LEN
            assert ours.read(here, length) == theirs.read(there, length)


HEADS: list[tuple[int, Heads | None, Heads | None]] = [
    (4, None, None),
    (2, None, (2, 2)),
    (2, (1, 1), (3, 1)),
    (4, (0, 4), None),
]


@pytest.mark.parametrize(("num_heads", "to", "come"), HEADS)
def test_mapped_pages_and_inline_bytes_make_whole_blocks(
    mapped: MappedSource,
    theirs: Arena,
    ours: Arena,
    num_heads: int,
    to: Heads | None,
    come: Heads | None,
) -> None:
    assert inline_of(theirs)  # or this would test nothing
    fetch(mapped, theirs, ours, heads=(to, come), num_heads=num_heads)


@pytest.mark.parametrize(("num_heads", "to", "come"), HEADS)
def test_process_is_read_where_its_blocks_are(
    theirs: Arena, ours: Arena, num_heads: int, to: Heads | None, come: Heads | None
) -> None:
    source = ProcessSource([region(theirs.addr)], os.getpid())
    fetch(source, theirs, ours, heads=(to, come), num_heads=num_heads)


def test_blocks_on_whole_pages_are_copied_in_runs_and_without_patches(
    mapped: MappedSource, ours: Arena
) -> None:
    moves, keep = mapped.plan(0, region(ours.addr), [(4, 1, 2)], (None, None), {})
    assert [(to - ours.addr, length) for to, _, length in moves] == [(BLOCK_LEN, 2 * BLOCK_LEN)]
    assert keep == []


def test_missing_inline_bytes_blame_the_peer(
    mapped: MappedSource, theirs: Arena, ours: Arena
) -> None:
    with pytest.raises(RemoteProtocolError, match="bytes of a block are readable"):
        fetch(mapped, theirs, ours, inline={})


def test_inline_bytes_of_other_places_do_not_help(
    mapped: MappedSource, theirs: Arena, ours: Arena
) -> None:
    moved = {addr + 8: data for addr, data in inline_of(theirs).items()}
    with pytest.raises(RemoteProtocolError, match="bytes of a block are readable"):
        fetch(mapped, theirs, ours, inline=moved)


def test_region_without_a_whole_page_travels_inline(theirs: Arena, ours: Arena) -> None:
    source = MappedSource([region(theirs.addr)], [])
    inline = {
        theirs.addr + b * BLOCK_LEN: theirs.read(theirs.addr + b * BLOCK_LEN, BLOCK_LEN)
        for b in range(NUM_BLOCKS)
    }
    fetch(source, theirs, ours, inline=inline)


def test_claim_of_huge_blocks_takes_no_memory(ours: Arena) -> None:
    huge = KVRegion("layer", 4096, 1, NUM_ROWS << 60, num_rows=NUM_ROWS, num_heads=(1 << 60) // 60)
    with pytest.raises(RemoteProtocolError, match="0 bytes of a block are readable"):
        MappedSource([huge], []).plan(0, region(ours.addr), [(0, 0, 1)], ((0, 1), (0, 1)), {})


def test_closed_source_has_unmapped_its_pages(theirs: Arena) -> None:
    span = memory.share_pages(*memory.page_interior(theirs.addr, theirs.num_bytes))
    mapped = memory.map_span(span.addr, span.num_bytes, span.fd)
    os.close(span.fd)
    source = MappedSource([region(theirs.addr)], [mapped])
    source.close()
    with pytest.raises(OSError, match="Bad address"):
        memory.read_process(os.getpid(), [(theirs.addr, mapped.addr, 1)])
    source.close()


def test_process_that_does_not_let_itself_be_read_is_an_error(ours: Arena) -> None:
    source = ProcessSource([region(8)], os.getpid())
    moves, _ = source.plan(0, region(ours.addr), [(0, 0, 1)], (None, None), {})
    with pytest.raises(OSError, match="Bad address"):
        source.read(moves)


NUM_LAYERS, GAP = 3, 256  # of a stack; vLLM 0.32 allocates the layers one behind the other


def stack_of(addr: int, distance: int) -> list[KVRegion]:
    return [region(addr + layer * distance) for layer in range(NUM_LAYERS)]


def test_blocks_of_equally_spaced_regions_are_copied_all_at_once() -> None:
    """The distances may differ on the two sides; blocks on partial pages are left to others."""
    there, here = NUM_BLOCKS * BLOCK_LEN + GAP, NUM_BLOCKS * BLOCK_LEN
    theirs, ours = Arena(NUM_LAYERS * there), Arena(NUM_LAYERS * here)
    theirs.write(theirs.addr, noise(7, NUM_LAYERS * there))
    span = memory.share_pages(*memory.page_interior(theirs.addr, theirs.num_bytes))
    mapped = memory.map_span(span.addr, span.num_bytes, span.fd)
    source = MappedSource(stack_of(theirs.addr, there), [mapped])
    dst = stack_of(ours.addr, here)
    runs = [(0, 2, 1), (4, 5, 2), (9, 0, 1)]

    planned = source.plan_stack(dst, runs)

    assert planned is not None
    moves, stack, rest = planned
    assert (len(moves), stack.num_regions) == (1, NUM_LAYERS)
    assert rest == [(0, 2, 1), (9, 0, 1)]  # the first and the last page are not shared
    source.read(moves, stack)
    for layer in range(NUM_LAYERS):
        for come, to in ((4, 5), (5, 6)):
            wanted = theirs.read(theirs.addr + layer * there + come * BLOCK_LEN, BLOCK_LEN)
            assert ours.read(dst[layer].addr + to * BLOCK_LEN, BLOCK_LEN) == wanted
        for untouched in (0, 1, 2, 3, 4, 7, 8, 9):
            got = ours.read(dst[layer].addr + untouched * BLOCK_LEN, BLOCK_LEN)
            assert got == bytes(BLOCK_LEN)
    source.close()
    os.close(span.fd)


def test_run_that_crosses_the_edge_of_what_is_mapped_is_split() -> None:
    size = NUM_BLOCKS * BLOCK_LEN
    theirs = Arena(size)
    span = memory.share_pages(*memory.page_interior(theirs.addr, theirs.num_bytes))
    mapped = memory.map_span(span.addr, span.num_bytes, span.fd)
    source = MappedSource([region(theirs.addr)], [mapped])
    planned = source.plan_stack([region(0)], [(0, 0, NUM_BLOCKS)])
    assert planned is not None
    covered = [(come, count) for come, _, count in planned[2]]
    covered += [
        ((src - mapped.addr + mapped.remote_addr - theirs.addr) // BLOCK_LEN, length // BLOCK_LEN)
        for _, src, length in planned[0]
    ]
    blocks = [block for come, count in covered for block in range(come, come + count)]
    assert sorted(blocks) == list(range(NUM_BLOCKS))
    source.close()
    os.close(span.fd)


@pytest.mark.parametrize(
    "regions",
    [
        [region(0), region(20_000), region(41_000)],
        [region(0), region(20_000), region(40_000, num_heads=2)],
        [region(20_000), region(0)],
        [region(0), region(100)],  # they would overlap
    ],
)
def test_regions_that_are_not_equally_spaced_are_no_stack(regions: list[KVRegion]) -> None:
    assert distance_of(regions) is None
