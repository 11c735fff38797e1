"""From samples to figures, and what they have to be. Pure.

Milliseconds, percent and bytes, as the names say.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.service.usage import Idle

TTFT_LIMITS_MS = {64: 25.0}
"""Prompt length → by how much the first token may come later through the service."""

TTFT_LIMITS_PERCENT = {1000: 4.0, 3500: 4.0}
STEP_LIMIT = 1.10
"""Decode step of an instance with a connector, as a multiple of one without."""

HANDSHAKE_LIMIT_MS = 50.0
IDLE_LIMIT_PERCENT = 1.0
MEMORY_LIMIT_LEN = 50_000_000


@dataclass(frozen=True, slots=True)
class Quartiles:
    """Median and quartiles of so many samples."""

    median: float
    p25: float
    p75: float
    count: int


@dataclass(frozen=True, slots=True)
class Limit:
    """A figure and what it must be below.

    Attributes:
        value: the figure.
        limit: None: nothing is required.
        unit: of both.
    """

    value: float
    limit: float | None
    unit: str

    @property
    def is_met(self) -> bool | None:
        """None: nothing is required."""
        return None if self.limit is None else self.value < self.limit


@dataclass(frozen=True, slots=True)
class Ttft:
    """Time to the first token, in milliseconds.

    Attributes:
        service: ``vllm-pd`` or the peer.
        prompt_len: in tokens.
        through: through the router and both instances.
        alone: of the prefill instance, asked directly.
        plain: of an instance without a connector; None: not measured.
    """

    service: str
    prompt_len: int
    through: Quartiles
    alone: Quartiles
    plain: Quartiles | None

    @property
    def added_ms(self) -> float:
        """What the hand-over adds: the difference of the medians."""
        return self.through.median - self.alone.median

    @property
    def added_percent(self) -> float:
        """The same, of the prefill instance's own time."""
        return self.added_ms / self.alone.median * 100

    @property
    def limit(self) -> Limit:
        """What is required at this length."""
        if self.prompt_len in TTFT_LIMITS_MS:
            return Limit(self.added_ms, TTFT_LIMITS_MS[self.prompt_len], "ms")
        return Limit(self.added_percent, TTFT_LIMITS_PERCENT.get(self.prompt_len), "%")


@dataclass(frozen=True, slots=True)
class Step:
    """Time per token after the first, in milliseconds.

    Attributes:
        service: ``vllm-pd`` or the peer.
        way: ``decode`` (the decode instance asked directly) or ``through`` (the router).
        step: of that service.
        plain: of an instance without a connector.
    """

    service: str
    way: str
    step: Quartiles
    plain: Quartiles

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return self.step.median / self.plain.median

    @property
    def limit(self) -> Limit:
        """What is required."""
        return Limit(self.ratio, STEP_LIMIT, "x plain")


@dataclass(frozen=True, slots=True)
class Stages:
    """Where the time of a request goes, in milliseconds.

    Attributes:
        prompt_len: in tokens.
        num_bytes: of KV cache that were fetched.
        transport: that carried them.
        stages: median of each stage of the fetch, by name.
        prefill_leg: whole prefill leg, median.
        decode_leg: whole decode leg with one token, median.
    """

    prompt_len: int
    num_bytes: int
    transport: str
    stages: dict[str, float]
    prefill_leg: float
    decode_leg: float

    @property
    def gb_per_s(self) -> float:
        """While the bytes moved and were verified."""
        return self.num_bytes / self.stages["transfer"] / 1e6


@dataclass(frozen=True, slots=True)
class Usage:
    """What an instance's processes use, beside the same of an instance without a connector.

    Attributes:
        service: ``vllm-pd`` or the peer.
        instance: ``prefill`` or ``decode``.
        idle: of one process.
        plain_idle: of the same process without a connector.
        memory_len: resident bytes beside the KV cache.
        plain_memory_len: the same without a connector.
    """

    service: str
    instance: str
    idle: Idle
    plain_idle: Idle
    memory_len: int
    plain_memory_len: int

    @property
    def added_len(self) -> int:
        """Bytes of memory that the connector adds."""
        return self.memory_len - self.plain_memory_len

    @property
    def idle_limit(self) -> Limit:
        """What is required of our threads."""
        return Limit(self.idle.ours, IDLE_LIMIT_PERCENT, "%")

    @property
    def memory_limit(self) -> Limit:
        """What is required of a worker."""
        limit = MEMORY_LIMIT_LEN / 1e6 if self.idle.kind == "worker" else None
        return Limit(self.added_len / 1e6, limit, "MB")


def quartiles_ms(seconds: Sequence[float]) -> Quartiles:
    """Return median and quartiles in milliseconds."""
    values = [1e3 * value for value in seconds]
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(middle, low, high, len(values))


def kv_block_len(config: dict[str, object], block_size: int) -> int:
    """Return the bytes of one block in all layers, from a model's ``config.json``."""
    names = ("num_hidden_layers", "num_key_value_heads", "head_dim")
    layers, heads, head_len = (int(str(config[name])) for name in names)
    item_len = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return layers * heads * head_len * 2 * block_size * item_len
