"""The instance endpoint: one per engine, in the process of its scheduler half.

It tells peers and the router who this instance is, where its workers are and what
it keeps for consumers, takes releases and renewals, and sends those of the requests
here. It sleeps in poll when nothing happens.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence

import zmq

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PDError
from vllm_pd.protocol.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Describe,
    Drain,
    Fingerprint,
    GetOutstanding,
    GetStats,
    InstanceInfo,
    Outstanding,
    Release,
    Renew,
    Stats,
    WorkerAddress,
)
from vllm_pd.session.channel import ControlClient, ControlContext, ControlServer
from vllm_pd.session.outbox import Address, Outbox, RemoteLease, Renewals, renew_messages
from vllm_pd.transport.threads import name_this_thread
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

_MAX_PENDING = 10_000
_ERROR_PAUSE_S = 0.1  # keeps an error that repeats from eating a core


class InstanceEndpoint:
    """Serves peers and the router, and notifies other instances, on a thread of its own.

    All public methods may be called from any thread.

    Attributes:
        host: the address that peers are told.
        port: its port.

    Raises:
        ConfigError: the key or the address cannot be used.
    """

    def __init__(self, config: ConnectorConfig, *, engine_id: str, tp_size: int) -> None:
        self._config = config
        self._engine_id = engine_id
        self._tp_size = tp_size
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._workers: tuple[WorkerAddress, ...] = ()
        self._fingerprint: Fingerprint | None = None
        self._num_leases = 0
        self._num_blocks = 0
        self._draining = False
        self._releases: list[str] = []  # taken from peers, for our workers
        self._renewed: dict[str, None] = {}  # taken from peers, for our workers
        self._outgoing: list[tuple[Address, AnyMessage]] = []
        self._renewals = Renewals()
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()  # for whoever takes it
        self._known_dropped: Counter[str] = Counter()  # of the server, in ``_dropped`` or taken
        self._wakes_at = math.inf  # when the thread looks at ``_renewals`` by itself
        self._closing = False
        self._wake = Wakeup()
        self._context = ControlContext(config)
        try:
            self._server = self._context.server(config.side_channel_host, config.side_channel_port)
        except PDError:
            self._context.close()
            self._wake.close()
            raise
        self._outbox = Outbox(self._context)
        self._poller = zmq.Poller()
        self._polled_changes = -1
        self.host, self.port = self._server.host, self._server.port
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def set_workers(
        self, workers: Sequence[WorkerAddress], fingerprint: Fingerprint | None
    ) -> None:
        """Tell what Describe answers, once the workers have registered their KV cache."""
        with self._lock:
            self._workers, self._fingerprint = tuple(workers), fingerprint

    def try_hold(self, num_blocks: int) -> bool:
        """Count a lease of so many blocks; False while draining: give none.

        So whoever told this instance to drain sees the number of leases only fall.
        """
        with self._lock:
            if self._draining:
                return False
            self._num_leases += 1
            self._num_blocks += num_blocks
            self._counts["leases_granted"] += 1
            return True

    def end_hold(self, num_blocks: int) -> None:
        """Count a lease of so many blocks as over."""
        with self._lock:
            self._num_leases -= 1
            self._num_blocks -= num_blocks

    def take_releases(self) -> list[str]:
        """Return the transfer ids that were released since the last call."""
        if not self._releases:
            return []
        with self._lock:
            releases, self._releases = self._releases, []
        return releases

    def take_renewals(self) -> list[str]:
        """Return the transfer ids that were renewed since the last call."""
        if not self._renewed:
            return []
        with self._lock:
            renewed, self._renewed = self._renewed, {}
        return list(renewed)

    def take_num_dropped(self) -> Counter[str]:
        """Return the frames and peers that were dropped since the last call, by reason."""
        if not self._dropped:
            return Counter()
        with self._lock:
            dropped, self._dropped = self._dropped, Counter()
        return dropped

    def send_release(self, host: str, port: int, transfer_id: str) -> None:
        """Tell another instance that a prefill will not be fetched; best effort."""
        with self._lock:
            self._enqueue((host, port), Release(transfer_id=transfer_id))
        self._wake.set()

    def start_renewing(self, request_id: str, lease: RemoteLease) -> None:
        """Keep a lease of another instance alive while its request queues here."""
        with self._lock:
            due = self._renewals.add(request_id, lease, time.monotonic())
            is_early = due is not None and due < self._wakes_at
        if is_early:
            self._wake.set()

    def stop_renewing(self, request_id: str, *, once_more: bool) -> None:
        """Leave a lease to itself; idempotent.

        Args:
            request_id: as in ``start_renewing``.
            once_more: renew it a last time, unless that has just been done, as it is
                going to be fetched.
        """
        with self._lock:
            lease = self._renewals.remove(request_id, time.monotonic())
            if lease is None or not once_more:
                return
            self._enqueue(lease.address, Renew(transfer_ids=(lease.transfer_id,)))
        self._wake.set()

    def close(self) -> None:
        """Stop the thread; idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake.set()
        self._thread.join(timeout=5.0)
        self._wake.close()

    def _enqueue(self, address: Address, message: AnyMessage) -> None:
        """Hand a notice to the thread; the caller holds the lock."""
        if len(self._outgoing) < _MAX_PENDING:
            self._outgoing.append((address, message))
        else:
            self._counts["notices_unsent"] += 1

    def _run(self) -> None:
        name_this_thread("inst")
        while not self._closing:
            try:
                self._wait()
                self._step(time.monotonic())
            except Exception:
                logger.exception("instance endpoint: going on after an error")
                time.sleep(_ERROR_PAUSE_S)
        self._shut_down()

    def _wait(self) -> None:
        """Sleep until a socket, another thread or a deadline needs attention."""
        if self._polled_changes != self._outbox.num_changes:
            self._polled_changes = self._outbox.num_changes
            self._poller = zmq.Poller()
            self._poller.register(self._wake.fileno(), zmq.POLLIN)
            channels: list[ControlServer | ControlClient] = [self._server, *self._outbox.clients()]
            for channel in channels:
                self._poller.register(channel.socket, zmq.POLLIN)
                self._poller.register(channel.monitor, zmq.POLLIN)
        with self._lock:
            times = [self._outbox.next_deadline(), self._renewals.next_due()]
            self._wakes_at = min((t for t in times if t is not None), default=math.inf)
        timeout_ms = None
        if self._wakes_at < math.inf:
            timeout_ms = max(0, int((self._wakes_at - time.monotonic()) * 1000) + 1)
        self._poller.poll(timeout_ms)

    def _step(self, now: float) -> None:
        self._wake.clear()
        self._outbox.check(now)
        self._notify(now)
        for identity, message in self._server.receive_some():
            self._serve(identity, message)
        self._publish_dropped()

    def _publish_dropped(self) -> None:
        dropped = Counter(self._server.num_dropped)
        if dropped != self._known_dropped:
            with self._lock:
                self._dropped += dropped - self._known_dropped
            self._known_dropped = dropped

    def _serve(self, identity: bytes, message: AnyMessage) -> None:
        match message:
            case Describe():
                self._server.send(identity, self._describe())
            case Release() | Renew():
                self._take(message)
            case Drain():
                self._server.send(identity, self._drain(on=message.on))
            case GetOutstanding():
                self._server.send(identity, self._outstanding())
            case GetStats():
                self._publish_dropped()  # whoever is told may look for it in the metrics
                self._server.send(identity, self._stats())
            case _:
                self._server.num_dropped["unexpected"] += 1

    def _take(self, message: Release | Renew) -> None:
        """Keep what a peer says about leases for the workers' next step, within bounds."""
        with self._lock:
            if isinstance(message, Release):
                self._counts["releases_taken"] += 1
                if len(self._releases) < _MAX_PENDING:
                    self._releases.append(message.transfer_id)
                return
            self._counts["renewals_taken"] += len(message.transfer_ids)
            if self._num_leases and len(self._renewed) < _MAX_PENDING:
                self._renewed |= dict.fromkeys(message.transfer_ids)

    def _describe(self) -> InstanceInfo:
        with self._lock:
            return InstanceInfo(
                protocol_version=PROTOCOL_VERSION,
                engine_id=self._engine_id,
                tp_size=self._tp_size,
                workers=self._workers,
                fingerprint=self._fingerprint,
                num_leases=self._num_leases,
                lease_s=self._config.lease_s,
            )

    def _drain(self, *, on: bool) -> Outstanding:
        with self._lock:
            is_new, self._draining = self._draining != on, on
        if is_new:
            logger.info("draining: no blocks are kept for consumers" if on else "draining no more")
        return self._outstanding()

    def _outstanding(self) -> Outstanding:
        with self._lock:
            return Outstanding(
                num_leases=self._num_leases,
                num_blocks=self._num_blocks,
                draining=self._draining,
            )

    def _stats(self) -> Stats:
        dropped = self._server.num_dropped
        with self._lock:
            counters: dict[str, float] = {
                "uptime_s": time.monotonic() - self._started,
                "leases": self._num_leases,
                "blocks_held": self._num_blocks,
                "draining": float(self._draining),
                "renewing": len(self._renewals),
                "denied_peers": self._server.num_denied,
                **{name: self._counts[name] for name in _COUNTS},
            }
        counters["notices_unsent"] += self._outbox.num_unsent
        return Stats(counters=counters | {f"dropped_{r}": n for r, n in dropped.items()})

    def _notify(self, now: float) -> None:
        """Send what is to be sent now."""
        with self._lock:
            outgoing, self._outgoing = self._outgoing, []
            for address, transfer_ids in self._renewals.take_due(now):
                outgoing += [(address, message) for message in renew_messages(transfer_ids)]
            for _, message in outgoing:
                if isinstance(message, Renew):
                    self._counts["renewals_sent"] += len(message.transfer_ids)
                else:
                    self._counts["releases_sent"] += 1
        for address, message in outgoing:
            self._outbox.send(address, message, now)

    def _shut_down(self) -> None:
        try:
            self._notify(time.monotonic())
        except Exception:
            logger.exception("instance endpoint: error while closing")
        self._outbox.close()
        self._server.close()
        self._context.close()


_COUNTS = (
    "leases_granted",
    "releases_taken",
    "renewals_taken",
    "releases_sent",
    "renewals_sent",
    "notices_unsent",
)
"""Counters that Stats always carries."""
