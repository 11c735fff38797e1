"""A connector whose copies flip bits: what the equality tests must be able to see.

Loaded by ``kv_connector_module_path``, like any third-party connector.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from vllm_pd.connector.connector import PDConnector
from vllm_pd.transport.chunks import Move
from vllm_pd.transport.sources import MappedSource

NUM_FLIPPED = 512  # bytes, in the middle of one block


class CorruptingConnector(PDConnector):
    """PDConnector, but part of the first block of every copied run arrives damaged."""


_read = MappedSource.read


def _read_and_flip(self: MappedSource, moves: Sequence[Move], *args: Any) -> None:
    _read(self, moves, *args)
    for dst, _, num_bytes in moves:
        # Tokens' keys and values lie at the start of a block, the first ones' before others'.
        for offset in range(1, min(NUM_FLIPPED, num_bytes), 2):
            byte = ctypes.c_ubyte.from_address(dst + offset)
            byte.value ^= 0x41  # whatever the dtype, exponents among them


setattr(MappedSource, "read", _read_and_flip)  # noqa: B010 - mypy takes it for no method
