"""Work of the shm transport on its copier threads: copies, then digests."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_pd.errors import DigestMismatchError, TransferError
from vllm_pd.transport.chunks import Move
from vllm_pd.transport.digests import digest
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.memory import view
from vllm_pd.transport.sources import Source

_MOVES_PER_TURN = 64  # between two looks whether the copy is still wanted


@dataclass(frozen=True, slots=True)
class Check:
    """Bytes here, and the digest that they must have."""

    spans: list[tuple[int, int]]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Part:
    """What one thread does in one go: copy, then verify what it copied."""

    moves: list[Move]
    checks: list[Check]

    def split(self, num_parts: int) -> list[Part]:
        """Return parts of about equal numbers of moves, without checks."""
        step = max(1, -(-len(self.moves) // num_parts))
        return [Part(self.moves[i : i + step], []) for i in range(0, len(self.moves), step)]


@dataclass(slots=True, eq=False)
class CopyJob:
    """One transfer's work on the copier threads.

    Only memory is touched there; the transport's own state is the session
    thread's.

    Attributes:
        posted: the transfer; busy until the job is done.
        source: what is copied from; None for work that copies nothing.
        then: for the session thread, when the job is done well.
        on_done: called by the last thread.
        on_received: see ``TransportOptions``.
        parts: the work.
        checks: digests to compare when all parts are done.
        keep: memory that the moves read.
        num_threads: how many times ``run`` is to be called.
        error: why the job failed.
        verify_s: seconds spent on digests, over all threads.
    """

    posted: Posted
    source: Source | None
    then: Callable[[], None]
    on_done: Callable[[CopyJob], None]
    on_received: Callable[[memoryview], None] | None = None
    parts: list[Part] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    keep: list[bytearray] = field(default_factory=list)
    num_threads: int = 1
    error: TransferError | None = None
    verify_s: float = 0.0
    _compute: Callable[[], None] | None = None
    _next_part: itertools.count[int] = field(default_factory=itertools.count)
    _num_ended: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_cancelled: bool = False

    @classmethod
    def of_one(
        cls,
        posted: Posted,
        compute: Callable[[], None],
        then: Callable[[], None],
        on_done: Callable[[CopyJob], None],
    ) -> CopyJob:
        """Make a job that only computes the digests of a transfer."""
        job = cls(posted, None, then, on_done)
        job._compute = compute
        return job

    def cancel(self) -> None:
        """Stop as soon as possible; the job still ends by ``on_done``."""
        self._is_cancelled = True

    def run(self) -> None:
        """Do this thread's share; never raises."""
        try:
            self._work()
        except TransferError as exc:
            self.error = exc
        except Exception as exc:  # noqa: BLE001 - the job must end, whatever happens
            self.error = TransferError(f"copy failed: {exc!r}")
        with self._lock:
            self._num_ended += 1
            is_last = self._num_ended == self.num_threads
        if is_last:
            self._finish()
            self.on_done(self)

    def _work(self) -> None:
        if self._compute is not None:
            started = time.monotonic()
            self._compute()
            self.verify_s = time.monotonic() - started
            return
        while (index := next(self._next_part)) < len(self.parts):
            part = self.parts[index]
            self._copy(part.moves)
            if part.checks:
                if index == 0:
                    self._damage(part.moves)
                self._verify(part.checks)

    def _copy(self, moves: list[Move]) -> None:
        assert self.source is not None
        for start in range(0, len(moves), _MOVES_PER_TURN):
            if self._is_cancelled:
                raise TransferError("the peer was lost during the copy")
            self.source.read(moves[start : start + _MOVES_PER_TURN])

    def _finish(self) -> None:
        """Verify what could not be verified part by part."""
        if self.error is not None or self.source is None:
            return
        try:
            if not any(part.checks for part in self.parts):
                self._damage(self.parts[0].moves)
            self._verify(self.checks)
        except DigestMismatchError as exc:
            self.error = exc
        except Exception as exc:  # noqa: BLE001 - as above
            self.error = TransferError(f"digests failed: {exc!r}")

    def _verify(self, checks: list[Check]) -> None:
        if not checks:
            return
        started = time.monotonic()
        is_wrong = any(digest(check.spans) != check.digest for check in checks)
        with self._lock:
            self.verify_s += time.monotonic() - started
        if is_wrong:
            raise DigestMismatchError(
                f"transfer {self.posted.transfer_id}: the bytes copied are not those sent"
            )

    def _damage(self, moves: list[Move]) -> None:
        if self.on_received is not None and moves:
            self.on_received(view(moves[0][0], moves[0][2]))
