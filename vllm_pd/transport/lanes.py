"""One direction of staging: its queue, its buffers, its stream and its thread.

The thread issues the work of as many chunks as it has buffers and then sleeps in
the event of the oldest, so that the device has the next chunk to work on while the
transport sends or receives another.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_pd.errors import LocalProtocolError
from vllm_pd.transport.base import Heads
from vllm_pd.transport.chunks import Chunk
from vllm_pd.transport.device import DeviceInterface, Event, Mark, Stream
from vllm_pd.transport.threads import name_this_thread

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 30.0


class StageKind(enum.Enum):
    """Which way the bytes go."""

    GATHER = "gather"  # device to host, to be sent
    SCATTER = "scatter"  # host to device, after they were received


@dataclass(frozen=True, slots=True, eq=False)
class StagingBuffer:
    """Pinned host memory, the device memory behind it, and room for row numbers.

    Attributes:
        view: the bytes on the host, as many as a buffer holds. The memory lives as
            long as any view of it.
        kind: what this buffer is for.
        host: the same bytes as a tensor.
        device: as many bytes on the device.
        host_index: row numbers, pinned.
        device_index: row numbers on the device.
    """

    view: memoryview
    kind: StageKind
    host: torch.Tensor
    device: torch.Tensor
    host_index: torch.Tensor
    device_index: torch.Tensor


@dataclass(frozen=True, slots=True)
class Staged:
    """One ``gather`` or ``scatter`` that is over.

    Attributes:
        key: as given.
        kind: what it was.
        buffer: after a gather that succeeded, the bytes from ``view[0]`` on; the
            caller's until it calls ``release``. Otherwise None.
        error: one line, or None on success. After a scatter with an error the
            blocks may have been written in part; they are no longer being written.
    """

    key: Hashable
    kind: StageKind
    buffer: StagingBuffer | None
    error: str | None


@dataclass(slots=True, eq=False)
class Job:
    """One ``gather`` or ``scatter``; a gather is given its buffer when it is issued."""

    key: Hashable
    chunk: Chunk
    block_ids: Sequence[int]
    heads: Heads | None
    buffer: StagingBuffer | None = None
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A job that was issued, or could not be."""

    job: Job
    buffer: StagingBuffer
    event: Event | None
    error: str | None


class Lane:
    """One direction: its queue, its buffers, its stream and the thread that issues.

    A buffer is free, lent to the caller, with a queued scatter, or under way. Any
    thread may call any method.

    Args:
        kind: the direction.
        device: where the work runs.
        buffers: the lane's own.
        mark: what the first work runs after.
        plan: returns what to run on the stream for a job and its buffer.
        report: called by the lane's thread for every job that ended.
    """

    def __init__(
        self,
        kind: StageKind,
        device: DeviceInterface,
        buffers: Sequence[StagingBuffer],
        mark: Mark,
        *,
        plan: Callable[[Job, StagingBuffer], Callable[[], None]],
        report: Callable[[Staged], None],
    ) -> None:
        self._kind = kind
        self._device = device
        self._free = list(buffers)
        self._lent: set[StagingBuffer] = set()
        self._mark = mark
        self._plan = plan
        self._report = report
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._is_short = False  # acquire() found nothing
        self._is_closed = False
        self._stream: Stream | None = None
        self._waited: Mark | None = None
        self._thread = threading.Thread(target=self._run, name=f"stage-{kind.value}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def fence(self, mark: Mark) -> None:
        """Run the jobs that are put from now on after ``mark``."""
        with self._changed:
            self._mark = mark

    def put(self, job: Job) -> None:
        """Queue a job, see ``Stager.gather`` and ``Stager.scatter``."""
        with self._changed:
            if self._is_closed:
                raise LocalProtocolError("the stager is closed")
            if job.buffer is not None:
                self._take_back(job.buffer)
            job.mark = self._mark
            self._queue.append(job)
            self._changed.notify()

    def acquire(self) -> StagingBuffer | None:
        """Lend a buffer, see ``Stager.acquire``."""
        with self._changed:
            self._is_short = not self._free
            if not self._free or self._is_closed:
                return None
            buffer = self._free.pop()
            self._lent.add(buffer)
            return buffer

    def release(self, buffer: StagingBuffer) -> bool:
        """Take a lent buffer back; return whether ``acquire`` had found none."""
        with self._changed:
            if self._is_closed:
                return False
            self._take_back(buffer)
            return self._give(buffer)

    def cancel(self, match: Callable[[Hashable], bool]) -> tuple[list[Hashable], bool]:
        """Forget queued jobs; return their keys and whether ``acquire`` had found no buffer."""
        with self._changed:
            kept: deque[Job] = deque()
            forgotten: list[Hashable] = []
            has_freed = False
            for job in self._queue:
                if not match(job.key):
                    kept.append(job)
                    continue
                forgotten.append(job.key)
                if job.buffer is not None:
                    has_freed |= self._give(job.buffer)
            self._queue = kept
            return forgotten, has_freed

    def close(self) -> None:
        """Forget queued jobs and end the thread after those under way."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._free.clear()
            self._lent.clear()
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end of the thread; not for ever, as a device can hang."""
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():  # it keeps its buffers, so that the device writes no others
            logger.warning("staging: the device did not end a %s; left it", self._kind.value)

    def _take_back(self, buffer: StagingBuffer) -> None:
        if buffer not in self._lent:
            raise LocalProtocolError(f"a {buffer.kind.value} buffer that the caller does not hold")
        self._lent.remove(buffer)

    def _give(self, buffer: StagingBuffer) -> bool:
        """Free a buffer; return whether ``acquire`` had found none."""
        if not self._is_closed:
            self._free.append(buffer)
            self._changed.notify()
        was_short, self._is_short = self._is_short, False
        return was_short

    def _run(self) -> None:
        name_this_thread(self._kind.value)
        flights: deque[_Flight] = deque()
        while True:
            if issuable := self._next(may_wait=not flights):
                flights.append(self._issue(*issuable))
            elif flights:
                self._finish(flights.popleft())
            else:
                return

    def _next(self, *, may_wait: bool) -> tuple[Job, StagingBuffer] | None:
        """Return a job and its buffer; None if there is none now, or never again."""
        with self._changed:
            while not self._is_closed:
                if self._queue and (self._queue[0].buffer or self._free):
                    job = self._queue.popleft()
                    return job, job.buffer or self._free.pop()
                if not may_wait:
                    return None
                self._changed.wait()
            return None

    def _issue(self, job: Job, buffer: StagingBuffer) -> _Flight:
        try:
            if self._stream is None:
                self._device.bind_thread()
                self._stream = self._device.make_stream()
            if job.mark is not None and job.mark is not self._waited:
                self._stream.wait(job.mark)
                self._waited = job.mark
            self._stream.submit(self._plan(job, buffer))
            return _Flight(job, buffer, self._stream.record(), None)
        except Exception as exc:  # noqa: BLE001 - torch raises anything; the chunk is lost, not we
            self._settle()
            return _Flight(job, buffer, None, one_line(exc))

    def _finish(self, flight: _Flight) -> None:
        error = flight.error
        if flight.event is not None:
            try:
                flight.event.synchronize()
            except Exception as exc:  # noqa: BLE001 - likewise
                self._settle()
                error = one_line(exc)
        buffer: StagingBuffer | None = flight.buffer
        with self._changed:
            if self._kind is StageKind.SCATTER or error is not None:
                self._give(flight.buffer)
                buffer = None
            elif not self._is_closed:
                self._lent.add(flight.buffer)
        self._report(Staged(flight.job.key, self._kind, buffer, error))

    def _settle(self) -> None:
        """Wait for what may be under way of work that failed half way."""
        try:
            if self._stream is not None:
                self._stream.synchronize()
        except Exception as exc:  # noqa: BLE001 - a device that is lost has no work under way
            logger.warning("staging: the device does not answer: %s", one_line(exc))


def one_line(exc: Exception) -> str:
    """Return what went wrong; torch adds pages of advice from the second line on."""
    return (str(exc).splitlines() or [""])[0] or type(exc).__name__
