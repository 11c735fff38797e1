"""The producer's half of a worker's sessions: leases, and fetches of them.

Runs on the session thread. Decisions are in ``protocol.state``; this module
turns messages and outcomes into calls of it and answers the peers.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import (
    IncompatiblePeerError,
    LeaseExpiredError,
    LocalProtocolError,
    RemoteProtocolError,
)
from vllm_pd.protocol.handshake import check_compatible
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
    Release,
)
from vllm_pd.protocol.state import LeaseTable
from vllm_pd.session.channel import ControlServer
from vllm_pd.transport.base import Heads, TransferOutcome, Transport

logger = logging.getLogger(__name__)

MAX_SESSIONS = 1024
MAX_PARKED = 4096
_PARKED_SHARE = 0.8
"""Part of a consumer's patience that a fetch may be parked: it hears of the end in time."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A finished prefill whose blocks vLLM keeps for a consumer."""

    transfer_id: str
    request_id: str
    block_ids: tuple[int, ...]
    prompt_digest: str = ""


@dataclass(frozen=True, slots=True)
class _Parked:
    """A fetch that came before the grant of its transfer."""

    identity: bytes
    fetch: FetchBlocks
    deadline: float


@dataclass(frozen=True, slots=True)
class _Session:
    """With one worker of a consumer."""

    peer_id: str
    engine_id: str
    rank: int


@dataclass(frozen=True, slots=True)
class _Running:
    """A fetch that is being read."""

    identity: bytes
    fetch: FetchBlocks
    session: _Session
    deadline: float


class Producer:
    """Serves the consumers of one worker's KV cache.

    Args:
        server: answers go out through it.
        local: what this worker announces.
        transports: by name.
        config: durations.

    Attributes:
        num_bytes_sent: bytes that consumers have got.
        num_granted: leases that began.
        num_refused: consumers whose handshake was refused.
    """

    def __init__(
        self,
        server: ControlServer,
        local: Hello,
        transports: Mapping[str, Transport],
        config: ConnectorConfig,
    ) -> None:
        self._server = server
        self._local = local
        self._transports = transports
        self._fetch_timeout_s = config.transfer_timeout_s
        self._leases = LeaseTable(config.lease_s, config.max_lease_s)
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()  # by identity
        self.num_bytes_sent = self.num_granted = self.num_refused = 0
        self._parked: list[_Parked] = []
        self._running: dict[tuple[str, int], _Running] = {}
        self._freed: list[str] = []

    def take_freed(self) -> list[str]:
        """Return the requests whose blocks vLLM may have back."""
        freed, self._freed = self._freed, []
        return freed

    def grant(self, grant: Grant, now: float) -> None:
        """Start a lease and serve the fetches that wait for it."""
        try:
            unwanted = self._leases.grant(
                grant.transfer_id,
                request_id=grant.request_id,
                block_ids=grant.block_ids,
                now=now,
                prompt_digest=grant.prompt_digest,
            )
        except LocalProtocolError as exc:
            logger.error("%s: %s", grant.request_id, exc)  # noqa: TRY400 - no bug to trace
            self._freed.append(grant.request_id)
            return
        self.num_granted += 1
        if unwanted is not None:
            self._freed.append(unwanted)
        waiting = [p for p in self._parked if p.fetch.transfer_id == grant.transfer_id]
        self._parked = [p for p in self._parked if p.fetch.transfer_id != grant.transfer_id]
        for parked in waiting:
            self._serve(parked.identity, parked.fetch, now)

    @property
    def leases(self) -> LeaseTable:
        """The leases, to be read."""
        return self._leases

    def renew(self, transfer_id: str, now: float) -> None:
        """Prolong a lease whose consumer still queues."""
        self._leases.renew(transfer_id, now)

    def release(self, transfer_id: str) -> None:
        """End a lease early."""
        if request_id := self._leases.release(transfer_id):
            self._freed.append(request_id)

    def handle(self, identity: bytes, message: AnyMessage, now: float) -> None:
        """React to one message of one peer."""
        try:
            self._react(identity, message, now)
        except Exception:
            # A bug must cost one peer, not all.
            logger.exception("message of a consumer; its session ends")
            self._forget(identity)

    def _react(self, identity: bytes, message: AnyMessage, now: float) -> None:
        match message:
            case Hello():
                self._greet(identity, message)
            case FetchBlocks() if identity in self._sessions:
                self._fetch(identity, message, now)
            case FetchBlocks():
                self._server.send(identity, Refused(reason="no session; say Hello first"))
            case GiveUp():
                self._unpark(identity, message.fetch_id)
            case Release():
                self.release(message.transfer_id)
            case Goodbye():
                self._forget(identity)
            case _:
                self._server.num_dropped["unexpected"] += 1

    def end_transfer(self, outcome: TransferOutcome) -> bool:
        """Take note of a transport's outcome; return whether it was one of ours."""
        running = self._running.pop((outcome.peer_id, outcome.transfer_id), None)
        if running is None:
            return False
        if outcome.error is not None:
            logger.warning(
                "transfer %s not delivered: %s", running.fetch.transfer_id, outcome.error
            )
        self.num_bytes_sent += outcome.num_bytes
        self._end_fetch(running.fetch, running.session, delivered=outcome.error is None)
        return True

    def expire(self, now: float) -> None:
        """End what is overdue."""
        for request_id in self._leases.expire(now):
            logger.warning("%s: nobody fetched its KV cache before the lease ended", request_id)
            self._freed.append(request_id)
        for parked in [p for p in self._parked if p.deadline <= now]:
            self._parked.remove(parked)
            self._refuse(
                parked.identity,
                parked.fetch,
                FetchFailure.UNKNOWN_TRANSFER,
                f"no transfer {parked.fetch.transfer_id}",
            )
        for key, running in list(self._running.items()):
            if running.deadline <= now:
                logger.warning(
                    "transfer %s: the consumer does not finish", running.fetch.transfer_id
                )
                # The lease stays protected until the transport lets go of the blocks.
                self._running[key] = replace(running, deadline=math.inf)
                self._forget(running.identity)

    def next_deadline(self) -> float | None:
        """Return when ``expire`` has something to do."""
        times = [parked.deadline for parked in self._parked]
        times += [r.deadline for r in self._running.values() if r.deadline < math.inf]
        if (expiry := self._leases.next_expiry()) is not None:
            times.append(expiry)
        return min(times, default=None)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if identity in self._sessions:
            self._server.num_dropped["unexpected"] += 1
            return
        peer_id = identity.hex()
        try:
            check_compatible(self._local, hello)
            for name in self._common_transports(hello):
                self._transports[name].add_peer(peer_id, hello.endpoints[name])
        except (IncompatiblePeerError, RemoteProtocolError, LocalProtocolError) as exc:
            logger.warning("refused a consumer: %s", exc)
            self.num_refused += 1
            for transport in self._transports.values():
                transport.remove_peer(peer_id)
            self._server.send(identity, Refused(reason=str(exc)))
            return
        self._sessions[identity] = _Session(peer_id, hello.engine_id, hello.tp_rank)
        self._server.send(identity, self._local)
        if len(self._sessions) > MAX_SESSIONS:
            busy = {running.identity for running in self._running.values()}
            idle = next((i for i in self._sessions if i not in busy and i != identity), None)
            if idle is not None:
                self._forget(idle)

    def _common_transports(self, hello: Hello) -> Sequence[str]:
        return [name for name in self._transports if name in hello.endpoints]

    def _fetch(self, identity: bytes, fetch: FetchBlocks, now: float) -> None:
        self._sessions.move_to_end(identity)
        if self._leases.has_ended(fetch.transfer_id) or len(self._parked) >= MAX_PARKED:
            detail = f"transfer {fetch.transfer_id} is over"
            self._refuse(identity, fetch, FetchFailure.LEASE_ENDED, detail)
        elif fetch.transfer_id in self._leases:
            self._serve(identity, fetch, now)
        else:
            self._parked.append(_Parked(identity, fetch, now + fetch.timeout_s * _PARKED_SHARE))

    def _unpark(self, identity: bytes, fetch_id: int) -> None:
        """Drop a fetch that waits for its grant; what is served already goes on."""
        for parked in self._parked:
            if (parked.identity, parked.fetch.fetch_id) == (identity, fetch_id):
                self._parked.remove(parked)
                self._refuse(
                    identity, parked.fetch, FetchFailure.LEASE_ENDED, "given up by the consumer"
                )
                return

    def _serve(self, identity: bytes, fetch: FetchBlocks, now: float) -> None:
        session = self._sessions.get(identity)
        if session is None:
            return
        key = session.peer_id, fetch.fetch_id
        transport = self._transports.get(fetch.transport)
        if transport is None or key in self._running:
            detail = f"fetch {fetch.fetch_id} over {fetch.transport}"
            self._refuse(identity, fetch, FetchFailure.TRANSPORT, detail)
            return
        try:
            block_ids = self._leases.begin_fetch(
                fetch.transfer_id,
                block_offset=fetch.block_offset,
                num_blocks=fetch.num_blocks,
                prompt_digest=fetch.prompt_digest,
            )
        except LeaseExpiredError as exc:
            self._refuse(identity, fetch, FetchFailure.LEASE_ENDED, str(exc))
            return
        except RemoteProtocolError as exc:
            self._refuse(identity, fetch, FetchFailure.OUT_OF_RANGE, str(exc))
            return
        if not fetch.num_heads:
            self._end_fetch(fetch, session, delivered=True)
            self._server.send(identity, FetchReady(fetch_id=fetch.fetch_id))
            return
        heads: Heads | None = (fetch.first_head, fetch.num_heads)
        if heads == (0, self._local.layout.num_heads):
            heads = None
        try:
            transport.send_blocks(
                session.peer_id, fetch.fetch_id, block_ids, heads=heads, digests=fetch.digests
            )
        except Exception as exc:  # a plugin's bug, too: else the lease would be read for ever
            failure, detail = FetchFailure.OUT_OF_RANGE, str(exc)
            if not isinstance(exc, LocalProtocolError):
                logger.exception("transport %s fails to send", fetch.transport)
                failure, detail = FetchFailure.TRANSPORT, f"{fetch.transport} fails to send"
            self._end_fetch(fetch, session, delivered=False)
            self._refuse(identity, fetch, failure, detail)
            return
        deadline = now + min(fetch.timeout_s, self._fetch_timeout_s)
        self._running[key] = _Running(identity, fetch, session, deadline)
        self._server.send(identity, FetchReady(fetch_id=fetch.fetch_id))

    def _end_fetch(self, fetch: FetchBlocks, session: _Session, *, delivered: bool) -> None:
        request_id = self._leases.end_fetch(
            fetch.transfer_id,
            consumer=session.engine_id,
            rank=session.rank,
            num_readers=fetch.num_readers,
            delivered=delivered,
        )
        if request_id is not None:
            self._freed.append(request_id)

    def _refuse(
        self, identity: bytes, fetch: FetchBlocks, failure: FetchFailure, detail: str
    ) -> None:
        logger.warning("refused a fetch: %s", detail)
        answer = FetchFailed(fetch_id=fetch.fetch_id, failure=failure, detail=detail)
        self._server.send(identity, answer)

    def _forget(self, identity: bytes) -> None:
        """End a session; its running transfers end with an outcome of the transport."""
        if session := self._sessions.pop(identity, None):
            self._parked = [p for p in self._parked if p.identity != identity]
            for transport in self._transports.values():
                transport.remove_peer(session.peer_id)
