"""The consumer's half of a worker's sessions: one session per producer engine.

Runs on the session thread. A session finds the producer's worker through its
instance endpoint, shakes hands once, and then carries any number of fetches. A
session that fails takes its fetches with it and is rebuilt for the next one.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
from vllm_pd.protocol.messages import (
    AnyMessage,
    Describe,
    FetchBlocks,
    FetchFailed,
    FetchFailure,
    FetchReady,
    Goodbye,
    Hello,
    InstanceInfo,
    Refused,
)
from vllm_pd.protocol.state import Fetch, FetchState, SessionState
from vllm_pd.session.channel import ControlClient, ControlContext
from vllm_pd.session.instance import send_release
from vllm_pd.transport.base import TransferOutcome, Transport

logger = logging.getLogger(__name__)

_GOODBYE_LINGER_S = 0.2  # a lost goodbye costs the producer a forgotten session, no more


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
    """

    request_id: str
    transfer_id: str
    remote_engine_id: str
    remote_host: str
    remote_port: int
    block_offset: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The end of a fetch; ``error`` is None when every byte is in place."""

    request_id: str
    block_ids: tuple[int, ...]
    num_bytes: int
    duration_s: float
    error: PDError | None = None


@dataclass(frozen=True, slots=True)
class _Pending:
    """A fetch that has not ended."""

    fetch: Fetch
    request: FetchRequest
    started: float


@dataclass(slots=True, eq=False)
class _Session:
    session_id: bytes
    request: FetchRequest  # the first one; names the producer
    client: ControlClient
    started: float
    deadline: float | None  # of the handshake
    state: SessionState = SessionState.DESCRIBING
    transport: Transport | None = None
    fetches: dict[int, _Pending] = field(default_factory=dict)

    @property
    def peer_id(self) -> str:
        return self.session_id.hex()


class Consumer:
    """Fetches blocks from the workers of other engines.

    Args:
        context: makes the control clients.
        local: what this worker announces.
        transports: by name, best first.
        handshake_timeout_s: longest wait for a session to become ready.
        transfer_timeout_s: longest wait for a fetch, its session's handshake included.
    """

    def __init__(
        self,
        context: ControlContext,
        local: Hello,
        transports: Mapping[str, Transport],
        *,
        handshake_timeout_s: float,
        transfer_timeout_s: float,
    ) -> None:
        self._context = context
        self._local = local
        self._transports = transports
        self._handshake_timeout_s = handshake_timeout_s
        self._transfer_timeout_s = transfer_timeout_s
        self._fetch_ids = itertools.count(1)
        self._sessions: dict[str, _Session] = {}  # by the producer's engine id
        self._receiving: dict[tuple[str, int], _Pending] = {}
        self._results: list[FetchResult] = []
        self.num_changes = 0  # of the set of sockets

    def take_results(self) -> list[FetchResult]:
        """Return the fetches that ended since the last call."""
        results, self._results = self._results, []
        return results

    def clients(self) -> list[ControlClient]:
        """Return the control clients whose sockets are to be watched."""
        return [session.client for session in self._sessions.values()]

    def start(self, request: FetchRequest, now: float) -> None:
        """Begin a fetch; every fetch ends as exactly one result."""
        fetch = Fetch(
            next(self._fetch_ids),
            request.request_id,
            request.transfer_id,
            request.block_offset,
            request.block_ids,
            now + self._transfer_timeout_s,
        )
        pending = _Pending(fetch, request, now)
        session = self._sessions.get(request.remote_engine_id)
        if session is None:
            try:
                session = self._open(request, now)
            except PDError as exc:
                self._finish(pending, now, exc)
                return
        session.fetches[fetch.fetch_id] = pending
        if session.state is SessionState.READY:
            self._guard(session, now, lambda: self._request(session, fetch))

    def poll(self, now: float) -> None:
        """Handle what arrived on the sessions, and losses of peers."""
        for session in list(self._sessions.values()):
            self._guard(session, now, lambda session=session: self._drain(session, now))  # type: ignore[misc]

    def end_transfer(self, outcome: TransferOutcome, now: float) -> bool:
        """Take note of a transport's outcome; return whether it was one of ours."""
        pending = self._receiving.pop((outcome.peer_id, outcome.transfer_id), None)
        if pending is None:
            return False
        for session in list(self._sessions.values()):
            if session.peer_id == outcome.peer_id:
                session.fetches.pop(outcome.transfer_id, None)
                if outcome.error is not None:
                    self._close(session, now, outcome.error)
        self._finish(pending, now, outcome.error, outcome.num_bytes)
        return True

    def expire(self, now: float) -> None:
        """Fail what is overdue; a session with an overdue fetch is not trusted further."""
        for session in list(self._sessions.values()):
            overdue = [p.fetch for p in session.fetches.values() if p.fetch.deadline <= now]
            if session.deadline is not None and session.deadline <= now:
                self._close(session, now, TransferTimeoutError("no answer to the handshake"))
            elif overdue:
                what = f"transfer {overdue[0].transfer_id} took too long"
                self._close(session, now, TransferTimeoutError(what))

    def next_deadline(self) -> float | None:
        """Return when ``expire`` has something to do."""
        times = [s.deadline for s in self._sessions.values() if s.deadline is not None]
        for session in self._sessions.values():
            times += [pending.fetch.deadline for pending in session.fetches.values()]
        return min(times, default=None)

    def close(self, now: float) -> None:
        """End all sessions; their fetches fail."""
        for session in list(self._sessions.values()):
            self._close(session, now, TransferError("this engine shuts down"))

    def _open(self, request: FetchRequest, now: float) -> _Session:
        if not self._context.may_connect(request.remote_host):
            raise IncompatiblePeerError(
                f"{request.remote_host} is another host and there is no cluster key",
                hint="set cluster_key_file on both sides",
            )
        client = self._context.client(request.remote_host, request.remote_port)
        # ZeroMQ reserves identities that start with a zero byte.
        session_id = b"\x01" + secrets.token_bytes(15)
        session = _Session(session_id, request, client, now, now + self._handshake_timeout_s)
        client.send(Describe())
        self._sessions[request.remote_engine_id] = session
        self.num_changes += 1
        return session

    def _guard(self, session: _Session, now: float, step: Callable[[], None]) -> None:
        """Run one step of a session; a fault of the peer or of the session ends it."""
        try:
            step()
        except PDError as exc:
            self._close(session, now, exc)
        except Exception as exc:
            logger.exception("session with engine %s", session.request.remote_engine_id)
            self._close(session, now, TransferError(f"internal error: {exc!r}"))

    def _drain(self, session: _Session, now: float) -> None:
        # Messages first: an answer may lie there although the peer is gone by now.
        while session.state is not SessionState.CLOSED:
            message = session.client.receive()
            if message is None:
                break
            self._handle(session, message, now)
        if session.state is not SessionState.CLOSED:
            session.client.check()

    def _handle(self, session: _Session, message: AnyMessage, now: float) -> None:
        match message, session.state:
            case InstanceInfo(), SessionState.DESCRIBING:
                self._greet(session, message)
            case Hello(), SessionState.GREETING:
                self._get_ready(session, message, now)
            case Refused(), _:
                raise IncompatiblePeerError(f"the producer refused: {message.reason}")
            case FetchReady(), SessionState.READY:
                self._receive(session, message.fetch_id)
            case FetchFailed(), SessionState.READY:
                self._take_refusal(session, message, now)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} in state {session.state.name}")

    def _greet(self, session: _Session, info: InstanceInfo) -> None:
        if info.engine_id != session.request.remote_engine_id:
            raise PeerLostError(f"engine {session.request.remote_engine_id} has restarted")
        if info.tp_size != self._local.tp_size:
            raise IncompatiblePeerError(
                f"engine {info.engine_id}: tp_size: {self._local.tp_size} != {info.tp_size}",
                hint="unequal tensor parallelism is not supported yet",
            )
        ours = [w for w in info.workers if w.tp_rank == self._local.tp_rank]
        if not ours or not self._context.may_connect(ours[0].host):
            raise IncompatiblePeerError(
                f"engine {info.engine_id} has no reachable worker of rank {self._local.tp_rank}"
            )
        session.client.close()
        session.client = self._context.client(
            ours[0].host, ours[0].port, identity=session.session_id
        )
        self.num_changes += 1
        session.client.send(self._local)
        session.state = SessionState.GREETING

    def _get_ready(self, session: _Session, hello: Hello, now: float) -> None:
        check_compatible(self._local, hello)
        if hello.engine_id != session.request.remote_engine_id:
            raise PeerLostError(f"engine {session.request.remote_engine_id} has restarted")
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
            "fetching from engine %s over %s, after a handshake of %.0f ms",
            hello.engine_id,
            name,
            (now - session.started) * 1e3,
        )
        for pending in list(session.fetches.values()):
            self._request(session, pending.fetch)

    def _request(self, session: _Session, fetch: Fetch) -> None:
        assert session.transport is not None
        fetch.advance(FetchState.REQUESTED)
        session.client.send(
            FetchBlocks(
                fetch_id=fetch.fetch_id,
                transfer_id=fetch.transfer_id,
                transport=session.transport.name,
                block_offset=fetch.block_offset,
                num_blocks=len(fetch.block_ids),
            )
        )

    def _receive(self, session: _Session, fetch_id: int) -> None:
        if fetch_id not in session.fetches or session.transport is None:
            raise RemoteProtocolError(f"FetchReady of unknown fetch {fetch_id}")
        pending = session.fetches[fetch_id]
        fetch = pending.fetch
        if fetch.state is not FetchState.REQUESTED:
            raise RemoteProtocolError(f"FetchReady of fetch {fetch_id} in {fetch.state.name}")
        session.transport.recv_blocks(session.peer_id, fetch_id, fetch.block_ids)
        fetch.advance(FetchState.RECEIVING)
        self._receiving[session.peer_id, fetch_id] = pending

    def _take_refusal(self, session: _Session, message: FetchFailed, now: float) -> None:
        pending = session.fetches.get(message.fetch_id)
        if pending is None or pending.fetch.state is not FetchState.REQUESTED:
            raise RemoteProtocolError(f"FetchFailed of fetch {message.fetch_id}")
        del session.fetches[message.fetch_id]
        is_over = message.failure in (FetchFailure.LEASE_ENDED, FetchFailure.UNKNOWN_TRANSFER)
        error = LeaseExpiredError if is_over else TransferError
        self._finish(pending, now, error(f"the producer refused: {message.detail}"))

    def _close(self, session: _Session, now: float, error: PDError) -> None:
        """End a session. Fetches whose bytes move end with the transport's outcome."""
        if session.state is SessionState.CLOSED:
            return
        logger.warning("session with engine %s ended: %s", session.request.remote_engine_id, error)
        if session.state is SessionState.READY and not isinstance(error, PeerLostError):
            try:
                session.client.send(Goodbye())
            except PeerLostError:
                logger.debug("no goodbye to %s", session.client.address)
        session.state = SessionState.CLOSED
        del self._sessions[session.request.remote_engine_id]
        self.num_changes += 1
        session.client.close(
            linger_s=0.0 if isinstance(error, PeerLostError) else _GOODBYE_LINGER_S
        )
        if session.transport is not None:
            session.transport.remove_peer(session.peer_id)
        for pending in session.fetches.values():
            if pending.fetch.state is not FetchState.RECEIVING:
                self._finish(pending, now, error)
        session.fetches.clear()

    def _finish(
        self, pending: _Pending, now: float, error: PDError | None, num_bytes: int = 0
    ) -> None:
        """Report the end of a fetch; one that failed here gives its blocks back there."""
        fetch, request = pending.fetch, pending.request
        fetch.advance(FetchState.FAILED if error else FetchState.DONE)
        self._results.append(
            FetchResult(fetch.request_id, fetch.block_ids, num_bytes, now - pending.started, error)
        )
        if error is not None and not isinstance(error, (PeerLostError, LeaseExpiredError)):
            send_release(
                self._context, request.remote_host, request.remote_port, request.transfer_id
            )
