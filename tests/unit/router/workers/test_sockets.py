from __future__ import annotations

import socket
from contextlib import closing

import pytest

from tests.ports import free_ports
from vllm_pd.errors import ConfigError
from vllm_pd.router.workers.sockets import SharedPort


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_several_sockets_listen_on_the_port() -> None:
    (port,) = free_ports(1)
    with closing(SharedPort("127.0.0.1", port)) as shared:
        sockets = [one for _ in range(2) for one in shared.bind()]
        assert not can_connect(port)
        for one in sockets:
            one.listen()
        assert can_connect(port)
        sockets[0].close()
        assert can_connect(port)
        sockets[1].close()
        assert not can_connect(port)


@pytest.mark.parametrize("listening", [True, False])
def test_nobody_else_gets_the_port(listening: bool) -> None:
    (port,) = free_ports(1)
    with closing(SharedPort("127.0.0.1", port)) as shared:
        sockets = shared.bind()
        for one in sockets if listening else []:
            one.listen()
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is already in use"):
            SharedPort("127.0.0.1", port)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
        for one in sockets:
            one.close()


def test_an_address_that_is_not_of_this_host_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        SharedPort("192.0.2.1", free_ports(1)[0])
