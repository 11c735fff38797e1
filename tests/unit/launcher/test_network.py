"""What this host's network looks like."""

from __future__ import annotations

import socket
from pathlib import Path

from vllm_pd.launcher.network import interface_of, used_ports


def test_port_that_somebody_listens_on_is_used() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert listener.getsockname()[1] in used_ports()


def test_loopback_has_an_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"


def test_address_of_another_host_has_none() -> None:
    assert interface_of("192.0.2.1") == ""


def test_kernel_that_tells_nothing_has_no_used_ports(tmp_path: Path) -> None:
    assert used_ports(tmp_path) == frozenset()
