"""Prompts that no cache has seen, and the order in which instances are asked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

FIRST_ID = 16
"""Lower token ids are special tokens in many models."""


class Prompts:
    """Random token ids, new ones for every request.

    Args:
        vocab_size: of the model.
        seed: of the random numbers.
    """

    def __init__(self, vocab_size: int, seed: int) -> None:
        if vocab_size <= FIRST_ID:
            raise ValueError(f"a vocabulary of {vocab_size} tokens is too small")
        self._rng = random.Random(seed)
        self._ids = range(FIRST_ID, vocab_size)

    def fresh(self, num_tokens: int) -> list[int]:
        """Return a prompt of so many tokens."""
        return self._rng.choices(self._ids, k=num_tokens)


def rounds_of(names: Sequence[str], num_rounds: int, seed: int) -> Iterator[list[str]]:
    """Yield whom to ask in each round: everybody once, in an order that changes."""
    rng = random.Random(seed)
    for _ in range(num_rounds):
        yield rng.sample(names, len(names))
