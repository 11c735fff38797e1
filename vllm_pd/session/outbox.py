"""One-way notices to other instances: releases, and renewals while requests queue here.

``Renewals`` decides what is due when; ``Outbox`` keeps the connections. Both belong
to the thread of the instance endpoint.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_pd.errors import PDError
from vllm_pd.protocol.messages import MAX_RENEWED, AnyMessage, Renew
from vllm_pd.session.channel import ControlClient, ControlContext

logger = logging.getLogger(__name__)

Address = tuple[str, int]
"""Host and port of an instance endpoint."""

_MAX_CLIENTS = 64
_IDLE_S = 30.0
_LINGER_S = 1.0  # for what was sent shortly before a connection is closed
_FIRST_RENEWAL_S = 1.0  # soon, as nobody knows how old the lease was when it came
_MIN_INTERVAL_S = 0.05  # a peer's word must not make a busy loop of it
_FRESH_S = 0.1  # a lease that came or was renewed so recently needs no further renewal
_MAX_RENEWED = 10_000


@dataclass(frozen=True, slots=True)
class RemoteLease:
    """A prefill that another instance keeps for a request here.

    Attributes:
        host: of the other instance's endpoint.
        port: of it.
        transfer_id: the prefill there.
        lease_s: how long it is kept, from the grant or the last renewal.
    """

    host: str
    port: int
    transfer_id: str
    lease_s: float

    @property
    def address(self) -> Address:
        """Where to renew it."""
        return self.host, self.port


@dataclass(slots=True)
class _Group:
    """All leases of one instance; they are renewed together."""

    due: float
    leases: dict[str, tuple[RemoteLease, float]] = field(default_factory=dict)  # with its last news


class Renewals:
    """Which leases elsewhere must be renewed, and when. Pure.

    Those of one instance are renewed together, three times as often as the shortest
    of them needs it.
    """

    def __init__(self) -> None:
        self._groups: dict[Address, _Group] = {}
        self._addresses: dict[str, Address] = {}  # by request id

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, request_id: str, lease: RemoteLease, now: float) -> float | None:
        """Renew a lease from now on; return when that is due, None if it cannot be.

        Beyond a bound no further leases are renewed: they end by themselves, and
        their prompts are recomputed.
        """
        if request_id in self._addresses or len(self._addresses) >= _MAX_RENEWED:
            return None
        due = now + min(_interval_s(lease), _FIRST_RENEWAL_S)
        group = self._groups.setdefault(lease.address, _Group(due))
        group.due = min(group.due, due)
        group.leases[request_id] = lease, now
        self._addresses[request_id] = lease.address
        return group.due

    def remove(self, request_id: str, now: float) -> RemoteLease | None:
        """Renew a lease no longer; return it if its last news are not fresh."""
        address = self._addresses.pop(request_id, None)
        if address is None:
            return None
        group = self._groups[address]
        lease, since = group.leases.pop(request_id)
        if not group.leases:
            del self._groups[address]
        return lease if now - since >= _FRESH_S else None

    def take_due(self, now: float) -> list[tuple[Address, list[str]]]:
        """Return the transfer ids to renew now, by instance."""
        due = []
        for address, group in self._groups.items():
            if group.due > now:
                continue
            leases = [lease for lease, _ in group.leases.values()]
            group.leases = {
                request_id: (lease, now) for request_id, (lease, _) in group.leases.items()
            }
            group.due = now + min(_interval_s(lease) for lease in leases)
            due.append((address, list(dict.fromkeys(lease.transfer_id for lease in leases))))
        return due

    def next_due(self) -> float | None:
        """Return when ``take_due`` has something."""
        return min((group.due for group in self._groups.values()), default=None)


def _interval_s(lease: RemoteLease) -> float:
    return max(lease.lease_s / 3, _MIN_INTERVAL_S)


def renew_messages(transfer_ids: list[str]) -> Iterator[Renew]:
    """Return what renews these leases, in as few messages as allowed."""
    for start in range(0, len(transfer_ids), MAX_RENEWED):
        yield Renew(transfer_ids=tuple(transfer_ids[start : start + MAX_RENEWED]))


@dataclass(slots=True)
class _Connection:
    client: ControlClient
    last_used: float


class Outbox:
    """Sends notices, best effort, over one connection for each instance.

    Connections that are idle, lost, or too many are closed. Poll the sockets of
    ``clients`` and call ``check`` when one is readable or ``next_deadline`` is there.

    Attributes:
        num_changes: of the set of clients.
        num_unsent: notices that could not be sent.
    """

    def __init__(self, context: ControlContext) -> None:
        self._context = context
        self._connections: OrderedDict[Address, _Connection] = OrderedDict()  # by last use
        self.num_changes = 0
        self.num_unsent = 0

    def clients(self) -> list[ControlClient]:
        """Return the clients whose ``socket`` and ``monitor`` are to be watched."""
        return [connection.client for connection in self._connections.values()]

    def send(self, address: Address, message: AnyMessage, now: float) -> None:
        """Queue a notice; never raises."""
        if not self._context.may_connect(address[0]):
            self.num_unsent += 1
            return
        try:
            self._client(address, now).send(message)
        except (PDError, ValueError) as exc:  # ValueError: an address that is no text
            self.num_unsent += 1
            self._drop(address, linger_s=0.0)
            logger.info("notice not sent: %s", exc)

    def check(self, now: float) -> None:
        """Close connections that are lost or idle."""
        for address, connection in list(self._connections.items()):
            try:
                connection.client.check()
                if connection.client.receive() is not None:
                    logger.info("%s answers a notice: closing", connection.client.address)
                    self._drop(address, linger_s=0.0)
                elif now - connection.last_used >= _IDLE_S:
                    self._drop(address, linger_s=_LINGER_S)
            except PDError as exc:
                logger.info("notices may be lost: %s", exc)
                self._drop(address, linger_s=0.0)

    def next_deadline(self) -> float | None:
        """Return when a connection becomes idle."""
        for connection in self._connections.values():
            return connection.last_used + _IDLE_S
        return None

    def close(self) -> None:
        """Close all connections, after trying to deliver what was sent; idempotent."""
        for address in list(self._connections):
            self._drop(address, linger_s=_LINGER_S)

    def _client(self, address: Address, now: float) -> ControlClient:
        """Return the client for an address, a new one if need be.

        Raises:
            PeerLostError: there can be none.
        """
        connection = self._connections.get(address)
        if connection is None:
            if len(self._connections) >= _MAX_CLIENTS:
                self._drop(next(iter(self._connections)), linger_s=_LINGER_S)
            connection = _Connection(self._context.client(*address), now)
            self._connections[address] = connection
            self.num_changes += 1
        connection.last_used = now
        self._connections.move_to_end(address)
        return connection.client

    def _drop(self, address: Address, *, linger_s: float) -> None:
        if connection := self._connections.pop(address, None):
            connection.client.close(linger_s=linger_s)
            self.num_changes += 1
