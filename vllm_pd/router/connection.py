"""One HTTP/1.1 connection to an instance: a request out, an answer in, then the next.

A general client spends more time per request on what the router never needs (cookies,
redirects, tracing, URL normalisation) than the router does on all the rest.

An answer is complete only when its framing says so: a body that is cut off, longer than
announced or no HTTP at all is an error, never a short answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import httptools
from multidict import CIMultiDict

from vllm_pd.errors import LocalProtocolError

MAX_HEAD_LEN = 64 * 1024
HIGH_WATER_LEN = 64 * 1024
"""Bytes of a stream that wait for a slow client before the instance has to wait, too."""

_JOIN_LEN = 16 * 1024
"""Bytes of the longest body that is copied behind its head: one buffer is sent sooner than two."""

MAX_ANSWER_LEN = 256 * 2**20
"""Bytes of the longest answer that is read as a whole.

An answer with every logprob that vLLM gives, or with many embeddings, has tens of mebibytes. What
has more is no answer to one request, and an instance that sends for ever must not take the
router's memory.
"""

_NO_BODY = (204, 304)


class BrokenAnswerError(OSError):
    """An instance closed the connection too early, or did not speak HTTP."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How long an exchange waits for an instance.

    Attributes:
        seconds: how long.
        is_total: whether that is for the whole answer; if not, for every part of it.
    """

    seconds: float
    is_total: bool = False

    @property
    def complaint(self) -> str:
        """What it means to exceed it."""
        if self.is_total:
            return f"no answer within {self.seconds:g} s"
        return f"silent for {self.seconds:g} s"


class Connection(asyncio.Protocol):
    """A connection that serves one exchange at a time; made by ``loop.create_connection``.

    An exchange is ``send``, ``head`` and then ``read`` until it returns nothing.

    Attributes:
        status: HTTP status of the answer.
        headers: HTTP headers of the answer, as they came.
        touched: whether any byte of the answer has come.
        idle_since: loop time of the end of the last exchange, for the owner's use.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._closed = False
        self._in_exchange = False
        self._reset()
        self.idle_since = 0.0

    def _reset(self) -> None:
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.touched = False
        self._error: BaseException | None = None
        self._chunks: list[bytes] = []
        self._buffered_len = 0
        self._head_len = 0
        self._has_head = False
        self._is_framed = False
        self._is_complete = False
        self._is_whole = False
        self._is_paused = False
        self._keep_alive = False

    @property
    def is_reusable(self) -> bool:
        """Whether the exchange is over and the instance expects another."""
        return (
            self._is_complete
            and self._keep_alive
            and not self._closed
            and not self._is_paused  # nobody has read all of it
            and not self._transport.get_write_buffer_size()  # answered before it was asked
        )

    @property
    def is_closed(self) -> bool:
        """Whether it can carry nothing any more."""
        return self._closed

    def send(self, head: bytes, body: bytes | None, limit: Limit | None) -> None:
        """Begin an exchange.

        Args:
            head: request line and headers, with the empty line.
            body: what follows it.
            limit: how long to wait for the instance; None: for ever.
        """
        self._reset()
        self._limit = limit
        self._in_exchange = True
        if self._closed:
            self._error = BrokenAnswerError("the connection was closed")
            return
        if body is None or len(body) <= _JOIN_LEN:
            self._transport.write(head + body if body else head)
        else:
            self._transport.writelines([head, body])
        if limit is not None:
            self._since = self._loop.time()
            self._look_at(self._since + limit.seconds)

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            BrokenAnswerError: the instance broke off, or does not speak HTTP.
            TimeoutError: it was silent for too long.
        """
        while not self._has_head:
            await self._wait()

    async def read(self) -> bytes:
        """Return the next bytes of the body as they come; ``b""`` at its end.

        Raises:
            BrokenAnswerError: the instance broke off; all that came was returned before.
            TimeoutError: it was silent for too long.
        """
        while not self._chunks:
            if self._is_complete and self._error is None:
                return b""
            await self._wait()
        return self._take()

    async def read_all(self, max_len: int = MAX_ANSWER_LEN) -> bytes:
        """Return the rest of the body, of at most ``max_len`` bytes.

        Raises:
            BrokenAnswerError: the instance broke off, or sent more.
            TimeoutError: it was silent for too long.
        """
        self._is_whole = True
        self._resume()
        while not self._is_complete or self._error is not None:
            self._check_len(max_len)
            await self._wait()
        self._check_len(max_len)
        return self._take()

    def finish(self) -> None:
        """End the exchange; if the answer is not complete, the connection is gone with it."""
        self._in_exchange = False
        # Once raised, it leads to the frames that sent the request, and those lead back here:
        # their bodies would wait for the garbage collector.
        self._error = None
        if not self.is_reusable:
            self.close()

    def close(self) -> None:
        """Close at once."""
        if not self._closed:
            self._closed = True
            self._transport.abort()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer."""
        if not self._in_exchange or self._is_complete:
            # Nothing was asked: the answer before was longer than it said.
            self.close()
            return
        self.touched = True
        if self._limit is not None and not self._limit.is_total:
            self._since = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(BrokenAnswerError(f"the answer is not HTTP: {exc.__context__ or exc}"))
            return
        if not self._has_head:
            self._head_len += len(data)
            if self._head_len > MAX_HEAD_LEN:
                self._fail(BrokenAnswerError(f"headers of more than {MAX_HEAD_LEN} bytes"))
        elif self._buffered_len > HIGH_WATER_LEN and not (self._is_whole or self._is_paused):
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer, if this is how it ends; else it is broken."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        # It refers back to this connection: with it, what nobody has read of an answer would
        # wait for the garbage collector.
        del self._parser
        if not self._in_exchange or self._is_complete:
            return
        if exc is None and self._has_head and not self._is_framed:
            self._is_complete = True
            self._wake()
            return
        cause = "closed" if exc is None else f"lost: {exc}"
        where = "in the answer" if self.touched else "before the answer"
        self._fail(BrokenAnswerError(f"connection {cause} {where}"))

    # What the parser calls.

    def on_message_begin(self) -> None:
        """Refuse what follows a complete answer."""
        if self._is_complete:
            raise BrokenAnswerError("more bytes than announced")
        self.headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        # As aiohttp reads the client's: any byte survives the way through a str.
        text = value.decode("utf-8", "surrogateescape")
        self.headers.add(name.decode("utf-8", "surrogateescape"), text)

    def on_headers_complete(self) -> None:
        """Note status and framing."""
        self.status = self._parser.get_status_code()
        if self.status < 200:  # informational: the answer follows
            return
        self._has_head = True
        self._keep_alive = self._parser.should_keep_alive()
        encoding = self.headers.get("Transfer-Encoding", "")
        self._is_framed = (
            encoding.lower().endswith("chunked")
            or ("Content-Length" in self.headers and not encoding)
            or self.status in _NO_BODY
        )

    def on_body(self, data: bytes) -> None:
        """Keep bytes of the body."""
        self._chunks.append(data)
        self._buffered_len += len(data)

    def on_message_complete(self) -> None:
        """Note the end."""
        self._is_complete = self._has_head

    def _take(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        self._buffered_len = 0
        self._resume()
        return data

    def _check_len(self, max_len: int) -> None:
        if self._buffered_len > max_len:
            self.close()
            raise BrokenAnswerError(f"an answer of more than {max_len} bytes")

    def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._since = self._loop.time()
            if not self._closed:
                self._transport.resume_reading()

    async def _wait(self) -> None:
        """Wait until something has changed.

        Raises:
            OSError: nothing will any more.
        """
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:  # closing must not hide why
            self._error = error
        self.close()
        self._wake()

    def _look_at(self, due: float) -> None:
        # One timer for many exchanges, and not one for each, or for each chunk: it stays when
        # an exchange ends, and finds out when it would be due.
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_at(due, self._check_time)

    def _check_time(self) -> None:
        self._timer = None
        limit = self._limit
        if limit is None or not self._in_exchange or self._is_complete:
            return
        now = self._loop.time()
        due = (now if self._is_paused else self._since) + limit.seconds
        if due > now:
            self._look_at(due)
        else:
            self._fail(TimeoutError(limit.complaint))


def request_head(
    method: str, target: str, host: str, fields: Mapping[str, str], body_len: int | None = None
) -> bytes:
    """Return request line and headers, with the empty line.

    Args:
        method: HTTP method.
        target: path and query.
        host: the Host header.
        fields: the other headers, without the body's length.
        body_len: length of the body in bytes; None: there is none.

    Raises:
        LocalProtocolError: something in it would end a line.
    """
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    if body_len is not None:
        lines.append(f"Content-Length: {body_len}")
    head = "\r\n".join([*lines, "", ""])
    if not head.count("\r") == head.count("\n") == len(lines) + 1:
        raise LocalProtocolError("a header has a line break in it")
    return head.encode("utf-8", "surrogateescape")
