"""The HCCL transport keeps the contract, with torch_npu itself and the double of CANN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.npu.rig import NpuArena, NpuRig
from tests.transport_conformance import Arena, HostTransportConformance
from vllm_pd.transport.base import KVRegion, Transport, TransportOptions

CHUNK_LEN = 64 * 1024


class _OnNpu(HostTransportConformance):
    backend: str

    @pytest.fixture(autouse=True)
    def rig(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("VLLM_PD_HCCL_BACKEND", self.backend)
        monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "30")  # process_group insists on it
        monkeypatch.setattr("ascend_vllm_plugin.transport.CHUNK_LEN", CHUNK_LEN)
        self._rig = NpuRig()
        yield
        self._rig.close()

    def make_with(self, options: TransportOptions) -> Transport:
        return self._rig.make(options)

    def make_arena(self, num_bytes: int) -> Arena:
        self._arena = NpuArena(num_bytes)
        return self._arena

    def locate(self, region: KVRegion) -> KVRegion:
        return self._arena.place(region)


class TestCtypes(_OnNpu):
    """libhccl, called by us."""

    backend = "ctypes"


class TestProcessGroup(_OnNpu):
    """libhccl, called by torch_npu."""

    backend = "process_group"
