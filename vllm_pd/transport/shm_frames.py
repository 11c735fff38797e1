"""What the two ends of the shm transport say to each other, and what they must not. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.chunks import Piece
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.sources import Source


class RegionInfo(msgspec.Struct, frozen=True):
    """Where a region of the producer is, in its own address space."""

    addr: int
    num_blocks: int
    block_len: int
    num_rows: int
    num_heads: int


class Memory(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="memory"):
    """Producer, once per link, with one descriptor per span; without any, read the process."""

    spans: tuple[tuple[int, int], ...]  # (addr, num_bytes) in the producer's process
    regions: tuple[RegionInfo, ...]


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ready"):
    """Producer: these blocks may be read."""

    transfer_id: int
    block_ids: tuple[int, ...]
    heads: Heads | None
    inline: tuple[tuple[int, bytes], ...]  # (producer address, bytes outside the spans)
    vouched: tuple[tuple[int, int, int], ...]  # pieces that digests will come for
    is_complete: bool  # they are all there is


class Vouched(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="vouched"):
    """Producer: the digests, in the order of Ready's ``vouched``."""

    transfer_id: int
    digests: tuple[bytes, ...]


class Copied(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="copied"):
    """Consumer: the copy is complete."""

    transfer_id: int


class Abandoned(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="abandoned"):
    """Consumer: the copy failed, or is not what was sent."""

    transfer_id: int
    reason: str


class Confirmed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="confirmed"):
    """Producer: the blocks were held until Copied arrived."""

    transfer_id: int


AnyFrame = Memory | Ready | Vouched | Copied | Abandoned | Confirmed
_decoder: msgspec.msgpack.Decoder[AnyFrame] = msgspec.msgpack.Decoder(AnyFrame)


def decode(frame: bytes) -> AnyFrame:
    """Parse a frame.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(frame)


def check_region(ours: KVRegion, theirs: RegionInfo) -> KVRegion:
    """Return the peer's region if its heads are like ours.

    Raises:
        RemoteProtocolError: they are not.
    """
    if (
        theirs.num_rows != ours.num_rows
        or theirs.num_heads < 1
        or theirs.num_blocks < 1
        or theirs.block_len != theirs.num_rows * theirs.num_heads * ours.head_len
    ):
        raise RemoteProtocolError(f"the peer's region {theirs} does not fit {ours.name}")
    return KVRegion(
        ours.name,
        theirs.addr,
        theirs.num_blocks,
        theirs.block_len,
        num_rows=theirs.num_rows,
        num_heads=theirs.num_heads,
    )


def check_ready(ready: Ready, posted: Posted, source: Source, num_heads_here: int) -> None:
    """Compare what the producer offers with what was asked for.

    Raises:
        RemoteProtocolError: they differ.
    """
    theirs = source.regions
    if len(ready.block_ids) != len(posted.block_ids):
        raise RemoteProtocolError(
            f"{len(ready.block_ids)} blocks announced, not {len(posted.block_ids)}"
        )
    num_blocks = min(region.num_blocks for region in theirs)
    if min(ready.block_ids) < 0 or max(ready.block_ids) >= num_blocks:
        raise RemoteProtocolError("block ids beyond the peer's regions")
    num_heads = min(region.num_heads for region in theirs)
    first, count = ready.heads if ready.heads is not None else (0, num_heads)
    if first < 0 or count < 1 or first + count > num_heads:
        raise RemoteProtocolError(f"{count} heads from {first}, of {num_heads}")
    wanted = posted.heads[1] if posted.heads is not None else num_heads_here
    if count != wanted:
        raise RemoteProtocolError(f"{count} heads announced, not {wanted}")


def check_pieces(pieces: Sequence[Piece], num_regions: int, num_blocks: int) -> None:
    """Refuse pieces that the transfer does not have.

    Raises:
        RemoteProtocolError: there is one.
    """
    for piece in pieces:
        is_inside = 0 <= piece.first < piece.first + piece.num_blocks <= num_blocks
        if not (is_inside and 0 <= piece.region < num_regions):
            raise RemoteProtocolError(f"a digest of {piece}")


def covers_all(pieces: Sequence[Piece], num_regions: int, num_blocks: int) -> bool:
    """Return whether pieces are all of a transfer, in order."""
    wanted = (0, 0)
    for piece in pieces:
        if (piece.region, piece.first) != wanted:
            return False
        last = piece.first + piece.num_blocks
        wanted = (piece.region, last) if last < num_blocks else (piece.region + 1, 0)
    return wanted == (num_regions, 0)
