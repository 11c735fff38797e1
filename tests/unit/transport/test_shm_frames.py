"""What a producer may announce."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.chunks import Piece
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction
from vllm_pd.transport.shm_frames import (
    AnyFrame,
    Confirmed,
    Copied,
    Memory,
    Ready,
    RegionInfo,
    Vouched,
    check_pieces,
    check_ready,
    check_region,
    covers_all,
    decode,
)
from vllm_pd.transport.sources import ProcessSource

OURS = KVRegion("layer", 4096, 8, 3 * 2 * 10, num_rows=3, num_heads=2)
THEIRS = RegionInfo(addr=8192, num_blocks=5, block_len=3 * 4 * 10, num_rows=3, num_heads=4)
READY = Ready(
    transfer_id=1, block_ids=(4, 0), heads=(2, 2), inline=(), vouched=(), is_complete=False
)


@pytest.mark.parametrize(
    "frame",
    [
        Memory(spans=((4096, 8192),), regions=(THEIRS,)),
        msgspec.structs.replace(READY, inline=((8192, b"\x00\xff"),), vouched=((0, 1, 1),)),
        Vouched(transfer_id=1, digests=(b"d" * 16,)),
        Copied(transfer_id=1),
        Confirmed(transfer_id=1),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_round_trip(frame: AnyFrame) -> None:
    assert decode(msgspec.msgpack.encode(frame)) == frame


def test_region_with_more_heads_fits() -> None:
    assert check_region(OURS, THEIRS) == KVRegion("layer", 8192, 5, 120, num_rows=3, num_heads=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_rows": 1},
        {"num_heads": 2},
        {"num_heads": 0, "block_len": 0},
        {"num_heads": -4, "block_len": -120},
        {"block_len": 121},
        {"num_blocks": 0},
        {"num_blocks": -5},
    ],
    ids=str,
)
def test_region_whose_heads_are_not_like_ours_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(RemoteProtocolError, match="does not fit layer"):
        check_region(OURS, msgspec.structs.replace(THEIRS, **changes))


def check(ready: Ready, heads: Heads | None = None) -> None:
    posted = Posted("p", Direction.RECEIVING, 1, (6, 7), heads, 0)
    source = ProcessSource([check_region(OURS, THEIRS)], pid=0)
    check_ready(ready, posted, source, OURS.num_heads)


def test_announcement_of_what_was_asked_for_is_right() -> None:
    check(READY)
    check(READY, heads=(0, 2))
    check(msgspec.structs.replace(READY, heads=(3, 1)), heads=(1, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"block_ids": (4,)},
        {"block_ids": (4, 0, 1)},
        {"block_ids": ()},
        {"block_ids": (4, 5)},
        {"block_ids": (-1, 0)},
        {"heads": None},
        {"heads": (0, 1)},
        {"heads": (3, 2)},
        {"heads": (-1, 2)},
        {"heads": (0, 0)},
        {"heads": (0, -2)},
    ],
    ids=str,
)
def test_announcement_of_anything_else_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        check(msgspec.structs.replace(READY, **changes))


def test_all_heads_of_a_peer_with_as_many_need_not_be_named() -> None:
    posted = Posted("p", Direction.RECEIVING, 1, (6, 7), None, 0)
    alike = dataclasses.replace(OURS, addr=8192)
    ready = msgspec.structs.replace(READY, heads=None)
    check_ready(ready, posted, ProcessSource([alike], pid=0), OURS.num_heads)


@pytest.mark.parametrize(
    "piece",
    [Piece(2, 0, 1), Piece(-1, 0, 1), Piece(0, 3, 2), Piece(0, -1, 2), Piece(0, 1, 0)],
    ids=str,
)
def test_digest_of_what_is_not_transferred_is_refused(piece: Piece) -> None:
    check_pieces([Piece(0, 0, 4), Piece(1, 3, 1)], 2, 4)
    with pytest.raises(RemoteProtocolError, match="a digest of"):
        check_pieces([piece], 2, 4)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([Piece(0, 0, 4), Piece(1, 0, 4)], True),
        ([Piece(0, 0, 1), Piece(0, 1, 3), Piece(1, 0, 4)], True),
        ([], False),
        ([Piece(0, 0, 4)], False),
        ([Piece(1, 0, 4), Piece(0, 0, 4)], False),
        ([Piece(0, 0, 4), Piece(1, 1, 3)], False),
        ([Piece(0, 0, 4), Piece(1, 0, 3)], False),
        ([Piece(0, 0, 4), Piece(1, 0, 4), Piece(1, 0, 4)], False),
        ([Piece(0, 0, 2), Piece(0, 1, 3), Piece(1, 0, 4)], False),
    ],
)
def test_pieces_are_all_there_is_only_if_none_is_missing_or_twice(
    pieces: list[Piece], expected: bool
) -> None:
    assert covers_all(pieces, 2, 4) is expected
