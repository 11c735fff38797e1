"""Digests that show whether the bytes of a transfer arrived as they were sent.

They guard against mistakes and damage, not against an attacker: peers are
authenticated before they exchange KV cache. XXH3 hashes faster than memory is
read, so that verifying costs little more than touching the bytes once more.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import xxhash

from vllm_pd.config import Digests
from vllm_pd.transport.memory import view

_SAMPLE_EVERY = 16
_MAX_SAMPLES = 16


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


def digest_of(parts: Iterable[memoryview]) -> bytes:
    """Return the digest of memory, one part after the other."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


def digest(spans: Iterable[tuple[int, int]]) -> bytes:
    """Return the digest of ``(addr, num_bytes)`` spans of this process, one after the other."""
    return digest_of(view(addr, num_bytes) for addr, num_bytes in spans)
