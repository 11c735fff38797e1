"""The HCCL transport keeps the contract of all transports; HCCL and the NPU are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.transport_conformance import HostTransportConformance
from tests.unit.ascend.stand_in_hccl import Rig
from tests.unit.transport.placing import on_device
from vllm_pd.transport.base import KVRegion, Transport, TransportOptions

CHUNK_LEN = 64 * 1024


class TestHcclTransport(HostTransportConformance):
    @pytest.fixture(autouse=True)
    def rig(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
        monkeypatch.setattr("ascend_vllm_plugin.transport.CHUNK_LEN", CHUNK_LEN)
        self._rig = Rig()
        yield self._rig
        self._rig.close()

    def make_with(self, options: TransportOptions) -> Transport:
        self._last = self._rig.make(options)
        return self._last

    def locate(self, region: KVRegion) -> KVRegion:
        return on_device(region, self._rig.device_of(self._last))
