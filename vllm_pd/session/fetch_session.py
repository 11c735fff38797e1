"""A consumer's session with one worker of a producer: greeting, requests and answers.

What is over is returned to the caller, who ends orders and, after an error, the session.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import (
    IncompatiblePeerError,
    LeaseExpiredError,
    PDError,
    PeerLostError,
    RemoteProtocolError,
    TransferError,
)
from vllm_pd.protocol.handshake import check_compatible, choose_transport
from vllm_pd.protocol.messages import (
    AnyMessage,
    FetchBlocks,
    FetchFailed,
    FetchFailure,
    FetchReady,
    GiveUp,
    Goodbye,
    Hello,
    Refused,
    WorkerAddress,
)
from vllm_pd.protocol.state import FetchState, SessionState
from vllm_pd.session.channel import ControlClient, ControlContext
from vllm_pd.session.fetches import OrderPart
from vllm_pd.transport.base import Heads, Transport

logger = logging.getLogger(__name__)

_MESSAGES_PER_POLL = 256  # of one peer, so that none starves the others
_GOODBYE_LINGER_S = 0.2  # a lost goodbye costs the producer a forgotten session, no more

Refusal: TypeAlias = tuple[OrderPart, PDError]
"""A part that will not come, and why."""


@dataclass(frozen=True, slots=True)
class LocalEnd:
    """What every session of a consumer needs to know of it.

    Attributes:
        context: makes the control clients.
        hello: what this worker announces.
        transports: by name, best first.
        config: durations, and how much to verify.
        receiving: parts whose bytes may arrive, by peer id and fetch id; of sessions
            that have ended, too.
    """

    context: ControlContext
    hello: Hello
    transports: Mapping[str, Transport]
    config: ConnectorConfig
    receiving: dict[tuple[str, int], OrderPart] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class FetchSession:
    """See the module.

    Attributes:
        local: this end.
        session_id: random; the producer knows the session by it.
        engine_id: the producer.
        rank: its worker.
        client: to that worker.
        met: when its engine was first needed.
        deadline: of the handshake; None after it.
        state: of the session.
        transport: what was agreed on.
        pending: parts that have not ended and may be ended here, by fetch id.
        given_up: fetches whose answer is still to come.
    """

    local: LocalEnd
    session_id: bytes
    engine_id: str
    rank: int
    client: ControlClient
    met: float
    deadline: float | None
    state: SessionState = SessionState.GREETING
    transport: Transport | None = None
    pending: dict[int, OrderPart] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)

    @property
    def peer_id(self) -> str:
        """How transports know the producer's worker."""
        return self.session_id.hex()

    def add(self, part: OrderPart) -> None:
        """Take a part on; it is requested by ``request``, or when the handshake is over."""
        self.pending[part.fetch.fetch_id] = part

    def drain(self, now: float) -> Iterator[Refusal]:
        """Handle what has arrived; yield the parts that were refused.

        Raises:
            PDError: the session must end.
        """
        # Messages first: an answer may lie there although the peer is gone by now.
        for _ in range(_MESSAGES_PER_POLL):
            message = self.client.receive()
            if message is None:
                self.client.check()
                return
            if refusal := self._handle(message, now):
                yield refusal
            if self.state is SessionState.CLOSED:
                return

    def _handle(self, message: AnyMessage, now: float) -> Refusal | None:
        match message, self.state:
            case Hello(), SessionState.GREETING:
                self._get_ready(message, now)
            case Refused(), SessionState.GREETING:
                raise IncompatiblePeerError(f"the producer refused: {message.reason}")
            case Refused(), _:
                raise PeerLostError(f"the producer has ended the session: {message.reason}")
            case FetchReady(), SessionState.READY:
                self._receive(message.fetch_id, now)
            case FetchFailed(), SessionState.READY:
                return self._take_refusal(message)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} in state {self.state.name}")
        return None

    def _get_ready(self, hello: Hello, now: float) -> None:
        if (hello.engine_id, hello.tp_rank) != (self.engine_id, self.rank):
            raise PeerLostError(f"engine {self.engine_id} has restarted")
        check_compatible(self.local.hello, hello)
        transports = self.local.transports
        reachable = [
            name
            for name, endpoint in hello.endpoints.items()
            if name in transports and transports[name].can_reach(endpoint)
        ]
        name = choose_transport(list(transports), reachable)
        transport = transports[name]
        transport.add_peer(self.peer_id, hello.endpoints[name])
        self.transport, self.state, self.deadline = transport, SessionState.READY, None
        logger.info(
            "fetching from engine %s rank %d over %s (%s), after a handshake of %.0f ms",
            hello.engine_id,
            hello.tp_rank,
            name,
            transport.mode[0],
            (now - self.met) * 1e3,
        )
        for part in list(self.pending.values()):
            self.request(part, now)

    def request(self, part: OrderPart, now: float) -> None:
        """Ask for a part.

        Raises:
            PDError: the session must end.
        """
        assert self.transport is not None
        part.fetch.advance(FetchState.REQUESTED)
        part.requested = now
        request, heads = part.order.request, part.part
        self.client.send(
            FetchBlocks(
                fetch_id=part.fetch.fetch_id,
                transfer_id=request.transfer_id,
                transport=self.transport.name,
                block_offset=request.block_offset,
                num_blocks=len(request.block_ids),
                first_head=heads.remote_head,
                num_heads=heads.num_heads,
                num_readers=heads.num_readers,
                digests=self.local.config.digests,
                timeout_s=max(part.fetch.deadline - now, 0.001),
                prompt_digest=request.prompt_digest,
            )
        )

    def give_up(self, part: OrderPart) -> bool:
        """Want a part no more; return whether it is over by that.

        What was requested ends with the producer's answer, bytes on their way arrive.

        Raises:
            PDError: the session must end.
        """
        if part.fetch.state is FetchState.AWAITING_PEER:
            del self.pending[part.fetch.fetch_id]
            return True
        if part.fetch.state is FetchState.REQUESTED:
            self.client.send(GiveUp(fetch_id=part.fetch.fetch_id))
        return False

    def drop(self, part: OrderPart) -> bool:
        """Wait for a part no longer; return whether it was pending. Not for one that receives."""
        if self.pending.pop(part.fetch.fetch_id, None) is None:
            return False
        if part.fetch.state is FetchState.REQUESTED:
            self.given_up.add(part.fetch.fetch_id)
        return True

    def close(self, error: PDError) -> list[OrderPart]:
        """End the session; return the parts that end with it.

        Those that receive end with the transport's outcome.
        """
        is_lost = isinstance(error, PeerLostError)
        if self.state is SessionState.READY and not is_lost:
            try:
                self.client.send(Goodbye())
            except PeerLostError:
                logger.debug("no goodbye to %s", self.client.address)
        self.state = SessionState.CLOSED
        self.client.close(linger_s=0.0 if is_lost else _GOODBYE_LINGER_S)
        if self.transport is not None:
            self.transport.remove_peer(self.peer_id)
        waiting = [part for part in self.pending.values() if not part.is_receiving]
        self.pending.clear()
        return waiting

    def _receive(self, fetch_id: int, now: float) -> None:
        """Post our half of a transfer; a part that moves nothing is over without a word."""
        part = self.pending.get(fetch_id)
        if part is None or self.transport is None:
            raise RemoteProtocolError(f"FetchReady of unknown fetch {fetch_id}")
        fetch, heads = part.fetch, part.part
        if fetch.state is not FetchState.REQUESTED:
            raise RemoteProtocolError(f"FetchReady of fetch {fetch_id} in {fetch.state.name}")
        part.ready = now
        if not part.moves_bytes:
            del self.pending[fetch_id]
            return
        wanted: Heads | None = (heads.local_head, heads.num_heads)
        if heads.num_heads == self.local.hello.layout.num_heads:
            wanted = None
        self.transport.recv_blocks(
            self.peer_id,
            fetch_id,
            part.order.request.block_ids,
            heads=wanted,
            digests=self.local.config.digests,
        )
        fetch.advance(FetchState.RECEIVING)
        fetch.deadline = min(fetch.deadline, now + self.local.config.transfer_timeout_s)
        part.order.transport = self.transport.name
        self.local.receiving[self.peer_id, fetch_id] = part

    def _take_refusal(self, message: FetchFailed) -> Refusal | None:
        if message.fetch_id in self.given_up:
            self.given_up.remove(message.fetch_id)
            return None
        part = self.pending.get(message.fetch_id)
        if part is None or part.fetch.state is not FetchState.REQUESTED:
            raise RemoteProtocolError(f"FetchFailed of fetch {message.fetch_id}")
        del self.pending[message.fetch_id]
        is_over = message.failure in (FetchFailure.LEASE_ENDED, FetchFailure.UNKNOWN_TRANSFER)
        error = LeaseExpiredError if is_over else TransferError
        return part, error(f"the producer refused: {message.detail}")


def open_session(
    local: LocalEnd, engine_id: str, worker: WorkerAddress, *, met: float, now: float
) -> FetchSession:
    """Greet a worker; connecting goes on in the background.

    Args:
        local: this end.
        engine_id: the producer.
        worker: its worker.
        met: when the engine was first needed.
        now: the time.

    Raises:
        PeerLostError: that is no address, or there are no descriptors left.
    """
    # ZeroMQ reserves identities that start with a zero byte.
    session_id = b"\x01" + secrets.token_bytes(15)
    client = local.context.client(worker.host, worker.port, identity=session_id)
    client.send(local.hello)
    deadline = now + local.config.handshake_timeout_s
    return FetchSession(local, session_id, engine_id, worker.tp_rank, client, met, deadline)
