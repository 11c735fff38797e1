"""Host memory as if it were on the stand-in device."""

from __future__ import annotations

import ctypes
import dataclasses

import torch

from tests.stand_in_device import StandInDevice
from vllm_pd.transport.base import KVRegion

NOWHERE = 8  # what device memory must not be reached by: its host address


def on_device(region: KVRegion, device: StandInDevice) -> KVRegion:
    """Return a region that is reached by work on the device's streams only."""
    memory = (ctypes.c_uint8 * (region.num_blocks * region.block_len)).from_address(region.addr)
    tensor = torch.frombuffer(memory, dtype=torch.uint8).view(
        region.num_blocks, region.num_rows, region.num_heads, -1
    )
    return dataclasses.replace(region, addr=NOWHERE, device="stand-in", tensor=device.place(tensor))
