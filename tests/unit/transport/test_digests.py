"""What is vouched for, and by which digest."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from vllm_pd.config import Digests
from vllm_pd.transport.chunks import Piece
from vllm_pd.transport.digests import choose, choose_pieces, digest, digest_of
from vllm_pd.transport.memory import address_of

KIB = 1024
MIB = 1024 * KIB


def test_nothing_is_chosen_without_digests() -> None:
    assert choose(Digests.OFF, 100) == []
    assert choose_pieces(Digests.OFF, [KIB], 100) == []


def test_always_takes_every_chunk() -> None:
    assert choose(Digests.ALWAYS, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("num_chunks", "num_chosen"), [(1, 1), (16, 1), (17, 2), (160, 10), (10_000, 16)]
)
def test_sample_is_a_sixteenth_up_to_sixteen_chunks(num_chunks: int, num_chosen: int) -> None:
    chosen = choose(Digests.SAMPLED, num_chunks)
    assert len(set(chosen)) == num_chosen
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(num_chunks))


def test_no_chunk_is_safe_from_being_sampled() -> None:
    seen = Counter(index for _ in range(2000) for index in choose(Digests.SAMPLED, 32))
    assert seen.keys() == set(range(32))


@pytest.mark.parametrize("slice_lens", [[100 * KIB, 700], [3 * MIB], [MIB, 2 * MIB]], ids=str)
def test_always_takes_every_block_in_pieces_of_bounded_length(slice_lens: list[int]) -> None:
    pieces = choose_pieces(Digests.ALWAYS, slice_lens, 50)
    covered = [(p.region, p.first + i) for p in pieces for i in range(p.num_blocks)]
    assert covered == list(itertools.product(range(len(slice_lens)), range(50)))
    for piece in pieces:
        assert piece.num_blocks * slice_lens[piece.region] <= MIB or piece.num_blocks == 1


@pytest.mark.parametrize(
    ("slice_lens", "num_blocks", "num_chosen"),
    [
        ([KIB], 1, 1),
        ([KIB] * 24, 1, 2),
        ([KIB] * 24, 100, 16),
        ([MIB] * 24, 100, 4),
        ([9 * MIB], 100, 1),
    ],
)
def test_sample_is_some_blocks_and_not_many_bytes(
    slice_lens: list[int], num_blocks: int, num_chosen: int
) -> None:
    pieces = choose_pieces(Digests.SAMPLED, slice_lens, num_blocks)
    assert len({(piece.region, piece.first) for piece in pieces}) == num_chosen
    assert all(0 <= piece.first < num_blocks and piece.num_blocks == 1 for piece in pieces)


def test_no_block_is_safe_from_being_sampled() -> None:
    seen = {
        (piece.region, piece.first)
        for _ in range(2000)
        for piece in choose_pieces(Digests.SAMPLED, [KIB, KIB], 16)
    }
    assert seen == set(itertools.product(range(2), range(16)))
    assert Piece(0, 0, 1) not in choose_pieces(Digests.OFF, [KIB], 16)


def test_digest_depends_on_the_bytes_and_their_order_not_on_how_they_are_cut() -> None:
    whole = digest_of([memoryview(b"abcdef")])
    assert whole == digest_of([memoryview(b"abc"), memoryview(b"def")])
    assert whole != digest_of([memoryview(b"def"), memoryview(b"abc")])
    assert whole != digest_of([memoryview(b"abcdeg")])


def test_digest_of_memory_is_that_of_its_bytes() -> None:
    data = bytearray(b"0123456789")
    addr = address_of(data)
    assert digest([(addr + 2, 3), (addr, 1)]) == digest_of([memoryview(b"2340")])
