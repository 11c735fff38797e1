"""The access log: one line of JSON for each request.

The event loop only makes the line and keeps it in memory. A thread writes what has come
within a moment, so that neither a slow disk nor a stuck pipe holds a request up; what
it cannot write is lost, and counted.

A file is written with ``O_APPEND``, in whole lines, so that several processes can share
one. On standard output, which may be a pipe, they lock each other out for the time of a
batch, as a pipe takes no more than 4 KiB at once. Before each batch for a file the thread
looks whether it still has the file of that name, and opens it anew if it was moved away:
logrotate needs no signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import json
import logging
import os
import queue
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

_FLUSH_S = 0.1
_CLOSE_TIMEOUT_S = 5.0
_MAX_TEXT_LEN = 1024
"""Of a path or an error, which the client may have chosen."""

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
    return _printable(line) + b"\n"


class AccessLog:
    """Writes lines to a file or to standard output, as an async context.

    Args:
        target: path of the file, or ``-`` for standard output.
        lost: is called with the number of lines whenever some cannot be written; from
            any thread.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, target: str, *, lost: Callable[[int], object]) -> None:
        self._lost = lost
        self._lines: list[bytes] = []
        self._batches: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._num_taken = 0  # of lines, by the event loop
        self._num_done = 0  # of these, by the thread
        self._timer: asyncio.TimerHandle | None = None
        self._sink = _Stdout() if target == STDOUT else _File(Path(target))
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
        if not await finish(self._thread.join, timeout_s=_CLOSE_TIMEOUT_S, name="access-log-end"):
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
    """Writes lines to one descriptor, each from the beginning of a line."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._is_cut = False  # the last line that was written

    def write(self, lines: list[bytes]) -> tuple[int, OSError | None]:
        """Write lines that end with a line break; return how many are lost, and why."""
        mend = b"\n" if self._is_cut else b""
        data = memoryview(mend + b"".join(lines))
        num_written = 0
        failure = None
        while num_written < len(data) and failure is None:
            try:
                num_written += os.write(self.fd, data[num_written:])
            except OSError as exc:
                failure = exc
        written = bytes(data[:num_written])
        if written:
            self._is_cut = not written.endswith(b"\n")
        return len(lines) - written.removeprefix(mend).count(b"\n"), failure


class _Stdout:
    """Standard output, which is not ours to close."""

    def __init__(self) -> None:
        self._lines = _Lines(sys.stdout.fileno())

    def write(self, lines: list[bytes]) -> tuple[int, OSError | None]:
        with _locked(self._lines.fd):
            return self._lines.write(lines)

    def close(self) -> None:
        pass


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
    """Keep other processes that do the same away from what a descriptor is open on.

    Linux locks pipes, sockets and terminals like files. A lock that cannot be had is done
    without: lines that may mix are better than none.
    """
    with contextlib.suppress(OSError):
        fcntl.lockf(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.lockf(fd, fcntl.LOCK_UN)


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
