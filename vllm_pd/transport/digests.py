"""Digests that show whether the bytes of a transfer arrived as they were sent.

They guard against mistakes and damage, not against an attacker: peers are
authenticated before they exchange KV cache. XXH3 hashes faster than memory is
read, so that verifying costs little more than touching the bytes once more.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import xxhash

from vllm_pd.config import Digests
from vllm_pd.transport.chunks import Piece
from vllm_pd.transport.memory import view

_SAMPLE_EVERY = 16
_MAX_SAMPLES = 16
_MAX_SAMPLED_LEN = 4 * 1024 * 1024
_PIECE_LEN = 1024 * 1024  # is still in the cache when it is hashed after it was copied


def choose(how: Digests, num_chunks: int) -> list[int]:
    """Return the chunks to vouch for: all, none, or some that nobody can foretell."""
    match how:
        case Digests.OFF:
            return []
        case Digests.ALWAYS:
            return list(range(num_chunks))
        case Digests.SAMPLED:
            count = min(-(-num_chunks // _SAMPLE_EVERY), _MAX_SAMPLES)
            return sorted(random.sample(range(num_chunks), count))


def choose_pieces(how: Digests, slice_lens: Sequence[int], num_blocks: int) -> list[Piece]:
    """Return the blocks to vouch for: all of them, none, or some that nobody can foretell.

    Args:
        how: how much.
        slice_lens: bytes of one block, by region.
        num_blocks: blocks of the transfer.
    """
    match how:
        case Digests.OFF:
            return []
        case Digests.ALWAYS:
            pieces = []
            for index, length in enumerate(slice_lens):
                step = max(_PIECE_LEN // length, 1)
                pieces += [
                    Piece(index, first, min(step, num_blocks - first))
                    for first in range(0, num_blocks, step)
                ]
            return pieces
        case Digests.SAMPLED:
            total = len(slice_lens) * num_blocks
            most = min(_MAX_SAMPLES, max(_MAX_SAMPLED_LEN // max(slice_lens), 1))
            picks = random.sample(range(total), min(-(-total // _SAMPLE_EVERY), most))
            return [Piece(pick // num_blocks, pick % num_blocks, 1) for pick in sorted(picks)]


def digest_of(parts: Iterable[memoryview]) -> bytes:
    """Return the digest of memory, one part after the other."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


def digest(spans: Iterable[tuple[int, int]]) -> bytes:
    """Return the digest of ``(addr, num_bytes)`` spans of this process, one after the other."""
    return digest_of(view(addr, num_bytes) for addr, num_bytes in spans)
