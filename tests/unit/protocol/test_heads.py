"""Who reads which heads from whom, for every pair of tensor-parallel sizes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from vllm_pd.errors import IncompatiblePeerError
from vllm_pd.protocol.heads import Part, heads_of_rank, plan_parts

SIZES = (1, 2, 4, 8, 16)
SHAPES = [
    pytest.param(
        tp_size, remote_tp_size, num_kv_heads, id=f"{remote_tp_size}to{tp_size}h{num_kv_heads}"
    )
    for tp_size, remote_tp_size, num_kv_heads in itertools.product(SIZES, SIZES, SIZES)
]
every_shape = pytest.mark.parametrize(("tp_size", "remote_tp_size", "num_kv_heads"), SHAPES)


def plans(tp_size: int, remote_tp_size: int, num_kv_heads: int) -> dict[int, tuple[Part, ...]]:
    """Return the plan of every consumer rank."""
    return {
        rank: plan_parts(
            rank, tp_size=tp_size, remote_tp_size=remote_tp_size, num_kv_heads=num_kv_heads
        )
        for rank in range(tp_size)
    }


@pytest.mark.parametrize(
    ("tp_size", "num_kv_heads", "expected"),
    [
        (1, 8, [range(8)]),
        (2, 8, [range(4), range(4, 8)]),
        (4, 4, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        (4, 2, [range(1), range(1), range(1, 2), range(1, 2)]),
        (2, 1, [range(1), range(1)]),
    ],
)
def test_heads_are_shared_out_as_vllm_does(
    tp_size: int, num_kv_heads: int, expected: list[range]
) -> None:
    held = [heads_of_rank(rank, tp_size, num_kv_heads) for rank in range(tp_size)]
    assert held == expected


@every_shape
def test_every_head_comes_from_exactly_one_rank_that_holds_it(
    tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> None:
    for rank, parts in plans(tp_size, remote_tp_size, num_kv_heads).items():
        wanted = heads_of_rank(rank, tp_size, num_kv_heads)
        read: list[tuple[int, int]] = []  # (place here, head of the model)
        for part in parts:
            held = heads_of_rank(part.remote_rank, remote_tp_size, num_kv_heads)
            assert 0 <= part.remote_head <= part.remote_head + part.num_heads <= len(held)
            read += [
                (part.local_head + i, held[part.remote_head + i]) for i in range(part.num_heads)
            ]
        assert sorted(read) == list(enumerate(wanted))


@every_shape
def test_number_of_readers_is_that_of_the_ranks_that_read(
    tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> None:
    parts = [p for plan in plans(tp_size, remote_tp_size, num_kv_heads).values() for p in plan]
    num_readers = Counter(part.remote_rank for part in parts if part.num_heads)
    for part in parts:
        assert part.num_readers == (num_readers[part.remote_rank] or 1)


@every_shape
def test_every_producer_rank_is_either_read_or_told_once_that_it_is_not(
    tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> None:
    parts = [p for plan in plans(tp_size, remote_tp_size, num_kv_heads).values() for p in plan]
    readers = Counter(part.remote_rank for part in parts if part.num_heads)
    told = Counter(part.remote_rank for part in parts if not part.num_heads)
    assert set(readers) | set(told) == set(range(remote_tp_size))
    assert not set(readers) & set(told)
    assert set(told.values()) <= {1}


@every_shape
def test_a_rank_speaks_to_each_producer_rank_once_and_in_order(
    tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> None:
    for parts in plans(tp_size, remote_tp_size, num_kv_heads).values():
        remotes = [part.remote_rank for part in parts]
        assert remotes == sorted(set(remotes))


@every_shape
def test_ranks_that_hold_the_same_head_are_read_evenly(
    tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> None:
    parts = [p for plan in plans(tp_size, remote_tp_size, num_kv_heads).values() for p in plan]
    readers = Counter(part.remote_rank for part in parts if part.num_heads)
    assert len(set(readers.values())) == 1


def test_equal_sizes_pair_the_ranks() -> None:
    assert plans(4, 4, 8) == {rank: (Part(rank, 0, 0, 2, 1),) for rank in range(4)}


def test_one_rank_puts_the_heads_of_several_together() -> None:
    assert plan_parts(0, tp_size=1, remote_tp_size=2, num_kv_heads=4) == (
        Part(0, 0, 0, 2, 1),
        Part(1, 0, 2, 2, 1),
    )


def test_several_ranks_take_their_heads_from_one() -> None:
    assert plans(2, 1, 4) == {0: (Part(0, 0, 0, 2, 2),), 1: (Part(0, 2, 0, 2, 2),)}


def test_copies_of_a_head_that_nobody_needs_are_told_so() -> None:
    assert plan_parts(0, tp_size=1, remote_tp_size=4, num_kv_heads=2) == (
        Part(0, 0, 0, 1, 1),
        Part(1, 0, 0, 0, 1),
        Part(2, 0, 1, 1, 1),
        Part(3, 0, 0, 0, 1),
    )


@pytest.mark.parametrize(
    ("tp_size", "remote_tp_size", "num_kv_heads"), [(3, 1, 8), (1, 3, 8), (6, 2, 4), (2, 2, 3)]
)
def test_heads_that_do_not_divide_are_refused(
    tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> None:
    with pytest.raises(IncompatiblePeerError, match="do not divide"):
        plan_parts(0, tp_size=tp_size, remote_tp_size=remote_tp_size, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize(
    ("tp_rank", "tp_size", "num_kv_heads"), [(2, 2, 4), (-1, 2, 4), (0, 0, 4), (0, 1, 0)]
)
def test_rank_that_cannot_be_is_refused(tp_rank: int, tp_size: int, num_kv_heads: int) -> None:
    with pytest.raises(IncompatiblePeerError, match=f"rank {tp_rank} of {tp_size}"):
        heads_of_rank(tp_rank, tp_size, num_kv_heads)


@pytest.mark.parametrize("remote_tp_size", [0, -1])
def test_producer_without_ranks_is_refused(remote_tp_size: int) -> None:
    with pytest.raises(IncompatiblePeerError):
        plan_parts(0, tp_size=1, remote_tp_size=remote_tp_size, num_kv_heads=2)
