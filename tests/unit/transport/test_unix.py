"""Sockets between processes of one user."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from vllm_pd.transport import unix
from vllm_pd.transport.memory import address_of


@pytest.fixture
def listener() -> Iterator[tuple[socket.socket, str]]:
    sock, name = unix.listen()
    with sock:
        yield sock, name


def test_listener_is_found_by_its_name_and_tells_who_connects(
    listener: tuple[socket.socket, str],
) -> None:
    sock, name = listener
    with unix.connect(name) as client, sock.accept()[0] as server:
        unix.check_same_user(server)
        assert unix.pid_of_peer(server) == unix.pid_of_peer(client) == os.getpid()
        assert not client.getblocking()


def test_name_is_no_file_and_each_is_another(listener: tuple[socket.socket, str]) -> None:
    with unix.listen()[0] as other:
        assert other.getsockname() != listener[0].getsockname()
        assert other.getsockname()[:1] == b"\0"


def test_name_that_nobody_listens_to_is_refused() -> None:
    with pytest.raises(ConnectionRefusedError):
        unix.connect("vllm-pd-nobody")


def test_another_user_is_refused(
    listener: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(PermissionError, match=f"user id {uid}"):
        unix.connect(listener[1])


def test_scope_is_the_same_for_all_of_one_kernel_and_user() -> None:
    assert unix.scope() == unix.scope()
    assert unix.scope().endswith(f":{os.getuid()}")


def test_memory_of_a_process_is_readable_where_it_is_mapped() -> None:
    byte = bytearray(b"x")
    unix.check_readable(os.getpid(), address_of(byte))
    with pytest.raises(OSError, match=os.strerror(14)):  # EFAULT
        unix.check_readable(os.getpid(), 0)
