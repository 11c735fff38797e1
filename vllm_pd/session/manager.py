"""All sessions of one worker, on one thread that sleeps unless something happens.

The engine's thread hands in grants, releases and fetches and takes results; the
session thread owns every socket and transport.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import zmq

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PDError, PeerLostError
from vllm_pd.protocol.messages import PROTOCOL_VERSION, Fingerprint, Hello, KVLayout
from vllm_pd.session.channel import ControlContext, ControlServer
from vllm_pd.session.consumer import Consumer
from vllm_pd.session.fetches import FetchRequest, FetchResult
from vllm_pd.session.producer import Grant, Producer
from vllm_pd.session.stats import FetchRecord, FetchTimeline, SessionStats, outcome_of
from vllm_pd.transport.base import Transport
from vllm_pd.transport.threads import name_this_thread
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

_ERROR_PAUSE_S = 0.1  # keeps an error that repeats from eating a core


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """What this worker is, as its peers need to know it."""

    engine_id: str
    tp_rank: int
    tp_size: int
    fingerprint: Fingerprint
    layout: KVLayout


@dataclass(slots=True)
class Results:
    """What happened since the last ``take_results``.

    Attributes:
        freed: producer's request ids whose blocks vLLM may have back.
        fetched: consumer's fetches that ended, well or badly.
    """

    freed: list[str] = field(default_factory=list)
    fetched: list[FetchResult] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Known:
    """Counts of the session thread; they only grow, but for the last two."""

    num_bytes_sent: int = 0
    num_granted: int = 0
    num_ended: Counter[str] = field(default_factory=Counter)
    num_handshake_failures: Counter[str] = field(default_factory=Counter)
    num_dropped: Counter[str] = field(default_factory=Counter)
    num_leases: int = 0
    num_blocks: int = 0

    @classmethod
    def of(cls, producer: Producer, consumer: Consumer, server: ControlServer) -> _Known:
        """Read the counts."""
        failures = Counter(consumer.num_handshake_failures)
        if producer.num_refused:
            failures["refused"] = producer.num_refused
        leases = producer.leases
        return cls(
            producer.num_bytes_sent,
            producer.num_granted,
            Counter({reason.value: count for reason, count in leases.num_ended.items()}),
            failures,
            Counter(server.num_dropped),
            len(leases),
            leases.num_blocks,
        )

    def add_news(self, stats: SessionStats, *, since: _Known) -> None:
        """Add what happened since an earlier reading."""
        stats.num_bytes_sent += self.num_bytes_sent - since.num_bytes_sent
        stats.num_leases_granted += self.num_granted - since.num_granted
        stats.num_leases_ended += self.num_ended - since.num_ended
        stats.num_handshake_failures += self.num_handshake_failures - since.num_handshake_failures
        stats.num_dropped_frames += self.num_dropped - since.num_dropped
        stats.num_leases, stats.num_blocks_held = self.num_leases, self.num_blocks


class SessionManager:
    """Runs the sessions of one worker; public methods may be called from any thread.

    Every grant ends as exactly one id in ``freed``, every fetch as exactly one
    entry in ``fetched``, as long as the manager is not closed.

    Args:
        config: addresses, key, durations.
        local: this worker.
        transports: by name, best first; the manager closes them.

    Raises:
        ConfigError: the key or the address cannot be used.
    """

    def __init__(
        self, config: ConnectorConfig, local: LocalWorker, transports: Mapping[str, Transport]
    ) -> None:
        self._transports = dict(transports)
        self._context = ControlContext(config)
        try:
            self._server = self._context.server(config.side_channel_host, 0)
        except PDError:
            self._context.close()
            raise
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            engine_id=local.engine_id,
            tp_rank=local.tp_rank,
            tp_size=local.tp_size,
            fingerprint=local.fingerprint,
            layout=local.layout,
            endpoints={name: t.local_endpoint() for name, t in self._transports.items()},
        )
        self._producer = Producer(
            self._server,
            hello,
            self._transports,
            config,
        )
        self._consumer = Consumer(self._context, hello, self._transports, config)
        self._stats = SessionStats()
        self._known = _Known()
        self.host, self.port = self._server.host, self._server.port
        self._lock = threading.Lock()
        self._have_results = threading.Condition(self._lock)
        self._commands: deque[Callable[[float], None]] = deque()
        self._results = Results()
        self._closing = False
        self._has_news = False
        self._wake = Wakeup()
        self._poller = zmq.Poller()
        self._polled_changes = -1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def grant(self, grant: Grant) -> None:
        """Lease a finished prefill's blocks to whoever fetches its transfer id."""
        self._post(lambda now: self._producer.grant(grant, now))

    def renew(self, transfer_id: str) -> None:
        """Prolong a lease; unknown ids are ignored."""
        self._post(lambda now: self._producer.renew(transfer_id, now))

    def release(self, transfer_id: str) -> None:
        """End a lease early; unknown ids are ignored."""
        self._post(lambda _: self._producer.release(transfer_id))

    def fetch(self, request: FetchRequest) -> None:
        """Begin to fetch blocks."""
        if not self._post(lambda now: self._consumer.start(request, now)):
            error = PeerLostError("this engine shuts down")
            record = FetchRecord(
                request.request_id, outcome_of(error), "", 0, 0, timeline=FetchTimeline()
            )
            with self._lock:
                self._results.fetched.append(
                    FetchResult(request.request_id, request.block_ids, record, error)
                )

    def give_up(self, request_id: str) -> None:
        """End the fetch of a request that was aborted; unknown ones are ignored."""
        self._post(lambda now: self._consumer.give_up(request_id, now))

    def take_results(self) -> Results:
        """Return what ended since the last call."""
        if not self._results.freed and not self._results.fetched:
            return Results()
        with self._lock:
            results, self._results = self._results, Results()
        return results

    def wait_results(self, timeout_s: float) -> bool:
        """Wait until there is something to take, but no longer than ``timeout_s``.

        Returns:
            Whether waiting longer makes no sense.
        """

        def is_over() -> bool:
            return bool(self._results.freed or self._results.fetched or self._closing)

        with self._have_results:
            return self._have_results.wait_for(is_over, timeout_s)

    def take_stats(self) -> SessionStats | None:
        """Return what happened since the last call; None for nothing."""
        if not self._has_news:
            return None
        with self._lock:
            stats, self._stats = self._stats, SessionStats()
            self._stats.num_leases = stats.num_leases
            self._stats.num_blocks_held = stats.num_blocks_held
            self._has_news = False
        return stats

    def close(self) -> None:
        """End all sessions and close the transports; idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._have_results.notify_all()
        self._wake.set()
        self._thread.join(timeout=10.0)
        self._wake.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, command: Callable[[float], None]) -> bool:
        """Hand a command to the session thread; False when it takes none any more."""
        with self._lock:
            if self._closing:
                return False
            self._commands.append(command)
        self._wake.set()
        return True

    def _run(self) -> None:
        name_this_thread("session")
        while not self._closing:
            try:
                ready = self._wait()
                self._step(time.monotonic(), ready)
            except Exception:
                # A bug must not leave requests waiting for ever: fail what runs, go on.
                logger.exception("session thread: failing all fetches after an error")
                self._fail_all()
                time.sleep(_ERROR_PAUSE_S)
        self._shut_down()

    def _fail_all(self) -> None:
        now = time.monotonic()
        try:
            self._consumer.close(now)
            self._poll_transports(now)
            self._publish()
        except Exception:
            logger.exception("session thread: error while failing fetches")

    def _wait(self) -> set[object]:
        """Sleep until a socket, a transport, a command or a deadline needs attention.

        Returns:
            What is readable: sockets and descriptors.
        """
        if self._polled_changes != self._consumer.num_changes:
            self._polled_changes = self._consumer.num_changes
            self._poller = zmq.Poller()
            self._poller.register(self._wake.fileno(), zmq.POLLIN)
            self._poller.register(self._server.socket, zmq.POLLIN)
            self._poller.register(self._server.monitor, zmq.POLLIN)
            for transport in self._transports.values():
                self._poller.register(transport.fileno(), zmq.POLLIN)
            for client in self._consumer.clients():
                self._poller.register(client.socket, zmq.POLLIN)
                self._poller.register(client.monitor, zmq.POLLIN)
        deadlines = [self._producer.next_deadline(), self._consumer.next_deadline()]
        times = [deadline for deadline in deadlines if deadline is not None]
        timeout_ms = None
        if times:
            timeout_ms = max(0, int((min(times) - time.monotonic()) * 1000) + 1)
        return {ready for ready, _ in self._poller.poll(timeout_ms)}

    def _step(self, now: float, ready: set[object]) -> None:
        if self._wake.fileno() in ready:
            self._wake.clear()
        while self._commands:
            self._commands.popleft()(now)
        if self._server.is_ready(ready):
            for identity, message in self._server.receive_some():
                self._producer.handle(identity, message, now)
        self._consumer.poll(now, ready)
        self._producer.expire(now)
        self._consumer.expire(now)
        # Last, because all of the above may have posted or failed transfers.
        self._poll_transports(now)
        self._publish()

    def _poll_transports(self, now: float) -> None:
        """Take outcomes until there are none: one that failed may fail others of its peer."""
        for transport in self._transports.values():
            while outcomes := transport.poll():
                for outcome in outcomes:
                    if not self._producer.end_transfer(outcome):
                        self._consumer.end_transfer(outcome, now)

    def _publish(self) -> None:
        freed, fetched = self._producer.take_freed(), self._consumer.take_results()
        known = _Known.of(self._producer, self._consumer, self._server)
        if not freed and not fetched and known == self._known:
            return
        with self._lock:
            self._results.freed += freed
            self._results.fetched += fetched
            known.add_news(self._stats, since=self._known)
            self._stats.fetches += [result.record for result in fetched]
            self._has_news = True
            if freed or fetched:
                self._have_results.notify_all()
        self._known = known

    def _shut_down(self) -> None:
        now = time.monotonic()
        try:
            while self._commands:
                self._commands.popleft()(now)
            self._consumer.close(now)
            for transport in self._transports.values():
                transport.close()
            self._poll_transports(now)
            self._publish()
        except Exception:
            logger.exception("session thread: error while closing")
        self._server.close()
        self._context.close()
