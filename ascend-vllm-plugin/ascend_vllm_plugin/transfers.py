"""One transfer on its way, and memory for several."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ascend_vllm_plugin.engine import Job
from ascend_vllm_plugin.pairs import Pair
from vllm_pd.config import Digests
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.base import KVRegion
from vllm_pd.transport.chunks import Chunk, Piece, slice_len
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.shm_frames import check_pieces

if TYPE_CHECKING:
    import torch


class Buffers:
    """Device memory that transfers of one direction pass through, one each at a time.

    Args:
        buffers: all there are.

    Attributes:
        num_left: how many are free or will be.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._free = deque(buffers)
        self.num_left = len(self._free)

    def take(self) -> torch.Tensor | None:
        """Return one, or None if there is none now."""
        return self._free.popleft() if self._free else None

    def give(self, buffer: torch.Tensor) -> None:
        """Take one back, of which the device has done with."""
        self._free.append(buffer)

    def write_off(self) -> None:
        """Take note that one will not come back."""
        self.num_left -= 1


@dataclass(slots=True, eq=False)
class Transfer:
    """One half of a transfer, from its posting to its end.

    Attributes:
        posted: what the ledger knows.
        pair: with whom.
        chunks: what is sent one after the other.
        buffer: device memory, while it has some.
        host: the portion that is on its way to the host.
        job: what the engine does for it, now.
        is_asked: consumer: Want is sent.
        is_moved: the bytes are out of, or in, the KV cache.
        is_received: producer: the consumer has everything.
        is_covered: consumer: the producer vouches for as much as is asked.
        portions: what is hashed, one portion after the other.
        digests: of the portions so far.
        vouched: consumer: digests that the producer sent, by portion.
    """

    posted: Posted
    pair: Pair
    chunks: list[Chunk]
    buffer: torch.Tensor | None = None
    host: torch.Tensor | None = None
    job: Job | None = None
    is_asked: bool = False
    is_moved: bool = False
    is_received: bool = False
    is_covered: bool = False
    portions: list[Chunk] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    vouched: dict[int, bytes] = field(default_factory=dict)

    @property
    def is_hashed(self) -> bool:
        """Whether there is nothing more to hash here."""
        return self.is_moved and len(self.digests) == len(self.portions)


def view_of(host: torch.Tensor) -> memoryview:
    """Return the bytes of host memory."""
    return memoryview(host.numpy())  # type: ignore[arg-type] # an array is a buffer


def sample_of(
    pieces: Sequence[Piece], regions: Sequence[KVRegion], posted: Posted, max_len: int
) -> list[Chunk]:
    """Return the portion that a producer vouches for by a sample; none for no pieces.

    Raises:
        RemoteProtocolError: the transfer does not have these pieces, or they are too many.
    """
    if not pieces:
        return []
    check_pieces(pieces, len(regions), len(posted.block_ids))
    num_bytes = sum(
        piece.num_blocks * slice_len(regions[piece.region], posted.heads) for piece in pieces
    )
    if num_bytes > max_len:
        raise RemoteProtocolError(f"a sample of {num_bytes} bytes, more than {max_len}")
    return [Chunk(tuple(pieces), num_bytes)]


def covers(wanted: Digests, given: Digests, num_portions: int) -> bool:
    """Return whether a producer vouches for as much as the consumer asks."""
    match wanted:
        case Digests.OFF:
            return True
        case Digests.SAMPLED:
            return num_portions > 0
        case Digests.ALWAYS:
            return given is Digests.ALWAYS
