"""What the shm transport copies and hashes, from what the producer announced. Pure.

Reads no KV cache, but for the few bytes of blocks that the producer's shared pages do
not hold whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from vllm_pd.config import Digests
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.base import KVRegion, merge_runs
from vllm_pd.transport.chunks import Chunk, Piece, spans_of_chunk
from vllm_pd.transport.copying import Part, Spans
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.memory import SharedSpan
from vllm_pd.transport.shm_frames import Ready, check_pieces, covers_all
from vllm_pd.transport.sources import Run, Source

Outside: TypeAlias = Mapping[tuple[int, int], Sequence[tuple[int, int]]]
"""Parts of blocks that no shared page holds, ``(addr, num_bytes)`` by region and block id."""


@dataclass(slots=True)
class CopyPlan:
    """The work of one transfer; see ``CopyJob`` for what the fields mean."""

    parts: list[Part] = field(default_factory=list)
    hashed_last: dict[int, Spans] = field(default_factory=dict)
    keep: list[bytearray] = field(default_factory=list)


def plan_copy(
    posted: Posted, ready: Ready, source: Source, regions: Sequence[KVRegion], *, num_threads: int
) -> CopyPlan:
    """Turn blocks into address ranges; in parts for several threads or digests.

    Args:
        posted: what is wanted.
        ready: what the producer announced; ``check_ready`` has accepted it.
        source: the producer's memory.
        regions: ours.
        num_threads: how many share the work.

    Raises:
        RemoteProtocolError: the announcement does not fit, or vouches for too little.
    """
    pieces = [Piece(*piece) for piece in ready.vouched]
    num_blocks = len(posted.block_ids)
    check_pieces(pieces, len(regions), num_blocks)
    is_complete = ready.is_complete and covers_all(pieces, len(regions), num_blocks)
    enough = {
        Digests.OFF: True,
        Digests.SAMPLED: bool(pieces),
        Digests.ALWAYS: is_complete,
    }
    if not enough[posted.digests]:
        raise RemoteProtocolError(f"the producer vouches for less than {posted.digests.value}")
    planner = _Planner(posted, ready, source, regions)
    hashed = spans_of_pieces(pieces, regions, posted)
    if is_complete:
        return planner.plan_pieces(pieces, hashed)
    return planner.plan_all(hashed, num_threads)


class _Planner:
    """Plans one transfer, region by region."""

    def __init__(
        self, posted: Posted, ready: Ready, source: Source, regions: Sequence[KVRegion]
    ) -> None:
        self._posted = posted
        self._ready = ready
        self._source = source
        self._regions = regions
        self._heads = posted.heads, ready.heads
        self._inline = dict(ready.inline)
        self._plan = CopyPlan()

    def plan_pieces(self, pieces: Sequence[Piece], hashed: Mapping[int, Spans]) -> CopyPlan:
        """Copy piece by piece, and hash each while it is in the cache."""
        for i, piece in enumerate(pieces):
            part = Part([], {i: hashed[i]})
            place = slice(piece.first, piece.first + piece.num_blocks)
            runs = merge_runs(self._ready.block_ids[place], self._posted.block_ids[place])
            self._plan_region(part, piece.region, runs)
            self._plan.parts.append(part)
        return self._plan

    def plan_all(self, hashed: dict[int, Spans], num_threads: int) -> CopyPlan:
        """Copy everything, then hash some of it."""
        plan = self._plan
        runs = merge_runs(self._ready.block_ids, self._posted.block_ids)
        stacked = None
        if self._heads == (None, None):
            stacked = self._source.plan_stack(self._regions, runs)
        if stacked is not None:
            moves, stack, runs = stacked
            plan.parts += Part(moves, {}, stack).split(num_threads)
        whole = Part([], {})
        for index in range(len(self._regions)) if runs else ():
            self._plan_region(whole, index, runs)
        plan.parts += whole.split(num_threads)
        plan.hashed_last = hashed
        return plan

    def _plan_region(self, part: Part, index: int, runs: Sequence[Run]) -> None:
        moves, keep = self._source.plan(
            index, self._regions[index], runs, self._heads, self._inline
        )
        part.moves.extend(moves)
        self._plan.keep += keep


def spans_of_pieces(
    pieces: Sequence[Piece], regions: Sequence[KVRegion], posted: Posted
) -> dict[int, Spans]:
    """Return where the bytes of pieces are here, by their index."""
    return {
        i: spans_of_chunk(regions, Chunk((piece,), 0), posted.block_ids, posted.heads)
        for i, piece in enumerate(pieces)
    }


def find_outside(regions: Sequence[KVRegion], spans: Sequence[SharedSpan]) -> Outside:
    """Return the parts of blocks that no span covers.

    Spans cover whole pages, so this is at most a page at each end of a span, or
    everything where the regions are smaller than a page.
    """
    outside: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index, region in enumerate(regions):
        end = region.addr + region.num_blocks * region.block_len
        for first, last in _gaps(region.addr, end, spans):
            for block_id in range(
                (first - region.addr) // region.block_len,
                (last - 1 - region.addr) // region.block_len + 1,
            ):
                start = region.addr + block_id * region.block_len
                lo, hi = max(first, start), min(last, start + region.block_len)
                outside.setdefault((index, block_id), []).append((lo, hi - lo))
    return outside


def _gaps(first: int, last: int, spans: Sequence[SharedSpan]) -> list[tuple[int, int]]:
    gaps = []
    for span in sorted(spans, key=lambda s: s.addr):
        if span.addr + span.num_bytes <= first or span.addr >= last:
            continue
        if span.addr > first:
            gaps.append((first, span.addr))
        first = max(first, span.addr + span.num_bytes)
    if first < last:
        gaps.append((first, last))
    return gaps
