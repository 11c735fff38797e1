"""The consumer's half of a worker's sessions: one session per producer worker.

Runs on the session thread. A producer's instance endpoint tells once where its
workers are; every worker from which this one needs heads gets a session, which
shakes hands once and then carries any number of fetches. A session that fails
takes its fetches with it and is rebuilt for the next one.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import (
    IncompatiblePeerError,
    LeaseExpiredError,
    PDError,
    PeerLostError,
    RemoteProtocolError,
    TransferError,
    TransferTimeoutError,
)
from vllm_pd.protocol.handshake import check_compatible, choose_transport
from vllm_pd.protocol.heads import Part, plan_parts
from vllm_pd.protocol.messages import (
    AnyMessage,
    Describe,
    FetchBlocks,
    FetchFailed,
    FetchFailure,
    FetchReady,
    GiveUp,
    Goodbye,
    Hello,
    InstanceInfo,
    Refused,
    Release,
    WorkerAddress,
)
from vllm_pd.protocol.state import Fetch, FetchState, SessionState
from vllm_pd.session.channel import ControlClient, ControlContext
from vllm_pd.session.outbox import Outbox
from vllm_pd.session.stats import FetchRecord, FetchTimeline, outcome_of
from vllm_pd.transport.base import Heads, TransferOutcome, Transport

logger = logging.getLogger(__name__)

_MESSAGES_PER_POLL = 256  # of one peer, so that none starves the others
_GOODBYE_LINGER_S = 0.2  # a lost goodbye costs the producer a forgotten session, no more
_SILENT_S = 5.0  # an instance that did not answer in time is not asked again for so long


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """Blocks of a remote prefill that a request here needs.

    Attributes:
        request_id: the request here.
        transfer_id: the prefill there.
        remote_engine_id: the producer.
        remote_host: host of its instance endpoint.
        remote_port: port of it.
        block_offset: first block of the prefill that is wanted.
        block_ids: where the blocks go, in this worker's KV cache.
        prompt_digest: of the prompt, for the producer to compare; ``""`` if unknown.
        wait_s: how long the prefill may still take.
    """

    request_id: str
    transfer_id: str
    remote_engine_id: str
    remote_host: str
    remote_port: int
    block_offset: int
    block_ids: tuple[int, ...]
    prompt_digest: str = ""
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The end of a fetch; ``error`` is None when every byte is in place."""

    request_id: str
    block_ids: tuple[int, ...]
    record: FetchRecord
    error: PDError | None = None


@dataclass(slots=True, eq=False)
class _Order:
    """A request's blocks, on their way from one or several producer workers."""

    request: FetchRequest
    started: float
    deadline: float
    num_open: int = 0  # parts that move bytes and have not ended
    num_bytes: int = 0
    transport: str = ""
    handshake_s: float = 0.0
    queued_s: float = 0.0
    transfer_s: float = 0.0
    verify_s: float = 0.0
    error: PDError | None = None


@dataclass(slots=True, eq=False)
class _Pending:
    """What one producer worker contributes to an order, while it has not ended."""

    fetch: Fetch
    order: _Order
    part: Part
    worker: WorkerAddress
    requested: float = 0.0
    ready: float = 0.0


@dataclass(slots=True, eq=False)
class _Session:
    """With one worker of a producer."""

    session_id: bytes
    producer: _Producer
    rank: int
    client: ControlClient
    deadline: float | None  # of the handshake
    state: SessionState = SessionState.GREETING
    transport: Transport | None = None
    pending: dict[int, _Pending] = field(default_factory=dict)  # by fetch id
    given_up: set[int] = field(default_factory=set)  # fetches whose answer is still to come

    @property
    def peer_id(self) -> str:
        return self.session_id.hex()


@dataclass(slots=True, eq=False)
class _Producer:
    """Another engine, and the sessions with its workers."""

    engine_id: str
    started: float
    deadline: float | None  # of the description
    client: ControlClient | None  # to its instance endpoint, until it has described itself
    info: InstanceInfo | None = None
    parts: tuple[Part, ...] = ()
    orders: list[_Order] = field(default_factory=list)  # that wait for the description
    sessions: dict[int, _Session] = field(default_factory=dict)  # by rank


class Consumer:
    """Fetches blocks from the workers of other engines.

    Args:
        context: makes the control clients.
        local: what this worker announces.
        transports: by name, best first.
        config: durations, and how much to verify.
    """

    def __init__(
        self,
        context: ControlContext,
        local: Hello,
        transports: Mapping[str, Transport],
        config: ConnectorConfig,
    ) -> None:
        self._context = context
        self._local = local
        self._transports = transports
        self._config = config
        self._fetch_ids = itertools.count(1)
        self._producers: dict[str, _Producer] = {}  # by engine id
        self._receiving: dict[tuple[str, int], _Pending] = {}
        self._results: list[FetchResult] = []
        self._silent: dict[str, float] = {}  # engines that did not answer, and until when
        self._outbox = Outbox(context)
        self._num_changes = 0
        self.num_handshake_failures: Counter[str] = Counter()  # by outcome

    @property
    def num_changes(self) -> int:
        """Changes of the set of sockets that are to be watched."""
        return self._num_changes + self._outbox.num_changes

    def take_results(self) -> list[FetchResult]:
        """Return the fetches that ended since the last call."""
        results, self._results = self._results, []
        return results

    def clients(self) -> list[ControlClient]:
        """Return the control clients whose sockets are to be watched."""
        clients = [session.client for session in self._sessions()] + self._outbox.clients()
        return clients + [p.client for p in self._producers.values() if p.client is not None]

    def start(self, request: FetchRequest, now: float) -> None:
        """Begin a fetch; every fetch ends as exactly one result."""
        deadline = now + request.wait_s + self._config.transfer_timeout_s
        order = _Order(request, now, deadline)
        producer = self._producers.get(request.remote_engine_id)
        try:
            if producer is None:
                self._check_silent(request.remote_engine_id, now)
                producer = self._describe(request, now)
        except PDError as exc:
            order.error = exc
            self._finish(order, now)
            return
        if producer.info is None:
            producer.orders.append(order)
        else:
            self._dispatch(producer, order, now)

    def give_up(self, request_id: str, now: float) -> None:
        """End the fetch of a request that was aborted; bytes on their way still arrive.

        Its blocks must not wait for a prefill that may never end.
        """
        error = TransferError("the request was aborted")
        for producer in list(self._producers.values()):
            for order in [o for o in producer.orders if o.request.request_id == request_id]:
                producer.orders.remove(order)
                order.error = error
                self._finish(order, now)
        for session in self._sessions():
            for fetch_id, pending in list(session.pending.items()):
                if pending.fetch.request_id != request_id:
                    continue
                if pending.fetch.state is FetchState.AWAITING_PEER:
                    del session.pending[fetch_id]
                    self._end(pending, now, error)
                elif pending.fetch.state is FetchState.REQUESTED:
                    give_up = GiveUp(fetch_id=fetch_id)
                    self._guard(session, now, lambda s=session, g=give_up: s.client.send(g))  # type: ignore[misc]

    def poll(self, now: float) -> None:
        """Handle what arrived on the sessions, and losses of peers."""
        for producer in list(self._producers.values()):
            if producer.client is not None:
                self._guard_producer(producer, now)
        for session in self._sessions():
            self._guard(session, now, lambda session=session: self._drain(session, now))  # type: ignore[misc]

    def end_transfer(self, outcome: TransferOutcome, now: float) -> bool:
        """Take note of a transport's outcome; return whether it was one of ours."""
        pending = self._receiving.pop((outcome.peer_id, outcome.transfer_id), None)
        if pending is None:
            return False
        pending.order.num_bytes += outcome.num_bytes
        pending.order.verify_s = max(pending.order.verify_s, outcome.verify_s)
        for session in self._sessions():
            if session.peer_id == outcome.peer_id:
                session.pending.pop(outcome.transfer_id, None)
                if isinstance(outcome.error, PeerLostError):
                    self._close(session, now, outcome.error)
        self._end(pending, now, outcome.error)
        return True

    def expire(self, now: float) -> None:
        """Give up what is overdue."""
        self._outbox.check(now)
        for producer in list(self._producers.values()):
            if producer.deadline is not None and producer.deadline <= now:
                self._give_up(producer, now, TransferTimeoutError("no answer to Describe"))
        for session in self._sessions():
            if session.deadline is not None and session.deadline <= now:
                self._close(session, now, TransferTimeoutError("no answer to the handshake"))
            for fetch_id, pending in list(session.pending.items()):
                if pending.fetch.deadline <= now:
                    self._expire(session, fetch_id, pending, now)

    def _expire(self, session: _Session, fetch_id: int, pending: _Pending, now: float) -> None:
        """Give up one fetch; the session, too, if bytes may still come for it."""
        error = TransferTimeoutError(f"transfer {pending.fetch.transfer_id} took too long")
        if pending.fetch.state is FetchState.RECEIVING:
            # The transport will only say that its peer is gone.
            pending.order.error = pending.order.error or error
            self._close(session, now, error)
        elif session.pending.pop(fetch_id, None):
            if pending.fetch.state is FetchState.REQUESTED:
                session.given_up.add(fetch_id)
            self._end(pending, now, error)

    def next_deadline(self) -> float | None:
        """Return when ``expire`` has something to do."""
        times = [p.deadline for p in self._producers.values() if p.deadline is not None]
        for session in self._sessions():
            times += [] if session.deadline is None else [session.deadline]
            times += [pending.fetch.deadline for pending in session.pending.values()]
        if (idle := self._outbox.next_deadline()) is not None:
            times.append(idle)
        return min(times, default=None)

    def close(self, now: float) -> None:
        """End all sessions; their fetches fail."""
        error = TransferError("this engine shuts down")
        for producer in list(self._producers.values()):
            self._give_up(producer, now, error)
        for session in self._sessions():
            self._close(session, now, error)
        self._outbox.close()

    # From a request to sessions

    def _sessions(self) -> list[_Session]:
        return [s for producer in self._producers.values() for s in producer.sessions.values()]

    def _check_silent(self, engine_id: str, now: float) -> None:
        """Do not let every request wait for an instance that just did not answer.

        Raises:
            TransferTimeoutError: it was asked a moment ago.
        """
        self._silent = {name: until for name, until in self._silent.items() if until > now}
        if engine_id in self._silent:
            raise TransferTimeoutError(f"engine {engine_id} did not answer a moment ago")

    def _describe(self, request: FetchRequest, now: float) -> _Producer:
        """Ask a producer's instance endpoint where its workers are."""
        if not self._context.may_connect(request.remote_host):
            raise IncompatiblePeerError(
                f"{request.remote_host} is another host and there is no cluster key",
                hint="set cluster_key_file on both sides",
            )
        client = self._context.client(request.remote_host, request.remote_port)
        client.send(Describe())
        deadline = now + self._config.handshake_timeout_s
        producer = _Producer(request.remote_engine_id, now, deadline, client)
        self._producers[request.remote_engine_id] = producer
        self._num_changes += 1
        return producer

    def _guard_producer(self, producer: _Producer, now: float) -> None:
        """Take the description of a producer, or give it up."""
        assert producer.client is not None
        try:
            message = producer.client.receive()
            if message is None:
                producer.client.check()
                return
            self._meet(producer, message)
        except PDError as exc:
            self._give_up(producer, now, exc)
            return
        except Exception as exc:
            logger.exception("description of engine %s", producer.engine_id)
            self._give_up(producer, now, TransferError(f"internal error: {exc!r}"))
            return
        orders, producer.orders = producer.orders, []
        for order in orders:
            self._dispatch(producer, order, now)

    def _meet(self, producer: _Producer, info: AnyMessage) -> None:
        """Decide from which workers to fetch."""
        if not isinstance(info, InstanceInfo):
            raise RemoteProtocolError(f"{type(info).__name__} instead of a description")
        if info.engine_id != producer.engine_id:
            raise PeerLostError(f"engine {producer.engine_id} has restarted")
        if info.tp_size > len(info.workers):
            raise IncompatiblePeerError(
                f"engine {info.engine_id} describes {len(info.workers)} of {info.tp_size} workers"
            )
        producer.parts = plan_parts(
            self._local.tp_rank,
            tp_size=self._local.tp_size,
            remote_tp_size=info.tp_size,
            num_kv_heads=self._local.fingerprint.num_kv_heads,
        )
        known = {worker.tp_rank: worker for worker in info.workers}
        for part in producer.parts:
            worker = known.get(part.remote_rank)
            if worker is None or not self._context.may_connect(worker.host):
                raise IncompatiblePeerError(
                    f"engine {info.engine_id} has no reachable worker of rank {part.remote_rank}"
                )
        producer.info, producer.deadline = info, None
        self._close_client(producer)

    def _close_client(self, producer: _Producer) -> None:
        if producer.client is not None:
            producer.client.close()
            producer.client = None
            self._num_changes += 1

    def _give_up(self, producer: _Producer, now: float, error: PDError) -> None:
        """Forget a producer that did not describe itself; what waited for that fails."""
        if producer.info is not None:
            return
        logger.warning("engine %s: %s", producer.engine_id, error)
        self._producers.pop(producer.engine_id, None)
        self.num_handshake_failures[outcome_of(error).value] += 1
        if isinstance(error, TransferTimeoutError):
            self._silent[producer.engine_id] = now + _SILENT_S
        self._close_client(producer)
        for order in producer.orders:
            order.error = error
            self._finish(order, now)
        producer.orders = []

    def _dispatch(self, producer: _Producer, order: _Order, now: float) -> None:
        """Give every session its part of an order."""
        assert producer.info is not None
        known = {worker.tp_rank: worker for worker in producer.info.workers}
        parts = [
            _Pending(
                Fetch(
                    next(self._fetch_ids),
                    order.request.request_id,
                    order.request.transfer_id,
                    order.deadline,
                ),
                order,
                part,
                known[part.remote_rank],
            )
            for part in producer.parts
        ]
        order.num_open = sum(1 for pending in parts if pending.part.num_heads)
        for pending in parts:
            try:
                session = self._session(producer, pending.worker, now)
            except PDError as exc:
                self._end(pending, now, exc)
                continue
            session.pending[pending.fetch.fetch_id] = pending
            if session.state is SessionState.READY:
                self._guard(session, now, lambda p=pending, s=session: self._request(s, p, now))  # type: ignore[misc]

    def _session(self, producer: _Producer, worker: WorkerAddress, now: float) -> _Session:
        """Return the session with a worker; open it if there is none."""
        if session := producer.sessions.get(worker.tp_rank):
            return session
        # ZeroMQ reserves identities that start with a zero byte.
        session_id = b"\x01" + secrets.token_bytes(15)
        client = self._context.client(worker.host, worker.port, identity=session_id)
        client.send(self._local)
        deadline = now + self._config.handshake_timeout_s
        session = _Session(session_id, producer, worker.tp_rank, client, deadline)
        producer.sessions[worker.tp_rank] = session
        # Back in the table, if the loss of another session had removed it.
        self._producers[producer.engine_id] = producer
        self._num_changes += 1
        return session

    # One session

    def _guard(self, session: _Session, now: float, step: Callable[[], None]) -> None:
        """Run one step of a session; a fault of the peer or of the session ends it."""
        if session.state is SessionState.CLOSED:
            return
        try:
            step()
        except PDError as exc:
            self._close(session, now, exc)
        except Exception as exc:
            logger.exception("session with engine %s", session.producer.engine_id)
            self._close(session, now, TransferError(f"internal error: {exc!r}"))

    def _drain(self, session: _Session, now: float) -> None:
        # Messages first: an answer may lie there although the peer is gone by now.
        for _ in range(_MESSAGES_PER_POLL):
            message = session.client.receive()
            if message is None:
                session.client.check()
                return
            self._handle(session, message, now)
            if session.state is SessionState.CLOSED:
                return

    def _handle(self, session: _Session, message: AnyMessage, now: float) -> None:
        match message, session.state:
            case Hello(), SessionState.GREETING:
                self._get_ready(session, message, now)
            case Refused(), SessionState.GREETING:
                raise IncompatiblePeerError(f"the producer refused: {message.reason}")
            case Refused(), _:
                raise PeerLostError(f"the producer has ended the session: {message.reason}")
            case FetchReady(), SessionState.READY:
                self._receive(session, message.fetch_id, now)
            case FetchFailed(), SessionState.READY:
                self._take_refusal(session, message, now)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} in state {session.state.name}")

    def _get_ready(self, session: _Session, hello: Hello, now: float) -> None:
        if (hello.engine_id, hello.tp_rank) != (session.producer.engine_id, session.rank):
            raise PeerLostError(f"engine {session.producer.engine_id} has restarted")
        check_compatible(self._local, hello)
        reachable = [
            name
            for name, endpoint in hello.endpoints.items()
            if name in self._transports and self._transports[name].can_reach(endpoint)
        ]
        name = choose_transport(list(self._transports), reachable)
        transport = self._transports[name]
        transport.add_peer(session.peer_id, hello.endpoints[name])
        session.transport, session.state, session.deadline = transport, SessionState.READY, None
        logger.info(
            "fetching from engine %s rank %d over %s (%s), after a handshake of %.0f ms",
            hello.engine_id,
            hello.tp_rank,
            name,
            transport.mode[0],
            (now - session.producer.started) * 1e3,
        )
        for pending in list(session.pending.values()):
            self._request(session, pending, now)

    def _request(self, session: _Session, pending: _Pending, now: float) -> None:
        assert session.transport is not None
        pending.fetch.advance(FetchState.REQUESTED)
        pending.requested = now
        request, part = pending.order.request, pending.part
        session.client.send(
            FetchBlocks(
                fetch_id=pending.fetch.fetch_id,
                transfer_id=request.transfer_id,
                transport=session.transport.name,
                block_offset=request.block_offset,
                num_blocks=len(request.block_ids),
                first_head=part.remote_head,
                num_heads=part.num_heads,
                num_readers=part.num_readers,
                digests=self._config.digests,
                timeout_s=max(pending.fetch.deadline - now, 0.001),
                prompt_digest=request.prompt_digest,
            )
        )

    def _receive(self, session: _Session, fetch_id: int, now: float) -> None:
        pending = session.pending.get(fetch_id)
        if pending is None or session.transport is None:
            raise RemoteProtocolError(f"FetchReady of unknown fetch {fetch_id}")
        fetch, part = pending.fetch, pending.part
        if fetch.state is not FetchState.REQUESTED:
            raise RemoteProtocolError(f"FetchReady of fetch {fetch_id} in {fetch.state.name}")
        pending.ready = now
        if not part.num_heads:
            del session.pending[fetch_id]
            return
        heads: Heads | None = (part.local_head, part.num_heads)
        if part.num_heads == self._local.layout.num_heads:
            heads = None
        session.transport.recv_blocks(
            session.peer_id,
            fetch_id,
            pending.order.request.block_ids,
            heads=heads,
            digests=self._config.digests,
        )
        fetch.advance(FetchState.RECEIVING)
        fetch.deadline = min(fetch.deadline, now + self._config.transfer_timeout_s)
        pending.order.transport = session.transport.name
        self._receiving[session.peer_id, fetch_id] = pending

    def _take_refusal(self, session: _Session, message: FetchFailed, now: float) -> None:
        if message.fetch_id in session.given_up:
            session.given_up.remove(message.fetch_id)
            return
        pending = session.pending.get(message.fetch_id)
        if pending is None or pending.fetch.state is not FetchState.REQUESTED:
            raise RemoteProtocolError(f"FetchFailed of fetch {message.fetch_id}")
        del session.pending[message.fetch_id]
        is_over = message.failure in (FetchFailure.LEASE_ENDED, FetchFailure.UNKNOWN_TRANSFER)
        error = LeaseExpiredError if is_over else TransferError
        self._end(pending, now, error(f"the producer refused: {message.detail}"))

    def _close(self, session: _Session, now: float, error: PDError) -> None:
        """End a session. Fetches whose bytes move end with the transport's outcome."""
        if session.state is SessionState.CLOSED:
            return
        producer = session.producer
        logger.warning("session with engine %s ended: %s", producer.engine_id, error)
        if session.state is SessionState.GREETING:
            self.num_handshake_failures[outcome_of(error).value] += 1
        elif not isinstance(error, PeerLostError):
            try:
                session.client.send(Goodbye())
            except PeerLostError:
                logger.debug("no goodbye to %s", session.client.address)
        session.state = SessionState.CLOSED
        del producer.sessions[session.rank]
        if not producer.sessions:  # asked again next time: it may have moved
            self._producers.pop(producer.engine_id, None)
        self._num_changes += 1
        session.client.close(
            linger_s=0.0 if isinstance(error, PeerLostError) else _GOODBYE_LINGER_S
        )
        if session.transport is not None:
            session.transport.remove_peer(session.peer_id)
        waiting = [p for p in session.pending.values() if p.fetch.state is not FetchState.RECEIVING]
        session.pending.clear()
        for pending in waiting:
            self._end(pending, now, error)

    # From parts to results

    def _end(self, pending: _Pending, now: float, error: PDError | None) -> None:
        """Record the end of a part; the last one that moves bytes ends the order."""
        fetch, order = pending.fetch, pending.order
        fetch.advance(FetchState.FAILED if error else FetchState.DONE)
        if not pending.part.num_heads:
            if error is not None and not isinstance(error, LeaseExpiredError):
                # It was only to be told that it is not needed, and still holds its blocks.
                address = pending.worker.host, pending.worker.port
                self._outbox.send(address, Release(transfer_id=fetch.transfer_id), now)
            return
        requested = pending.requested or now
        ready = pending.ready or now
        order.handshake_s = max(order.handshake_s, requested - order.started)
        order.queued_s = max(order.queued_s, ready - requested)
        order.transfer_s = max(order.transfer_s, now - ready)
        order.error = order.error or error
        order.num_open -= 1
        if not order.num_open:
            self._finish(order, now)

    def _finish(self, order: _Order, now: float) -> None:
        """Report the end of an order; one that failed here gives its blocks back there."""
        request, error = order.request, order.error
        # What the prefill still took is no part of the fetch.
        started = order.started + (order.queued_s if request.wait_s else 0.0)
        record = FetchRecord(
            request_id=request.request_id,
            outcome=outcome_of(error),
            transport=order.transport,
            num_bytes=0 if error else order.num_bytes,
            num_bytes_saved=request.block_offset * self._local.layout.block_len,
            timeline=FetchTimeline(
                handshake_s=order.handshake_s,
                queued_s=order.queued_s,
                transfer_s=order.transfer_s,
                verify_s=order.verify_s,
                total_s=now - started,
            ),
        )
        self._results.append(FetchResult(request.request_id, request.block_ids, record, error))
        if error is not None and not isinstance(error, LeaseExpiredError):
            # Also after the loss of a peer: perhaps only a connection was lost.
            address = request.remote_host, request.remote_port
            self._outbox.send(address, Release(transfer_id=request.transfer_id), now)
