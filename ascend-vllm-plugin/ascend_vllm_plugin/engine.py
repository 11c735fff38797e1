"""Work on the device, all of it issued by the thread that computes.

HCCL 9.1 wants the operations of all communicators of a device issued serially, and the
model's own are issued by the engine's thread, or by torch_npu's queue behind it. So
jobs wait until that thread calls ``pump`` between two steps. It issues them, which
takes no longer than queueing does, and looks which of the earlier ones are over. It
never waits for the device.

What the device does not end in time is given up: its stream is aborted, so that nothing
behind it touches the KV cache any more, and its memory stays with it for good.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from ascend_vllm_plugin.backend import EngineDevice, EngineEvent, HcclError
from vllm_pd.transport.lanes import one_line

logger = logging.getLogger(__name__)

OVERDUE_S = 5.0
"""Grace after the execution timeout, in which HCCL itself should have ended an operation."""

_CLOSE_TIMEOUT_S = 5.0
_CLOSE_PAUSE_S = 0.001


class NotYetError(Exception):
    """A job cannot be issued in this step; it is tried again in the next one."""


class Job(ABC):
    """Something to issue.

    Attributes:
        on_done: called by the session's thread with an error, in one line, or None.
        must_run: whether a peer counts on it, so that it is issued even if nobody here
            wants it any more.
        is_dropped: nobody here wants it any more; set before it is issued, or never.
        is_left: it was given up under way: the device may still know its memory.
        unseen_s: once it is done: for how long at most nobody had looked whether it was.
    """

    must_run = False

    def __init__(self, on_done: Callable[[str | None], None]) -> None:
        self.on_done = on_done
        self.is_dropped = False
        self.is_left = False
        self.unseen_s = 0.0

    @abstractmethod
    def issue(self) -> EngineEvent | None:
        """Issue the work; return an event behind it, or None if there was none.

        Raises:
            NotYetError: it cannot be issued now.
            Exception: it could not be issued, or in part only; see ``settle_event``.
        """

    def settle_event(self) -> EngineEvent | None:
        """Return an event behind what ``issue`` issued before it failed."""
        return None

    @property
    def is_lost(self) -> bool:
        """Whether its stream was given up."""
        return False

    @abstractmethod
    def give_up(self) -> None:
        """Let the device do nothing more for what was issued; see ``is_lost`` then.

        Raises:
            RuntimeError: this cannot be made sure.
        """

    def spoil(self) -> None:  # noqa: B027 - most jobs have no stream to lose
        """Take note that its work failed on the device: its stream is not to be used again."""

    def check(self, elapsed_s: float) -> None:  # noqa: B027 - most jobs need no check
        """Look whether the work that is over did what it should.

        Args:
            elapsed_s: since it was issued.

        Raises:
            HcclError: it did not.
        """


@dataclass(frozen=True, slots=True)
class _Flight:
    """A job that was issued.

    Attributes:
        job: which.
        event: behind its work.
        issued: when, of ``time.monotonic``.
        error: why it has failed already.
        is_stuck: it was to be given up, and could not be.
    """

    job: Job
    event: EngineEvent
    issued: float
    error: str | None
    is_stuck: bool = False


class Engine:
    """Jobs, from the session's thread to the engine's and back.

    Args:
        device: where they run.
        wake: called when ``take_done`` has something; on any thread.
        limit_s: longest time from the issue of a job to its end, in seconds.
        clock: in seconds.
    """

    def __init__(
        self,
        device: EngineDevice,
        wake: Callable[[], None],
        *,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._wake = wake
        self._limit_s = limit_s
        self._clock = clock
        self._looked = clock()
        self._lost: list[Job] = []  # kept, with the memory that the device may still know
        self._mutex = threading.Lock()  # of the queue; held for moments only
        self._running = threading.Lock()  # held by whoever works with the device
        self._queue: deque[Job] = deque()
        self._flights: list[_Flight] = []
        self._done: deque[tuple[Job, str | None]] = deque()
        self._bound: int | None = None
        self._is_closed = False

    @property
    def has_work(self) -> bool:
        """Whether ``pump`` has something to do."""
        return bool(self._queue or self._flights)

    # The session's thread

    def put(self, job: Job) -> None:
        """Queue a job; it ends as one call of ``on_done`` by ``take_done``."""
        with self._mutex:
            self._queue.append(job)

    def withdraw(self, job: Job) -> bool:
        """Drop a job that nobody here wants; return whether it will touch no blocks.

        A job that must run stays, without touching blocks, and still ends with
        ``on_done``; another one that was not issued is forgotten. Work under way ends.
        """
        with self._mutex:
            if job not in self._queue:
                return False
            job.is_dropped = True
            if not job.must_run:
                self._queue.remove(job)
            return True

    def take_done(self) -> None:
        """Call ``on_done`` of the jobs that ended since the last call."""
        while self._done:
            job, error = self._done.popleft()
            job.on_done(error)

    def close(self) -> None:
        """Forget what no peer counts on, and wait for the rest; not for ever. Idempotent.

        The engine's thread may be in ``pump``, but must not wait for anything there that
        only the caller can give.
        """
        with self._mutex:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue = deque(job for job in self._queue if job.must_run)
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        with self._running:
            while self.has_work and time.monotonic() < deadline:
                self._step()
                if self.has_work:
                    time.sleep(_CLOSE_PAUSE_S)
            if self._flights:
                logger.warning("hccl: %d operations did not end; left them", len(self._flights))

    # The engine's thread

    def pump(self) -> bool:
        """Issue what waits, and look at what is under way; return whether something ended."""
        if not self.has_work:
            return False
        with self._running:
            if not self._is_closed:
                self._step()
        if has_ended := bool(self._done):
            self._wake()
        return has_ended

    def _step(self) -> None:
        self._bind()
        self._land()
        with self._mutex:
            jobs = list(self._queue)
        for job in jobs:
            self._start(job)

    def _start(self, job: Job) -> None:
        with self._mutex:
            if job not in self._queue:
                return  # withdrawn meanwhile
            self._queue.remove(job)
        error = None
        try:
            event = job.issue()
        except NotYetError:
            with self._mutex:
                if job.must_run or not self._is_closed:
                    self._queue.append(job)
            return
        except Exception as exc:  # noqa: BLE001 - torch raises anything; a transfer is lost, not we
            error = one_line(exc)
            event = self._event_behind(job)
        if event is None:
            self._done.append((job, error))
        else:
            self._flights.append(_Flight(job, event, self._clock(), error))

    def _event_behind(self, job: Job) -> EngineEvent | None:
        try:
            return job.settle_event()
        except Exception as exc:  # noqa: BLE001 - a device that is lost has no work under way
            logger.warning("hccl: the device does not answer: %s", one_line(exc))
            return None

    def _land(self) -> None:
        """Look which jobs are over, and give up those that should be."""
        now, before = self._clock(), self._looked
        self._looked = now
        flights, self._flights = self._flights, []
        for flight in flights:
            error = flight.error
            try:
                if not flight.event.is_over:
                    self._flights.append(self._check_time(flight, now))
                    continue
                flight.event.synchronize()  # returns at once, or says that the stream failed
                flight.job.check(now - flight.issued)
            except (RuntimeError, HcclError) as exc:
                error = error or one_line(exc)
                flight.job.spoil()
            flight.job.unseen_s = now - max(before, flight.issued)
            self._done.append((flight.job, error))
        self._write_off()

    def _check_time(self, flight: _Flight, now: float) -> _Flight:
        """Give up a job that takes too long."""
        elapsed_s = now - flight.issued
        if elapsed_s < self._limit_s or flight.is_stuck or flight.job.is_lost:
            return flight
        error = f"the device did not end an operation within {elapsed_s:.0f} s"
        if obstacle := _give_up(flight.job):
            logger.error(
                "hccl: %s, and it cannot be aborted: %s; its request waits until it ends: "
                "restart this instance",
                error,
                obstacle,
            )
        else:
            logger.error("hccl: %s; its stream is aborted, and its memory not used again", error)
        return replace(flight, error=error, is_stuck=bool(obstacle))

    def _write_off(self) -> None:
        """End all jobs whose stream was given up; one of them takes the others with it."""
        for flight in [flight for flight in self._flights if flight.job.is_lost]:
            self._flights.remove(flight)
            flight.job.is_left = True
            self._lost.append(flight.job)
            self._done.append((flight.job, flight.error or "its stream was aborted"))

    def _bind(self) -> None:
        """Let the calling thread use the device; torch remembers it by thread."""
        if self._bound != threading.get_ident():
            self._device.bind_thread()
            self._bound = threading.get_ident()


def _give_up(job: Job) -> str:
    """Return why a job cannot be given up; ``""`` if it is. The others go on all the same."""
    try:
        job.give_up()
    except Exception as exc:  # noqa: BLE001 - a missing library, torch-npu, or a bug
        return one_line(exc)
    return ""
