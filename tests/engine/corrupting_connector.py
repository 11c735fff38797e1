"""A connector whose copies flip bits: what the equality tests must be able to see.

Loaded by ``kv_connector_module_path``, like any third-party connector.
"""

from __future__ import annotations

import ctypes

from vllm_pd.connector.connector import PDConnector
from vllm_pd.transport import memory

NUM_FLIPPED = 512  # bytes, in the middle of one block


class CorruptingConnector(PDConnector):
    """PDConnector, but part of the first block of every copied run arrives damaged."""


def _copy_and_flip(dst: int, src: int, num_bytes: int) -> None:
    ctypes.memmove(dst, src, num_bytes)
    # The first run of a fetch that starts with a prompt's first block; its first
    # tokens' keys and values lie at the start of the block.
    for offset in range(1, min(NUM_FLIPPED, num_bytes), 2):
        byte = ctypes.c_ubyte.from_address(dst + offset)
        byte.value ^= 0x41  # whatever the dtype, exponents among them


memory.copy = _copy_and_flip
