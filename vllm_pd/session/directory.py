"""The engines from which a consumer fetches: which workers they have, and for what.

Each tells it once, at its instance endpoint, which the request names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_pd.errors import (
    IncompatiblePeerError,
    PDError,
    PeerLostError,
    RemoteProtocolError,
    TransferError,
    TransferTimeoutError,
)
from vllm_pd.protocol.heads import Part, plan_parts
from vllm_pd.protocol.messages import AnyMessage, Describe, Hello, InstanceInfo, WorkerAddress
from vllm_pd.session.channel import ControlClient, ControlContext
from vllm_pd.session.fetch_session import FetchSession
from vllm_pd.session.fetches import FetchRequest, Order

logger = logging.getLogger(__name__)

_SILENT_S = 5.0  # an instance that did not answer in time is not asked again for so long


@dataclass(slots=True, eq=False)
class RemoteEngine:
    """An engine to fetch from, and the sessions with its workers.

    Attributes:
        engine_id: as the request names it.
        started: when it was first needed.
        deadline: of its description; None once that is there.
        client: to its instance endpoint, until it has described itself.
        parts: what to get from whom, once it has; with the workers' addresses.
        orders: those that wait for the description.
        sessions: by rank.
    """

    engine_id: str
    started: float
    deadline: float | None
    client: ControlClient | None
    parts: tuple[tuple[Part, WorkerAddress], ...] = ()
    orders: list[Order] = field(default_factory=list)
    sessions: dict[int, FetchSession] = field(default_factory=dict)

    @property
    def is_described(self) -> bool:
        """Whether it is known who its workers are."""
        return self.deadline is None


class Directory:
    """Knows engines by id, and asks those it does not know.

    Args:
        context: makes the control clients.
        local: what this worker announces.
        timeout_s: longest wait for a description.

    Attributes:
        num_changes: of the set of clients.
    """

    def __init__(self, context: ControlContext, local: Hello, timeout_s: float) -> None:
        self._context = context
        self._local = local
        self._timeout_s = timeout_s
        self._engines: dict[str, RemoteEngine] = {}
        self._silent: dict[str, float] = {}  # engines that did not answer, and until when
        self.num_changes = 0

    def __iter__(self) -> Iterator[RemoteEngine]:
        return iter(list(self._engines.values()))

    def clients(self) -> list[ControlClient]:
        """Return the clients whose sockets are to be watched."""
        return [e.client for e in self._engines.values() if e.client is not None]

    def find(self, request: FetchRequest, now: float) -> RemoteEngine:
        """Return the engine that a request names; one that is not known is asked.

        Raises:
            PDError: it may not be, or not now.
        """
        if engine := self._engines.get(request.remote_engine_id):
            return engine
        self._check_silent(request.remote_engine_id, now)
        if not self._context.may_connect(request.remote_host):
            raise IncompatiblePeerError(
                f"{request.remote_host} is another host and there is no cluster key",
                hint="set cluster_key_file on both sides",
            )
        client = self._context.client(request.remote_host, request.remote_port)
        client.send(Describe())
        engine = RemoteEngine(request.remote_engine_id, now, now + self._timeout_s, client)
        self.keep(engine)
        self.num_changes += 1
        return engine

    def keep(self, engine: RemoteEngine) -> None:
        """Know an engine, perhaps again."""
        self._engines[engine.engine_id] = engine

    def forget_session(self, session: FetchSession) -> None:
        """Forget a session; with the last one the engine, too, as it may have moved."""
        engine = self._engines[session.engine_id]
        del engine.sessions[session.rank]
        if not engine.sessions:
            del self._engines[session.engine_id]

    def take_description(self, engine: RemoteEngine) -> bool:
        """Look for the description of an engine that was asked; return whether it came now.

        Raises:
            PDError: it is of no use, or none can come any more.
        """
        assert engine.client is not None
        try:
            message = engine.client.receive()
            if message is None:
                engine.client.check()
                return False
            self._meet(engine, message)
        except PDError:
            raise
        except Exception as exc:
            logger.exception("description of engine %s", engine.engine_id)
            raise TransferError(f"internal error: {exc!r}") from exc
        return True

    def give_up(self, engine: RemoteEngine, now: float, error: PDError) -> list[Order]:
        """Forget an engine that did not describe itself; return what waited for that."""
        logger.warning("engine %s: %s", engine.engine_id, error)
        self._engines.pop(engine.engine_id, None)
        if isinstance(error, TransferTimeoutError):
            self._silent[engine.engine_id] = now + _SILENT_S
        self._close_client(engine)
        orders, engine.orders = engine.orders, []
        return orders

    def _check_silent(self, engine_id: str, now: float) -> None:
        """Do not let every request wait for an instance that just did not answer.

        Raises:
            TransferTimeoutError: it was asked a moment ago.
        """
        self._silent = {name: until for name, until in self._silent.items() if until > now}
        if engine_id in self._silent:
            raise TransferTimeoutError(f"engine {engine_id} did not answer a moment ago")

    def _meet(self, engine: RemoteEngine, info: AnyMessage) -> None:
        """Decide from which workers to fetch."""
        if not isinstance(info, InstanceInfo):
            raise RemoteProtocolError(f"{type(info).__name__} instead of a description")
        if info.engine_id != engine.engine_id:
            raise PeerLostError(f"engine {engine.engine_id} has restarted")
        if info.tp_size > len(info.workers):
            raise IncompatiblePeerError(
                f"engine {info.engine_id} describes {len(info.workers)} of {info.tp_size} workers"
            )
        parts = plan_parts(
            self._local.tp_rank,
            tp_size=self._local.tp_size,
            remote_tp_size=info.tp_size,
            num_kv_heads=self._local.fingerprint.num_kv_heads,
        )
        known = {worker.tp_rank: worker for worker in info.workers}
        for part in parts:
            worker = known.get(part.remote_rank)
            if worker is None or not self._context.may_connect(worker.host):
                raise IncompatiblePeerError(
                    f"engine {info.engine_id} has no reachable worker of rank {part.remote_rank}"
                )
        engine.parts = tuple((part, known[part.remote_rank]) for part in parts)
        engine.deadline = None
        self._close_client(engine)

    def _close_client(self, engine: RemoteEngine) -> None:
        if engine.client is not None:
            engine.client.close()
            engine.client = None
            self.num_changes += 1
