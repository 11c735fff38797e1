"""The access log: one line of JSON for each request.

The event loop only makes the line and keeps it in memory. A thread writes what has come
within a moment, so that neither a slow disk nor a stuck pipe holds a request up; what
it cannot write is lost, and counted.

A line is written whole or not at all, also where several processes write and one of them
gives up or is killed. A pipe, or what is like one, gets as many lines at once as it takes in
one piece. Of a file the processes lock each other out for the time of a batch, so that who
finds the disk full can take the beginning of a line back. Before each batch for a file that
was named the thread looks whether it still has the file of that name, and opens it anew if
it was moved away: logrotate needs no signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import queue
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from vllm_pd.errors import ConfigError
from vllm_pd.router.background import finish
from vllm_pd.router.metrics import CLIENT_CLOSED
from vllm_pd.router.record import Record

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)

STDOUT = "-"

MAX_PENDING = 16_384
"""Lines that may wait to be written; some hundred bytes each."""

MAX_LINE_LEN = select.PIPE_BUF
"""Bytes that a pipe takes in one piece, on Linux 4096."""

CLOSE_TIMEOUT_S = 5.0
_FLUSH_S = 0.1
_MAX_TEXT_LEN = 1024
"""Characters of a path or an error, which the client may have chosen."""

_MAX_TEXT_LEN_OF_LONG = 64
"""Likewise if the line is too long else; in JSON each may take twelve bytes."""

_FREE_TEXTS = ("path", "model", "error")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def access_line(request: web.Request, record: Record, response: web.StreamResponse | None) -> bytes:
    """Return the line of a request that is over; without a response its client has left."""
    outcome = record.outcome
    if outcome is not None:
        status = outcome.code
    else:
        status = CLIENT_CLOSED if response is None else response.status
    path = outcome.path if outcome is not None and outcome.path != "none" else None
    total_s = time.monotonic() - record.began
    arrived = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=total_s)
    line: dict[str, Any] = {
        "time": arrived,
        "request_id": record.request_id,
        "trace_id": record.span.trace_id,
        "client": request.remote,
        "api_key": record.api_key,
        "method": request.method,
        "path": request.path[:_MAX_TEXT_LEN],
        "model": record.model,
        "status": status,
        "outcome": _outcome_of(status),
        "error": record.error and record.error[:_MAX_TEXT_LEN],
        "pd_path": path,
        "prefill": record.prefill,
        "decode": record.decode,
        "retries": record.num_retries,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "queue_s": _rounded(record.queue_s),
        "prefill_s": _rounded(record.prefill_s),
        "first_bytes_s": _rounded(record.first_bytes_s),
        "total_s": _rounded(total_s),
        "request_len": record.request_len,
        "response_len": record.response_len or _body_len(response),
    }
    return _fitting(line) + b"\n"


class AccessLog:
    """Writes lines to a file or to standard output, as an async context.

    Args:
        target: path of the file, or ``-`` for standard output.
        lost: is called with the number of lines whenever some cannot be written; from
            any thread.
        close_timeout_s: longest wait for what is left to be written.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(
        self,
        target: str,
        *,
        lost: Callable[[int], object],
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self._lost = lost
        self._close_timeout_s = close_timeout_s
        self._lines: list[bytes] = []
        self._batches: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._num_taken = 0  # of lines, by the event loop
        self._num_done = 0  # of these, by the thread
        self._timer: asyncio.TimerHandle | None = None
        self._sink = _Lines(sys.stdout.fileno()) if target == STDOUT else _File(Path(target))
        self._target = target
        self._is_failing = False
        self._thread = threading.Thread(target=self._write_all, name="access-log", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Write what is left, for a few seconds at most."""
        if self._timer is not None:
            self._timer.cancel()
        self._hand_over()
        self._batches.put(None)
        if not await finish(
            self._thread.join, timeout_s=self._close_timeout_s, name="access-log-end"
        ):
            logger.error("the last lines of the access log %s are lost: it is stuck", self._target)

    def add(self, line: bytes) -> None:
        """Have a line written soon; never waits."""
        if self._num_taken - self._num_done >= MAX_PENDING:
            self._lost(1)
            return
        self._num_taken += 1
        self._lines.append(line)
        if self._timer is None:
            # A batch costs a switch between threads, which is dearer than its lines.
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self._hand_over)

    def _hand_over(self) -> None:
        self._timer = None
        if self._lines:
            self._batches.put(self._lines)
            self._lines = []

    def _write_all(self) -> None:
        while (batch := self._batches.get()) is not None:
            num_lost, failure = self._sink.write(batch)
            if failure is None:
                self._is_failing = False
            else:
                self._lost(num_lost)
                self._note_failure(failure)
            self._num_done += len(batch)
        self._sink.close()

    def _note_failure(self, exc: OSError) -> None:
        if not self._is_failing:
            self._is_failing = True
            logger.error("lines of the access log %s are lost: %s", self._target, exc)


class _Lines:
    """Writes lines to one descriptor, each whole or not at all."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._write = _write_file if stat.S_ISREG(os.fstat(fd).st_mode) else _write_pipe

    def write(self, lines: list[bytes]) -> tuple[int, OSError | None]:
        """Write lines that end with a line break; return how many are lost, and why."""
        num_written, failure = self._write(self.fd, lines)
        return len(lines) - num_written, failure

    def close(self) -> None:
        """Do nothing: standard output is not ours to close."""


def _write_pipe(fd: int, lines: list[bytes]) -> tuple[int, OSError | None]:
    """Write to what has no end that could be taken back; return how many lines, and what failed.

    A write of so few bytes waits until there is room for all of them. Whoever dies while it
    waits has written nothing, and what others write does not come in between.
    """
    num_written = 0
    too_long: OSError | None = None
    for piece in _pieces(lines):
        if len(data := b"".join(piece)) > MAX_LINE_LEN:
            too_long = OSError(errno.EMSGSIZE, f"one has more than {MAX_LINE_LEN} bytes")
            continue
        _, failure = _write_all(fd, data)
        if failure is not None:
            return num_written, failure
        num_written += len(piece)
    return num_written, too_long


def _write_file(fd: int, lines: list[bytes]) -> tuple[int, OSError | None]:
    """Append to a file; return how many lines, and what failed."""
    data = b"".join(lines)
    with _locked(fd):
        written_len, failure = _write_all(fd, data)
        if cut_len := written_len - (data.rfind(b"\n", 0, written_len) + 1):
            with contextlib.suppress(OSError):
                _take_back(fd, cut_len)
    return data.count(b"\n", 0, written_len), failure


def _take_back(fd: int, length: int) -> None:
    """Remove the last bytes that were written, if nobody has written behind them."""
    end = os.lseek(fd, 0, os.SEEK_CUR)
    if end == os.fstat(fd).st_size:
        os.ftruncate(fd, end - length)
        os.lseek(fd, end - length, os.SEEK_SET)  # goes on there also if not opened to append


def _write_all(fd: int, data: bytes) -> tuple[int, OSError | None]:
    """Write; return how many bytes, and what failed."""
    view = memoryview(data)
    num_written = 0
    while num_written < len(data):
        try:
            num_written += os.write(fd, view[num_written:])
        except OSError as exc:
            return num_written, exc
    return num_written, None


def _pieces(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines in groups that a pipe takes at once; one that is too long is alone."""
    piece: list[bytes] = []
    length = 0
    for line in lines:
        if piece and length + len(line) > MAX_LINE_LEN:
            yield piece
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if piece:
        yield piece


class _File:
    """A file that may be moved away at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._lines = _Lines(self._open())
        except OSError as exc:
            raise ConfigError(
                f"cannot write the access log {path}: {exc.strerror}",
                hint="name a file in a folder that exists, or - for standard output",
            ) from exc

    def write(self, lines: list[bytes]) -> tuple[int, OSError | None]:
        try:
            if not self._is_there():
                fd = self._open()  # if that fails, the old one stays
                self.close()
                self._lines = _Lines(fd)
        except OSError as exc:
            return len(lines), exc
        return self._lines.write(lines)

    def close(self) -> None:
        os.close(self._lines.fd)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._lines.fd))
        except FileNotFoundError:
            return False

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Keep other processes that do the same away from the file that a descriptor is of.

    A lock that cannot be had is done without: lines that may mix are better than none.
    """
    with contextlib.suppress(OSError):
        fcntl.lockf(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.lockf(fd, fcntl.LOCK_UN)


def _fitting(line: dict[str, Any]) -> bytes:
    """Return a line without its end, cut so that a pipe takes it in one piece."""
    encoded = _printable(line)
    if len(encoded) < MAX_LINE_LEN:
        return encoded
    texts = {name: (text := line[name]) and text[:_MAX_TEXT_LEN_OF_LONG] for name in _FREE_TEXTS}
    return _printable(line | texts)


def _printable(line: dict[str, Any]) -> bytes:
    """Return JSON in which no line break, control or direction mark acts on who reads it."""
    try:
        encoded = _encode(line)
        if encoded.isascii():  # almost always, and this takes a fifth of the time
            return encoded
        plain = _decode(encoded)
    except UnicodeEncodeError:  # half of a character, which JSON can only escape
        plain = line | {"time": line["time"].isoformat().replace("+00:00", "Z")}
    return json.dumps(plain, separators=(",", ":")).encode("ascii")


def _outcome_of(status: int) -> str:
    if status == CLIENT_CLOSED:
        return "client_left"
    return "ok" if status < 400 else "error"


def _rounded(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s, 6)


def _body_len(response: web.StreamResponse | None) -> int:
    """Return the bytes of an answer that is not streamed."""
    body = getattr(response, "body", None)
    return len(body) if isinstance(body, bytes) else 0
