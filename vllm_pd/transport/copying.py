"""Work of the shm transport on its copier threads: copies, then digests."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from vllm_pd.errors import TransferError
from vllm_pd.transport.chunks import Move, Stack
from vllm_pd.transport.digests import digest
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.memory import view
from vllm_pd.transport.sources import Source

_MOVES_PER_TURN = 16  # between two looks whether the copy is still wanted


Spans: TypeAlias = list[tuple[int, int]]
"""``(addr, num_bytes)`` in this process."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one thread does in one go: copy, then hash what it copied.

    Attributes:
        moves: what to copy.
        hashed: what to hash then, by index of the digest.
        stack: if each move stands for several regions.
    """

    moves: list[Move]
    hashed: dict[int, Spans]
    stack: Stack | None = None

    def split(self, num_parts: int) -> list[Part]:
        """Return parts of about equal numbers of moves, without digests."""
        step = max(1, -(-len(self.moves) // num_parts))
        return [
            Part(self.moves[i : i + step], {}, self.stack) for i in range(0, len(self.moves), step)
        ]


@dataclass(slots=True, eq=False)
class CopyJob:
    """One transfer's work on the copier threads: copies, and digests.

    Only memory is touched there; the transport's own state is the session
    thread's.

    Attributes:
        posted: the transfer; busy until the job is done.
        source: what is copied from; None for work that copies nothing.
        on_done: called by the last thread.
        on_received: see ``TransportOptions``.
        parts: the work.
        hashed_last: what to hash when all parts are done, by index of the digest.
        keep: memory that the moves read.
        num_threads: how many times ``run`` is to be called.
        digests: what was hashed.
        error: why the job failed.
        verify_s: seconds spent on digests, over all threads.
    """

    posted: Posted
    source: Source | None
    on_done: Callable[[CopyJob], None]
    on_received: Callable[[memoryview], None] | None = None
    parts: list[Part] = field(default_factory=list)
    hashed_last: dict[int, Spans] = field(default_factory=dict)
    keep: list[bytearray] = field(default_factory=list)
    num_threads: int = 1
    digests: dict[int, bytes] = field(default_factory=dict)
    error: TransferError | None = None
    verify_s: float = 0.0
    _next_part: itertools.count[int] = field(default_factory=itertools.count)
    _num_ended: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_cancelled: bool = False

    def cancel(self) -> None:
        """Stop as soon as possible; the job still ends by ``on_done``."""
        self._is_cancelled = True

    def run(self) -> None:
        """Do this thread's share; never raises."""
        try:
            while (index := next(self._next_part)) < len(self.parts):
                part = self.parts[index]
                self._copy(part)
                if index == 0 and not self.hashed_last:
                    self._damage(part.moves)
                self._hash(part.hashed)
        except Exception as exc:  # noqa: BLE001 - the job must end, whatever happens
            self._fail(exc)
        with self._lock:
            self._num_ended += 1
            is_last = self._num_ended == self.num_threads
        if is_last:
            self._finish()
            self.on_done(self)

    def _finish(self) -> None:
        """Hash what could not be hashed part by part, as other threads copied it."""
        try:
            if self.error is None and self.hashed_last:
                if self.parts:
                    self._damage(self.parts[0].moves)
                self._hash(self.hashed_last)
        except Exception as exc:  # noqa: BLE001 - as above
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        self.error = exc if isinstance(exc, TransferError) else TransferError(f"copy: {exc!r}")

    def _copy(self, part: Part) -> None:
        for start in range(0, len(part.moves), _MOVES_PER_TURN):
            if self._is_cancelled:
                raise TransferError("the peer was lost during the copy")
            assert self.source is not None
            self.source.read(part.moves[start : start + _MOVES_PER_TURN], part.stack)

    def _hash(self, hashed: dict[int, Spans]) -> None:
        if not hashed:
            return
        started = time.monotonic()
        digests = {}
        for index, spans in hashed.items():
            if self._is_cancelled:
                raise TransferError("the peer was lost during the digests")
            digests[index] = digest(spans)
        with self._lock:
            self.digests |= digests
            self.verify_s += time.monotonic() - started

    def _damage(self, moves: list[Move]) -> None:
        if self.on_received is not None and moves:
            self.on_received(view(moves[0][0], moves[0][2]))
