"""Which bytes move, in which order. Pure; both processes compute the same from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

NUM_REGIONS = 12
"""Layers of the model whose KV cache is imitated."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One transfer: every block of a KV cache, in random order on both sides.

    All regions lie one behind the other in one allocation, as vLLM's KV cache does.

    Attributes:
        block_len: bytes of one block in one region.
        num_regions: regions (layers).
        num_blocks: blocks per region, on both sides.
        seed: of the random order.
    """

    block_len: int
    num_regions: int
    num_blocks: int
    seed: int

    @property
    def region_len(self) -> int:
        """Bytes of one region."""
        return self.num_blocks * self.block_len

    @property
    def num_bytes(self) -> int:
        """Bytes that move, which is all there are."""
        return self.num_regions * self.region_len

    def block_ids(self) -> tuple[list[int], list[int]]:
        """Return source and destination block ids; the same for every region."""
        rng = random.Random(f"{self.seed}/{self.block_len}")
        src, dst = list(range(self.num_blocks)), list(range(self.num_blocks))
        rng.shuffle(src)
        rng.shuffle(dst)
        return src, dst

    def offsets(self) -> tuple[list[int], list[int]]:
        """Return source and destination offsets of all blocks, region by region."""
        src, dst = self.block_ids()
        starts = range(0, self.num_bytes, self.region_len)
        return (
            [start + block_id * self.block_len for start in starts for block_id in src],
            [start + block_id * self.block_len for start in starts for block_id in dst],
        )


def make_plan(block_len: int, *, num_bytes: int, seed: int, num_regions: int = NUM_REGIONS) -> Plan:
    """Return a plan that moves at least ``num_bytes``, in whole blocks of every region."""
    num_blocks = max(1, -(-num_bytes // (block_len * num_regions)))
    return Plan(block_len, num_regions, num_blocks, seed)
