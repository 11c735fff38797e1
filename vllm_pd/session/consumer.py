"""The consumer's half of a worker's sessions: one session per producer worker.

Runs on the session thread. A producer's instance endpoint tells once where its
workers are; every worker from which this one needs heads gets a session, which
shakes hands once and then carries any number of fetches. A session that fails
takes its fetches with it and is rebuilt for the next one.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping
from functools import partial

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import (
    LeaseExpiredError,
    PDError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
)
from vllm_pd.protocol.messages import Hello, Release, WorkerAddress
from vllm_pd.protocol.state import Fetch, FetchState, SessionState
from vllm_pd.session.channel import ControlClient, ControlContext
from vllm_pd.session.directory import Directory, RemoteEngine
from vllm_pd.session.fetch_session import FetchSession, LocalEnd, open_session
from vllm_pd.session.fetches import FetchRequest, FetchResult, Order, OrderPart
from vllm_pd.session.outbox import Outbox
from vllm_pd.session.stats import outcome_of
from vllm_pd.transport.base import TransferOutcome, Transport

logger = logging.getLogger(__name__)


class Consumer:
    """Fetches blocks from the workers of other engines.

    Args:
        context: makes the control clients.
        local: what this worker announces.
        transports: by name, best first.
        config: durations, and how much to verify.

    Attributes:
        num_handshake_failures: sessions that did not come about, by outcome.
    """

    def __init__(
        self,
        context: ControlContext,
        local: Hello,
        transports: Mapping[str, Transport],
        config: ConnectorConfig,
    ) -> None:
        self._config = config
        self._local = LocalEnd(context, local, transports, config)
        self._fetch_ids = itertools.count(1)
        self._directory = Directory(context, local, config.handshake_timeout_s)
        self._results: list[FetchResult] = []
        self._outbox = Outbox(context)
        self._num_changes = 0
        self.num_handshake_failures: Counter[str] = Counter()

    @property
    def num_changes(self) -> int:
        """Changes of the set of sockets that are to be watched."""
        return self._num_changes + self._directory.num_changes + self._outbox.num_changes

    def take_results(self) -> list[FetchResult]:
        """Return the fetches that ended since the last call."""
        results, self._results = self._results, []
        return results

    def clients(self) -> list[ControlClient]:
        """Return the control clients whose sockets are to be watched."""
        sessions = [session.client for session in self._sessions()]
        return sessions + self._outbox.clients() + self._directory.clients()

    def start(self, request: FetchRequest, now: float) -> None:
        """Begin a fetch; every fetch ends as exactly one result."""
        deadline = now + request.wait_s + self._config.transfer_timeout_s
        order = Order(request, now, deadline)
        try:
            engine = self._directory.find(request, now)
        except PDError as exc:
            order.error = exc
            self._finish(order, now)
            return
        if engine.is_described:
            self._dispatch(engine, order, now)
        else:
            engine.orders.append(order)

    def give_up(self, request_id: str, now: float) -> None:
        """End the fetch of a request that was aborted; bytes on their way still arrive.

        Its blocks must not wait for a prefill that may never end.
        """
        error = TransferError("the request was aborted")
        for engine in self._directory:
            for order in [o for o in engine.orders if o.request.request_id == request_id]:
                engine.orders.remove(order)
                order.error = error
                self._finish(order, now)
        for session in self._sessions():
            for part in list(session.pending.values()):
                if part.fetch.request_id == request_id:
                    self._guard(session, now, partial(self._give_up, session, part, now, error))

    def poll(self, now: float, ready: Container[object] | None = None) -> None:
        """Handle what arrived on the sessions, and losses of peers.

        Args:
            now: the time.
            ready: what a poller found readable, of ``clients``; None: look at all.
        """
        for engine in self._directory:
            client = engine.client
            if client is not None and (ready is None or client.is_ready(ready)):
                self._take_description(engine, now)
        for session in self._sessions():
            if ready is None or session.client.is_ready(ready):
                self._guard(session, now, partial(self._drain, session, now))

    def end_transfer(self, outcome: TransferOutcome, now: float) -> bool:
        """Take note of a transport's outcome; return whether it was one of ours."""
        part = self._local.receiving.pop((outcome.peer_id, outcome.transfer_id), None)
        if part is None:
            return False
        part.order.num_bytes += outcome.num_bytes
        part.order.verify_s = max(part.order.verify_s, outcome.verify_s)
        part.order.unseen_s = max(part.order.unseen_s, outcome.unseen_s)
        for session in self._sessions():
            if session.peer_id == outcome.peer_id:
                session.pending.pop(outcome.transfer_id, None)
                if isinstance(outcome.error, PeerLostError):
                    self._close(session, now, outcome.error)
        self._end(part, now, outcome.error)
        return True

    def expire(self, now: float) -> None:
        """Give up what is overdue."""
        self._outbox.check(now)
        for engine in self._directory:
            if engine.deadline is not None and engine.deadline <= now:
                self._forget(engine, now, TransferTimeoutError("no answer to Describe"))
        for session in self._sessions():
            if session.deadline is not None and session.deadline <= now:
                self._close(session, now, TransferTimeoutError("no answer to the handshake"))
            for part in list(session.pending.values()):
                if part.fetch.deadline <= now:
                    self._expire(session, part, now)

    def _expire(self, session: FetchSession, part: OrderPart, now: float) -> None:
        """Give up one part; the session, too, if bytes may still come for it."""
        error = TransferTimeoutError(f"transfer {part.fetch.transfer_id} took too long")
        if part.is_receiving:
            # The transport will only say that its peer is gone.
            part.order.error = part.order.error or error
            self._close(session, now, error)
        elif session.drop(part):
            self._end(part, now, error)

    def next_deadline(self) -> float | None:
        """Return when ``expire`` has something to do."""
        times = [engine.deadline for engine in self._directory]
        for session in self._sessions():
            times.append(session.deadline)
            times += [part.fetch.deadline for part in session.pending.values()]
        times.append(self._outbox.next_deadline())
        return min((time for time in times if time is not None), default=None)

    def close(self, now: float) -> None:
        """End all sessions; their fetches fail."""
        error = TransferError("this engine shuts down")
        for engine in self._directory:
            if not engine.is_described:
                self._forget(engine, now, error)
        for session in self._sessions():
            self._close(session, now, error)
        self._outbox.close()

    # From a request to sessions

    def _sessions(self) -> list[FetchSession]:
        return [session for engine in self._directory for session in engine.sessions.values()]

    def _take_description(self, engine: RemoteEngine, now: float) -> None:
        """Go on with what waits for the description of an engine, if it is there."""
        try:
            if not self._directory.take_description(engine):
                return
        except PDError as exc:
            self._forget(engine, now, exc)
            return
        orders, engine.orders = engine.orders, []
        for order in orders:
            self._dispatch(engine, order, now)

    def _forget(self, engine: RemoteEngine, now: float, error: PDError) -> None:
        """Give up an engine that did not describe itself; what waited for that fails."""
        self.num_handshake_failures[outcome_of(error).value] += 1
        for order in self._directory.give_up(engine, now, error):
            order.error = error
            self._finish(order, now)

    def _dispatch(self, engine: RemoteEngine, order: Order, now: float) -> None:
        """Give every session its part of an order."""
        request = order.request
        parts = []
        for heads, worker in engine.parts:
            fetch_id = next(self._fetch_ids)
            fetch = Fetch(fetch_id, request.request_id, request.transfer_id, order.deadline)
            parts.append(OrderPart(fetch, order, heads, worker))
        order.num_open = sum(part.moves_bytes for part in parts)
        for part in parts:
            try:
                session = self._session(engine, part.worker, now)
            except PDError as exc:
                self._end(part, now, exc)
                continue
            session.add(part)
            if session.state is SessionState.READY:
                self._guard(session, now, partial(session.request, part, now))

    def _session(self, engine: RemoteEngine, worker: WorkerAddress, now: float) -> FetchSession:
        """Return the session with a worker; open it if there is none."""
        if session := engine.sessions.get(worker.tp_rank):
            return session
        session = open_session(self._local, engine.engine_id, worker, met=engine.started, now=now)
        engine.sessions[worker.tp_rank] = session
        # Back in the table, if the loss of another session had removed it.
        self._directory.keep(engine)
        self._num_changes += 1
        return session

    # One session

    def _guard(self, session: FetchSession, now: float, step: Callable[[], None]) -> None:
        """Run one step of a session; a fault of the peer or of the session ends it."""
        if session.state is SessionState.CLOSED:
            return
        try:
            step()
        except PDError as exc:
            self._close(session, now, exc)
        except Exception as exc:
            logger.exception("session with engine %s", session.engine_id)
            self._close(session, now, TransferError(f"internal error: {exc!r}"))

    def _drain(self, session: FetchSession, now: float) -> None:
        for part, error in session.drain(now):
            self._end(part, now, error)

    def _give_up(self, session: FetchSession, part: OrderPart, now: float, error: PDError) -> None:
        if session.give_up(part):
            self._end(part, now, error)

    def _close(self, session: FetchSession, now: float, error: PDError) -> None:
        """End a session. Parts whose bytes move end with the transport's outcome."""
        if session.state is SessionState.CLOSED:
            return
        logger.warning("session with engine %s ended: %s", session.engine_id, error)
        if session.state is SessionState.GREETING:
            self.num_handshake_failures[outcome_of(error).value] += 1
        self._directory.forget_session(session)
        self._num_changes += 1
        for part in session.close(error):
            self._end(part, now, error)

    # From parts to results

    def _end(self, part: OrderPart, now: float, error: PDError | None) -> None:
        """Record the end of a part; the last one that moves bytes ends the order."""
        part.fetch.advance(FetchState.FAILED if error else FetchState.DONE)
        if part.moves_bytes:
            if part.order.end_part(part, now, error):
                self._finish(part.order, now)
        elif error is not None and not isinstance(error, LeaseExpiredError):
            # It was only to be told that it is not needed, and still holds its blocks.
            address = part.worker.host, part.worker.port
            self._outbox.send(address, Release(transfer_id=part.fetch.transfer_id), now)

    def _finish(self, order: Order, now: float) -> None:
        """Report the end of an order; one that failed here gives its blocks back there."""
        self._results.append(order.result(now, block_len=self._local.hello.layout.block_len))
        if order.error is not None and not isinstance(order.error, LeaseExpiredError):
            # Also after the loss of a peer: perhaps only a connection was lost.
            address = order.request.remote_host, order.request.remote_port
            self._outbox.send(address, Release(transfer_id=order.request.transfer_id), now)
