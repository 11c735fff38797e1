from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.errors import LocalProtocolError
from vllm_pd.router.connection import (
    HIGH_WATER_LEN,
    MAX_HEAD_LEN,
    BrokenAnswerError,
    Connection,
    Limit,
    request_head,
)

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class FakeTransport:
    """Notes what a connection does with it."""

    def __init__(self) -> None:
        self.sent = b""
        self.unsent_len = 0
        self.is_reading = True
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def writelines(self, parts: list[bytes]) -> None:
        self.sent += b"".join(parts)

    def get_write_buffer_size(self) -> int:
        return self.unsent_len

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def abort(self) -> None:
        self.is_aborted = True


def connect() -> tuple[Connection, FakeTransport]:
    connection, transport = Connection(), FakeTransport()
    connection.connection_made(cast("asyncio.Transport", transport))
    return connection, transport


async def exchange(connection: Connection, limit: Limit) -> None:
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, limit)
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await connection.head()
    assert await connection.read() == b""
    connection.finish()


def ask() -> tuple[Connection, FakeTransport]:
    connection, transport = connect()
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, None)
    return connection, transport


def answer(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def read_to_the_end(connection: Connection) -> bytes:
    await connection.head()
    return await connection.read_all()


async def test_a_request_is_sent_as_it_is() -> None:
    connection, transport = connect()

    connection.send(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"{}", None)

    assert transport.sent == b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"


async def test_an_answer_has_status_headers_and_body() -> None:
    connection, _ = ask()
    connection.data_received(
        b"HTTP/1.1 404 Not Found\r\nX-A: 1\r\nx-a: \xc3\xa4\r\nContent-Length: 2\r\n\r\n{}"
    )

    assert await read_to_the_end(connection) == b"{}"
    assert connection.status == 404
    assert connection.headers.getall("X-A") == ["1", "\u00e4"]


@given(st.lists(st.integers(0, 80), max_size=8), st.booleans())
def test_any_split_of_an_answer_gives_the_same_bytes(cuts: list[int], chunked: bool) -> None:
    body = b"data: 1\n\ndata: [DONE]\n\n"
    whole = answer(body)
    if chunked:
        whole = STREAM_HEAD + chunk(body[:5]) + chunk(body[5:]) + b"0\r\n\r\n"
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]

    async def run() -> bytes:
        connection, _ = ask()
        for start, end in pairwise(edges):
            if start < end:
                connection.data_received(whole[start:end])
        return await read_to_the_end(connection)

    assert asyncio.run(run()) == body


async def test_a_connection_serves_one_exchange_after_the_other() -> None:
    connection, transport = ask()
    connection.data_received(answer(b"one"))
    assert await read_to_the_end(connection) == b"one"
    connection.finish()

    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, None)
    connection.data_received(answer(b"two"))

    assert await read_to_the_end(connection) == b"two"
    assert not transport.is_aborted


async def test_an_informational_answer_is_not_the_answer() -> None:
    connection, _ = ask()
    connection.data_received(b"HTTP/1.1 100 Continue\r\nX-A: 1\r\n\r\n" + answer(b"{}"))

    assert await read_to_the_end(connection) == b"{}"
    assert connection.status == 200
    assert "X-A" not in connection.headers


async def test_a_body_without_framing_ends_with_the_connection() -> None:
    connection, _ = ask()
    connection.data_received(b"HTTP/1.0 200 OK\r\n\r\n{}")
    connection.connection_lost(None)

    assert await read_to_the_end(connection) == b"{}"
    assert not connection.is_reusable


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}",
        STREAM_HEAD + b"2\r\n{}\r\n",
        STREAM_HEAD + b"2\r\n{}\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\n",
    ],
)
async def test_an_answer_that_is_cut_off_is_broken(start: bytes) -> None:
    connection, _ = ask()
    if start:
        connection.data_received(start)
    connection.connection_lost(None)

    with pytest.raises(BrokenAnswerError, match="connection closed"):
        await read_to_the_end(connection)


async def test_a_body_without_framing_that_a_reset_ends_is_broken() -> None:
    connection, _ = ask()
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n{}")
    connection.connection_lost(ConnectionResetError("reset by peer"))

    with pytest.raises(BrokenAnswerError, match="reset by peer"):
        await read_to_the_end(connection)


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nx",
        STREAM_HEAD + b"no length\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
async def test_what_is_not_http_is_broken(garbage: bytes) -> None:
    connection, transport = ask()
    connection.data_received(garbage)

    with pytest.raises(BrokenAnswerError, match="not HTTP"):
        await read_to_the_end(connection)
    assert transport.is_aborted


async def test_more_bytes_than_announced_are_broken() -> None:
    connection, _ = ask()
    connection.data_received(answer(b"{}") + answer(b"{}"))

    with pytest.raises(BrokenAnswerError, match="more bytes than announced"):
        await read_to_the_end(connection)


async def test_bytes_that_nobody_asked_for_close_the_connection() -> None:
    connection, transport = ask()
    connection.data_received(answer(b"{}"))
    assert await read_to_the_end(connection) == b"{}"
    connection.finish()

    connection.data_received(b"more")

    assert transport.is_aborted
    assert connection.is_closed


async def test_headers_without_an_end_are_broken() -> None:
    connection, _ = ask()
    connection.data_received(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * MAX_HEAD_LEN)

    with pytest.raises(BrokenAnswerError, match="headers of more than"):
        await connection.head()


async def test_what_came_before_a_break_is_returned_first() -> None:
    connection, _ = ask()
    connection.data_received(STREAM_HEAD + chunk(b"data: 1\n\n"))
    connection.connection_lost(None)

    assert await connection.read() == b"data: 1\n\n"
    with pytest.raises(BrokenAnswerError):
        await connection.read()


async def test_chunks_that_came_meanwhile_are_read_at_once() -> None:
    connection, _ = ask()
    connection.data_received(STREAM_HEAD + chunk(b"a"))
    connection.data_received(chunk(b"b") + chunk(b"c"))
    connection.data_received(b"0\r\n\r\n")

    assert await connection.read() == b"abc"
    assert await connection.read() == b""


async def test_a_stream_that_nobody_reads_is_held_back() -> None:
    connection, transport = ask()
    connection.data_received(STREAM_HEAD + chunk(b"x" * (HIGH_WATER_LEN + 1)))
    assert not transport.is_reading

    await connection.read()

    assert transport.is_reading


async def test_a_whole_body_is_not_held_back() -> None:
    connection, transport = ask()
    body = b"x" * (HIGH_WATER_LEN + 1)
    connection.data_received(answer(body + b"end").removesuffix(b"end"))
    await connection.head()

    reading = asyncio.create_task(connection.read_all())
    await asyncio.sleep(0)  # let it begin
    assert transport.is_reading
    connection.data_received(b"end")

    assert await reading == body + b"end"


async def test_a_whole_body_at_the_limit_is_read() -> None:
    connection, _ = ask()
    connection.data_received(answer(b"four"))
    await connection.head()

    assert await connection.read_all(max_len=4) == b"four"


@pytest.mark.parametrize("whole", [answer(b"fives"), STREAM_HEAD + chunk(b"fives")])
async def test_a_whole_body_beyond_the_limit_is_broken(whole: bytes) -> None:
    connection, transport = ask()
    connection.data_received(whole)
    await connection.head()

    with pytest.raises(BrokenAnswerError, match="more than 4 bytes"):
        await connection.read_all(max_len=4)
    assert transport.is_aborted


async def test_a_stream_that_is_given_up_while_held_back_costs_the_connection() -> None:
    connection, transport = ask()
    connection.data_received(STREAM_HEAD + chunk(b"x" * (HIGH_WATER_LEN + 1)) + b"0\r\n\r\n")

    connection.finish()

    assert transport.is_aborted


async def test_silence_is_a_timeout() -> None:
    connection, transport = connect()
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, Limit(0.01))

    with pytest.raises(TimeoutError, match=r"silent for 0\.01 s"):
        await connection.head()
    assert transport.is_aborted


async def test_a_limit_of_the_whole_answer_does_not_move_with_its_parts() -> None:
    connection, transport = connect()
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, Limit(0.01, is_total=True))
    connection.data_received(STREAM_HEAD)

    while not transport.is_aborted:
        connection.data_received(chunk(b"x"))
        assert await connection.read() == b"x"
        await asyncio.sleep(0)

    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        await connection.read()


async def test_a_short_limit_counts_after_a_long_one() -> None:
    connection, _ = connect()
    await exchange(connection, Limit(60.0))
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, Limit(0.01))

    with pytest.raises(TimeoutError):
        await connection.head()


async def test_a_limit_does_not_outlive_its_exchange() -> None:
    connection, transport = connect()
    await exchange(connection, Limit(0.01))
    await exchange(connection, Limit(0.01))
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, Limit(60.0))

    await asyncio.sleep(0.03)  # three times as long as the first two could take

    assert not transport.is_aborted


@pytest.mark.parametrize("body", [None, b"", b"{}", bytes(2**20)])
async def test_a_body_follows_its_head(body: bytes | None) -> None:
    connection, transport = connect()

    connection.send(b"POST / HTTP/1.1\r\n\r\n", body, None)

    assert transport.sent == b"POST / HTTP/1.1\r\n\r\n" + (body or b"")


async def test_an_instance_that_is_held_back_is_not_silent() -> None:
    connection, transport = connect()
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, Limit(0.01))
    connection.data_received(STREAM_HEAD + chunk(b"x" * (HIGH_WATER_LEN + 1)))

    await asyncio.sleep(0.03)  # three times as long as it may be silent

    assert not transport.is_aborted
    connection.finish()


@pytest.mark.parametrize("headers", [("Connection: close",), ()])
async def test_an_instance_can_end_the_keep_alive(headers: tuple[str, ...]) -> None:
    connection, transport = ask()
    connection.data_received(answer(b"{}", *headers))
    await read_to_the_end(connection)

    connection.finish()

    assert transport.is_aborted == bool(headers)


async def test_an_answer_that_is_not_complete_costs_the_connection() -> None:
    connection, transport = ask()
    connection.data_received(STREAM_HEAD + chunk(b"a"))

    connection.finish()

    assert transport.is_aborted


async def test_an_answer_to_half_a_request_costs_the_connection() -> None:
    connection, transport = ask()
    transport.unsent_len = 1
    connection.data_received(answer(b"{}"))

    connection.finish()

    assert transport.is_aborted


async def test_nothing_can_be_asked_on_a_closed_connection() -> None:
    connection, _ = connect()
    connection.connection_lost(None)
    connection.send(b"GET / HTTP/1.1\r\n\r\n", None, None)

    with pytest.raises(BrokenAnswerError):
        await connection.head()


def test_a_request_head_tells_how_long_the_body_is() -> None:
    assert request_head("POST", "/", "host", {}, 12).endswith(b"\r\nContent-Length: 12\r\n\r\n")


def test_a_request_head_names_host_and_headers() -> None:
    head = request_head("POST", "/v1?a=b", "host:1", {"X-A": "\u00e4"})

    assert head == "POST /v1?a=b HTTP/1.1\r\nHost: host:1\r\nX-A: \u00e4\r\n\r\n".encode()


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\rb"])
def test_a_header_cannot_begin_another(value: str) -> None:
    with pytest.raises(LocalProtocolError):
        request_head("GET", "/", "host", {"X-A": value})
