"""What this host's network looks like."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vllm_pd.errors import ConfigError
from vllm_pd.launcher.network import interface_of, resolve, used_ports


def test_port_that_somebody_listens_on_is_used() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert listener.getsockname()[1] in used_ports()


def test_loopback_has_an_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"


def test_name_is_resolved_to_an_address_that_an_interface_has() -> None:
    assert interface_of(resolve("localhost")) == "lo"


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_address_is_its_own(address: str) -> None:
    assert resolve(address) == address


def test_host_without_an_address_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^side_channel_host aa.* has no address") as info:
        resolve("a" * 70 + ".example")  # a label that is too long, so nobody is asked
    assert len(str(info.value).splitlines()) == 1


def test_address_of_another_host_has_none() -> None:
    assert interface_of("192.0.2.1") == ""


def test_kernel_that_tells_nothing_has_no_used_ports(tmp_path: Path) -> None:
    assert used_ports(tmp_path) == frozenset()
