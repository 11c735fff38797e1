"""Every host transport against the one contract."""

from __future__ import annotations

from tests.transport_conformance import TransportConformance
from vllm_pd.transport.base import Transport, TransportOptions
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport


class TestShmTransport(TransportConformance):
    def make_transport(self) -> Transport:
        return ShmTransport(TransportOptions())


class TestTcpTransport(TransportConformance):
    def make_transport(self) -> Transport:
        return TcpTransport(TransportOptions())
