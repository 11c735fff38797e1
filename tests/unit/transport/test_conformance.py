"""Every host transport, in every mode, against the one contract."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stand_in_device import StandInDevice
from tests.transport_conformance import MIB, HostTransportConformance, Pair
from tests.unit.transport.placing import on_device
from vllm_pd.session.keys import ClusterKey, load_cluster_key, write_cluster_key
from vllm_pd.transport.base import KVRegion, Transport, TransportOptions
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport


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
        def refuse(*_: object) -> int:
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
    """The memory is on the host, but only work on the stand-in's streams may touch it.

    There are two staging buffers for each direction, of a few blocks each.
    """

    buffer_len = 2 * MIB

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDevice]:
        # Both ends must agree on the length of chunks, and are in this process.
        monkeypatch.setattr("vllm_pd.transport.tcp.CHUNK_LEN", self.buffer_len)
        self.device_in_use = StandInDevice()
        yield self.device_in_use
        self.device_in_use.close()

    def make_with(self, options: TransportOptions) -> Transport:
        return TcpTransport(
            dataclasses.replace(options, staging_len=4 * self.buffer_len),
            open_device=lambda _: self.device_in_use,
        )

    def locate(self, region: KVRegion) -> KVRegion:
        return on_device(region, self.device_in_use)

    def test_mode_is_staged(self, pair: Pair) -> None:
        assert pair[0].transport.mode == ("staged", "")
