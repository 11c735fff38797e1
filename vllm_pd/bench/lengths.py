"""Distributions of prompt and output lengths, as tables of quantiles.

Lengths of real traffic have several modes, which no simple law fits, so they are drawn
by inverting a distribution function that is linear between known quantiles.

Sources: the Azure LLM inference traces of 2023 (CC-BY, Azure/AzurePublicDataset), the
Mooncake traces (kvcache-ai/Mooncake), both summarised by the quantiles below; ShareGPT
with the filter of ``vllm bench`` as its distribution function was published for 1,003
prompts (sgl-project/sglang, pull request 1853).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]

LEVELS = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.9, 100)
"""Percentiles that the tables of the traces give."""


class LengthLaw(Protocol):
    """A distribution of lengths, in tokens."""

    def draw(self, count: int, rng: np.random.Generator) -> Lengths:
        """Return so many lengths, each at least 1."""
        ...


def _as_lengths(drawn: npt.NDArray[np.floating[Any]], *, at_least: int) -> Lengths:
    lengths: Lengths = np.maximum(at_least, np.rint(drawn)).astype(np.int64)
    return lengths


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same length."""

    length: int

    def draw(self, count: int, rng: np.random.Generator) -> Lengths:  # noqa: ARG002 - as others
        """Return that length so many times."""
        return np.full(count, self.length, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution function that is linear between known quantiles.

    Attributes:
        values: lengths, in the order of ``levels``.
        levels: percentiles from 0 to 100.
    """

    values: Sequence[float]
    levels: Sequence[float] = LEVELS

    def draw(self, count: int, rng: np.random.Generator) -> Lengths:
        """Return lengths by inversion."""
        drawn = np.interp(rng.uniform(0, 100, count), self.levels, self.values)
        return _as_lengths(drawn, at_least=1)


@dataclass(frozen=True, slots=True)
class CappedLognormal:
    """A lognormal law; what is longer than ``cap`` is cut off there."""

    median: float
    sigma: float
    cap: int

    def draw(self, count: int, rng: np.random.Generator) -> Lengths:
        """Return lengths of at least 4, the shortest that ``vllm bench`` keeps of ShareGPT."""
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return _as_lengths(np.minimum(drawn, self.cap), at_least=4)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Another law's shape, with lengths multiplied by ``factor``."""

    law: LengthLaw
    factor: float

    def draw(self, count: int, rng: np.random.Generator) -> Lengths:
        """Return scaled lengths."""
        drawn = self.law.draw(count, rng) * self.factor
        return _as_lengths(drawn, at_least=1)


AZURE_CODE_IN = Quantiles(
    (
        *(3, 17, 75, 147, 386, 770, 1075, 1469),
        *(1909, 2433, 3192, 5188, 7303, 7436, 7437, 7437),
    )
)
AZURE_CODE_OUT = Quantiles((6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 251, 825, 1899))
AZURE_CONV_IN = Quantiles(
    (
        *(2, 29, 181, 207, 387, 403, 703, 1020),
        *(1071, 1130, 1315, 2734, 4083, 4142, 6179, 14050),
    )
)
AZURE_CONV_OUT = Quantiles(
    (7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 954, 1000)
)
MOONCAKE_CONV_IN = Quantiles(
    (
        *(891, 894, 901, 964, 1662, 3263, 4993, 6909),
        *(9570, 13196, 17869, 27367, 39550, 85400, 121301, 126195),
    )
)
MOONCAKE_CONV_OUT = Quantiles(
    (1, 3, 10, 24, 100, 213, 291, 350, 399, 447, 504, 597, 698, 1119, 2000, 2000)
)
MOONCAKE_SYNTHETIC_IN = Quantiles(
    (
        *(13, 16, 22, 30, 88, 913, 4365, 11587),
        *(16290, 19409, 28425, 38611, 48905, 66456, 191373, 191378),
    )
)
MOONCAKE_SYNTHETIC_OUT = Quantiles(
    (1, 2, 2, 4, 8, 16, 32, 69, 126, 210, 289, 389, 519, 768, 813, 893)
)

# Of the tool agent trace only the means are known here, 8,596 and 182 tokens. The shape
# is that of the synthetic trace (means 15,325 and 149), which is an assumption.
MOONCAKE_AGENT_IN = Scaled(MOONCAKE_SYNTHETIC_IN, 8596 / 15325)
MOONCAKE_AGENT_OUT = Scaled(MOONCAKE_SYNTHETIC_OUT, 182 / 149)

SHAREGPT_IN = Quantiles(
    (4, 20, 50, 100, 200, 500, 1000, 1024), levels=(0, 24, 39, 48, 57, 84, 99.8, 100)
)
SHAREGPT_OUT = CappedLognormal(median=140, sigma=1.0, cap=900)
"""Mean 214, as the sample of 200 that ``vllm bench`` draws; the law itself is assumed."""
