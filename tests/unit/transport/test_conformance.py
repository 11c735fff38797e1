"""Every host transport, in every mode, against the one contract."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.stand_in_device import StandInDevice
from tests.transport_conformance import HostTransportConformance, Pair
from vllm_pd.session.keys import ClusterKey, load_cluster_key, write_cluster_key
from vllm_pd.transport.base import KVRegion, Transport, TransportOptions
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport

NOWHERE = 8  # what device memory must not be reached by: its host address


class TestShmTransport(HostTransportConformance):
    def make_with(self, options: TransportOptions) -> Transport:
        return ShmTransport(options)

    def test_pages_are_shared(self, pair: Pair) -> None:
        assert [worker.transport.mode for worker in pair] == [("memfd", "")] * 2


class TestShmTransportOnThreeThreads(HostTransportConformance):
    def make_with(self, options: TransportOptions) -> Transport:
        return ShmTransport(dataclasses.replace(options, num_copy_threads=3))


class TestShmTransportWhereMemfdIsRefused(HostTransportConformance):
    """Both ends are in one process, which may always read itself."""

    @pytest.fixture(autouse=True)
    def refuse_memfd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(name: str, flags: int = 0) -> int:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.memfd_create", refuse)

    def make_with(self, options: TransportOptions) -> Transport:
        return ShmTransport(options)

    def test_mode_says_what_is_used_instead_and_why(self, pair: Pair) -> None:
        mode = ("process_vm_readv", "memfd_create: Operation not permitted")
        assert [worker.transport.mode for worker in pair] == [mode, mode]


class TestTcpTransportOverOneStream(HostTransportConformance):
    def make_with(self, options: TransportOptions) -> Transport:
        return TcpTransport(dataclasses.replace(options, num_streams=1))

    def test_mode_is_direct(self, pair: Pair) -> None:
        assert pair[0].transport.mode == ("direct", "")


class TestTcpTransportOverFourStreams(HostTransportConformance):
    def make_with(self, options: TransportOptions) -> Transport:
        return TcpTransport(dataclasses.replace(options, num_streams=4))


@functools.cache
def cluster_key() -> ClusterKey:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key"
        write_cluster_key(path)
        return load_cluster_key(path)


def with_certificate(options: TransportOptions) -> TransportOptions:
    key = cluster_key()
    return dataclasses.replace(options, certificate=key.certificate, private_key=key.private_key)


class TestTcpTransportOverTls(HostTransportConformance):
    def make_with(self, options: TransportOptions) -> Transport:
        return TcpTransport(with_certificate(options))

    def test_mode_says_so(self, pair: Pair) -> None:
        assert pair[0].transport.mode == ("direct+tls", "")

    def test_peer_without_tls_is_out_of_reach(self, pair: Pair) -> None:
        plain = TcpTransport(TransportOptions())
        assert not plain.can_reach(pair[0].transport.local_endpoint())
        assert not pair[0].transport.can_reach(plain.local_endpoint())
        plain.close()


class TestTcpTransportOfADevice(HostTransportConformance):
    """The memory is on the host, but only work on the stand-in's streams may touch it."""

    staging_len = 8 << 20
    options = TransportOptions()

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDevice]:
        # Small chunks, for small buffers; both ends must agree, and are in this process.
        monkeypatch.setattr("vllm_pd.transport.tcp.CHUNK_LEN", 512 * 1024)
        self.device_in_use = StandInDevice()
        yield self.device_in_use
        self.device_in_use.close()

    def make_with(self, options: TransportOptions) -> Transport:
        return TcpTransport(
            dataclasses.replace(options, staging_len=self.staging_len),
            open_device=lambda _: self.device_in_use,
        )

    def locate(self, region: KVRegion) -> KVRegion:
        memory = (ctypes.c_uint8 * (region.num_blocks * region.block_len)).from_address(region.addr)
        tensor = torch.frombuffer(memory, dtype=torch.uint8).view(
            region.num_blocks, region.num_rows, region.num_heads, -1
        )
        return dataclasses.replace(
            region, addr=NOWHERE, device="stand-in", tensor=self.device_in_use.place(tensor)
        )

    def test_mode_is_staged(self, pair: Pair) -> None:
        assert pair[0].transport.mode == ("staged", "")


class TestTcpTransportOfADeviceWithFewBuffers(TestTcpTransportOfADevice):
    """Two buffers for each direction."""

    staging_len = 4 * (2 << 20)

    @pytest.fixture(autouse=True)
    def long_chunks(self, device: StandInDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vllm_pd.transport.tcp.CHUNK_LEN", 2 << 20)


class TestTcpTransportOfADeviceOverTls(TestTcpTransportOfADevice):
    def make_with(self, options: TransportOptions) -> Transport:
        return super().make_with(with_certificate(options))

    def test_mode_is_staged(self, pair: Pair) -> None:
        assert pair[0].transport.mode == ("staged+tls", "")
