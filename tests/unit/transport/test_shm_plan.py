"""What is copied and hashed for an announcement."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vllm_pd.config import Digests
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.base import KVRegion
from vllm_pd.transport.chunks import Piece
from vllm_pd.transport.digests import choose_pieces
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction
from vllm_pd.transport.memory import SharedSpan
from vllm_pd.transport.shm_frames import Ready
from vllm_pd.transport.shm_plan import CopyPlan, find_outside, plan_copy, spans_of_pieces
from vllm_pd.transport.sources import ProcessSource

LEN = 100  # bytes of a block
OURS = [KVRegion(f"layer.{i}", 10_000 * (i + 1), 8, LEN) for i in range(2)]
THEIRS = [KVRegion(f"layer.{i}", 500_000 * (i + 1), 8, LEN) for i in range(2)]
SRC, DST = (0, 1, 5), (2, 3, 4)


def plan(
    pieces: Sequence[Piece], *, wanted: Digests, is_complete: bool = False, num_threads: int = 1
) -> CopyPlan:
    posted = Posted("p", Direction.RECEIVING, 1, DST, None, len(DST) * 2 * LEN, digests=wanted)
    ready = Ready(
        transfer_id=1,
        block_ids=SRC,
        heads=None,
        inline=(),
        vouched=tuple((piece.region, piece.first, piece.num_blocks) for piece in pieces),
        is_complete=is_complete,
    )
    return plan_copy(posted, ready, ProcessSource(THEIRS, 1), OURS, num_threads=num_threads)


def moves_of(made: CopyPlan) -> set[tuple[int, int, int]]:
    return {move for part in made.parts for move in part.moves}


EVERYTHING = {
    (10_200, 500_000, 200),  # blocks 0 and 1 go to 2 and 3, in one piece
    (10_400, 500_500, 100),
    (20_200, 1_000_000, 200),
    (20_400, 1_000_500, 100),
}
ALL_PIECES = choose_pieces(Digests.ALWAYS, [LEN, LEN], len(DST))


def test_adjacent_blocks_of_each_region_are_one_move() -> None:
    made = plan([], wanted=Digests.OFF)
    assert moves_of(made) == EVERYTHING
    assert made.hashed_last == {}


def test_threads_get_parts_that_are_everything_together() -> None:
    made = plan([], wanted=Digests.OFF, num_threads=3)
    assert len(made.parts) in (2, 3)
    assert moves_of(made) == EVERYTHING


def test_sampled_pieces_are_hashed_when_all_is_copied() -> None:
    made = plan([Piece(1, 2, 1)], wanted=Digests.SAMPLED)
    assert moves_of(made) == EVERYTHING
    assert made.hashed_last == {0: [(20_400, 100)]}


def test_pieces_that_are_everything_are_hashed_one_by_one_as_they_are_copied() -> None:
    made = plan(ALL_PIECES, wanted=Digests.ALWAYS, is_complete=True)
    assert moves_of(made) == EVERYTHING
    assert made.hashed_last == {}
    for part in made.parts:
        spans = [span for spans in part.hashed.values() for span in spans]
        assert sum(move[2] for move in part.moves) == sum(length for _, length in spans)


@pytest.mark.parametrize(
    ("pieces", "is_complete", "wanted"),
    [
        ([], False, Digests.SAMPLED),
        ([Piece(0, 0, 3)], False, Digests.ALWAYS),
        ([Piece(0, 0, 3)], True, Digests.ALWAYS),  # it says so, and it is not
        (ALL_PIECES, False, Digests.ALWAYS),
        ([Piece(0, 2, 2)], False, Digests.SAMPLED),
        ([Piece(2, 0, 1)], False, Digests.OFF),
    ],
)
def test_producer_that_vouches_for_too_little_or_for_what_is_not_there_is_refused(
    pieces: list[Piece], is_complete: bool, wanted: Digests
) -> None:
    with pytest.raises(RemoteProtocolError):
        plan(pieces, wanted=wanted, is_complete=is_complete)


def test_hashed_spans_are_ours_by_index_of_the_piece() -> None:
    posted = Posted("p", Direction.SENDING, 1, DST, None, 0)
    spans = spans_of_pieces([Piece(0, 1, 2), Piece(1, 0, 1)], OURS, posted)
    assert spans == {0: [(10_300, 200)], 1: [(20_200, 100)]}


def test_outside_is_what_no_shared_span_holds() -> None:
    spans = [SharedSpan(10_050, 1_000, fd=-1)]
    outside = find_outside(OURS[:1], spans)
    assert outside == {(0, 0): [(10_000, 50)]}


def test_everything_is_outside_without_shared_spans() -> None:
    outside = find_outside(OURS, [])
    assert outside == {
        (index, block_id): [(OURS[index].addr + block_id * LEN, LEN)]
        for index in range(2)
        for block_id in range(8)
    }
