from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.unit.launcher.bench import free_port
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.ports import check_ports, http_url


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_free_ports_pass() -> None:
    check_ports([("router", "127.0.0.1", free_port())])


def test_a_port_in_use_is_named_with_its_owner_to_be(used_port: int) -> None:
    with pytest.raises(ConfigError, match=rf"port {used_port} \(prefill-0\) is in use"):
        check_ports([("prefill-0", "127.0.0.1", used_port)])


def test_a_port_wanted_twice_is_refused() -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"port {port} is wanted by prefill-0 and by router"):
        check_ports([("prefill-0", "127.0.0.1", port), ("router", "127.0.0.1", port)])


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=rf"port {port} \(router\) is not between"):
        check_ports([("router", "127.0.0.1", port)])


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be bound on 192\.0\.2\.1"):
        check_ports([("router", "192.0.2.1", free_port())])


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
    ],
)
def test_a_server_is_reached_at_an_address_of_this_machine(host: str, url: str) -> None:
    assert http_url(host, 80) == url
