"""Workers whose KV cache is on an NPU of the double, in one process."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
import torch_npu  # noqa: F401 - makes torch know the NPU
from ascend_vllm_plugin.transport import HcclTransport

from tests.transport_conformance import MISALIGNED, Arena
from tests.unit.ascend.stand_in_hccl import EngineThread
from vllm_pd.transport.base import KVRegion, TransportOptions

_devices = itertools.cycle(range(8))


class NpuArena(Arena):
    """Memory of an NPU; the double's is the host's, so tests can look into it."""

    def __init__(self, num_bytes: int) -> None:
        self.index = next(_devices)
        self.tensor = torch.empty(num_bytes + 4096, dtype=torch.uint8, device=f"npu:{self.index}")
        self.addr = self.tensor.data_ptr() + MISALIGNED
        self.num_bytes = num_bytes

    def place(self, region: KVRegion) -> KVRegion:
        """Return a region with its tensor."""
        first = region.addr - self.tensor.data_ptr()
        span = self.tensor[first : first + region.num_blocks * region.block_len]
        tensor = span.view(region.num_blocks, region.num_rows, region.num_heads, -1)
        return dataclasses.replace(region, device="npu", tensor=tensor)


class NpuRig:
    """Transports, each with its engine's thread."""

    def __init__(self) -> None:
        self.engines: list[EngineThread] = []

    def make(self, options: TransportOptions | None = None, **kwargs: Any) -> HcclTransport:
        transport = HcclTransport(options or TransportOptions(), **kwargs)
        self.engines.append(EngineThread(transport))
        return transport

    def close(self) -> None:
        for engine in self.engines:
            engine.stop()
