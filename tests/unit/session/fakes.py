"""Control network and transport in memory: nothing happens before a test lets it."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from vllm_pd.config import Digests
from vllm_pd.errors import (
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    TransferError,
)
from vllm_pd.protocol.messages import AnyMessage, decode, encode
from vllm_pd.session.channel import ControlClient, ControlContext, ControlServer
from vllm_pd.transport.base import Heads, KVRegion, TransferOutcome, Transport

HOST = "127.0.0.1"


@dataclass(eq=False)
class Channel:
    """What is under way between one client and its server.

    Attributes:
        port: of the server.
        identity: how the server sees the client.
        to_server: frames under way.
        to_client: frames under way.
        inbox: frames that the client may receive.
        is_lost: whether the client sees that the server is gone.
        is_closed: whether the client has closed.
    """

    port: int
    identity: bytes
    to_server: deque[bytes] = field(default_factory=deque)
    to_client: deque[bytes] = field(default_factory=deque)
    inbox: deque[bytes] = field(default_factory=deque)
    is_lost: bool = False
    is_closed: bool = False

    def lose(self) -> None:
        """Cut the connection; what was under way does not arrive."""
        self.is_lost = True
        self.to_server.clear()
        self.to_client.clear()


class FakeClient:
    """A ControlClient on a channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.address = f"fake:{channel.port}"

    def send(self, message: AnyMessage) -> None:
        assert not self.channel.is_closed
        if not self.channel.is_lost:
            self.channel.to_server.append(encode(message))

    def receive(self) -> AnyMessage | None:
        assert not self.channel.is_closed
        return decode(self.channel.inbox.popleft()) if self.channel.inbox else None

    def check(self) -> None:
        if self.channel.is_lost:
            raise PeerLostError(f"{self.address}: lost")

    def close(self, *, linger_s: float = 0.0) -> None:
        self.channel.is_closed = True
        self.channel.to_client.clear()
        if not linger_s:
            self.channel.to_server.clear()


class FakeServer:
    """The answering side of a ControlServer."""

    def __init__(self, network: Network, port: int) -> None:
        self.num_dropped: Counter[str] = Counter()
        self._network = network
        self._port = port

    def send(self, identity: bytes, message: AnyMessage) -> None:
        for channel in self._network.channels:
            if (channel.port, channel.identity) == (self._port, identity):
                if not channel.is_lost and not channel.is_closed:
                    channel.to_client.append(encode(message))
                return

    def as_server(self) -> ControlServer:
        return cast(ControlServer, self)


class Network:
    """All channels, in the order in which they were opened; also the ControlContext."""

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.num_refused_clients = 0  # of the next ones to be opened
        self._numbers = itertools.count()

    def may_connect(self, host: str) -> bool:
        return host == HOST

    def client(self, host: str, port: int, *, identity: bytes | None = None) -> ControlClient:
        if self.num_refused_clients:
            self.num_refused_clients -= 1
            raise PeerLostError(f"{host} port {port}: out of descriptors")
        channel = Channel(port, identity or f"anonymous-{next(self._numbers)}".encode())
        self.channels.append(channel)
        return cast(ControlClient, FakeClient(channel))

    def as_context(self) -> ControlContext:
        return cast(ControlContext, self)


@dataclass(eq=False)
class Half:
    """One side of a transfer, from its posting to the poll that returns its outcome."""

    end: MemoryTransport
    peer_id: str
    is_sender: bool
    transfer_id: int
    block_ids: tuple[int, ...]
    heads: Heads
    is_busy: bool = False
    is_copied: bool = False
    outcome: TransferOutcome | None = None
    error: TransferError | None = None

    @property
    def is_live(self) -> bool:
        return self.outcome is None and self.error is None

    def finish(self, error: TransferError | None = None) -> None:
        """End this half, as soon as nothing touches its blocks any more."""
        if self.outcome is not None:
            return
        self.error = self.error or error
        if not self.is_busy:
            num_bytes = 0 if self.error else len(self.block_ids)
            self.outcome = TransferOutcome(self.peer_id, self.transfer_id, num_bytes, self.error)


class Fabric:
    """What joins the transports: a test decides when and how transfers go on."""

    def __init__(self) -> None:
        self.ends: dict[bytes, MemoryTransport] = {}
        self.broken: set[str] = set()  # peer ids whose link is cut

    def pairs(self, condition: Callable[[Half, Half], bool]) -> list[tuple[Half, Half]]:
        """Return ``(sender, receiver)`` of transfers that both sides have posted."""
        halves = [half for end in self.ends.values() for half in end.halves]
        senders = {(h.peer_id, h.transfer_id): h for h in halves if h.is_sender}
        found = []
        for receiver in halves:
            sender = senders.get((receiver.peer_id, receiver.transfer_id))
            if sender is not None and not receiver.is_sender and condition(sender, receiver):
                found.append((sender, receiver))
        return found

    def startable(self) -> list[tuple[Half, Half]]:
        return self.pairs(
            lambda s, r: (
                s.is_live
                and r.is_live
                and not r.is_busy
                and not r.is_copied
                and s.peer_id not in self.broken
            )
        )

    def receivers(self) -> list[Half]:
        """Return the receiving halves whose blocks are being written."""
        return [h for end in self.ends.values() for h in end.halves if h.is_busy]

    def end_copy(self, receiver: Half, error: TransferError | None) -> None:
        """Write the blocks; tell both sides if they still listen."""
        sender = next((s for s, r in self.pairs(lambda *_: True) if r is receiver), None)
        receiver.is_busy = False
        if receiver.error is not None:
            receiver.finish()
        elif sender is not None and sender.is_live and receiver.peer_id not in self.broken:
            self._copy(sender, receiver)
            if error is None:
                sender.finish()
                receiver.is_copied = True
            else:
                sender.finish(TransferError("given up"))
                receiver.finish(error)

    def confirmable(self) -> list[Half]:
        """Return the receiving halves that wait for the sender's word."""
        return [
            h
            for end in self.ends.values()
            for h in end.halves
            if h.is_copied and h.is_live and h.peer_id not in self.broken
        ]

    def _copy(self, sender: Half, receiver: Half) -> None:
        assert sender.heads[1] == receiver.heads[1]
        for src, dst in zip(sender.block_ids, receiver.block_ids, strict=True):
            for i in range(sender.heads[1]):
                content = sender.end.cache[src, sender.heads[0] + i]
                receiver.end.cache[dst, receiver.heads[0] + i] = content


class MemoryTransport(Transport):
    """A Transport whose blocks are entries of a dict, by block id and head."""

    name = "memory"

    def __init__(self, fabric: Fabric, address: bytes, *, num_heads: int, num_blocks: int) -> None:
        self.cache: dict[tuple[int, int], object] = {}
        self.halves: list[Half] = []
        self.peers: set[str] = set()
        self._address = address
        self._num_heads = num_heads
        self._num_blocks = num_blocks
        self._fabric = fabric
        fabric.ends[address] = self

    def register_regions(self, regions: Sequence[KVRegion]) -> None:
        raise NotImplementedError

    def local_endpoint(self) -> bytes:
        return self._address

    def can_reach(self, endpoint: bytes) -> bool:
        return endpoint in self._fabric.ends

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:
        if endpoint not in self._fabric.ends:
            raise RemoteProtocolError("no such endpoint")
        if peer_id in self.peers:
            raise LocalProtocolError(f"peer {peer_id} is there already")
        self.peers.add(peer_id)

    def remove_peer(self, peer_id: str) -> None:
        if peer_id in self.peers:
            self.peers.remove(peer_id)
            self._fabric.broken.add(peer_id)
            self.notice_loss(peer_id)

    def notice_loss(self, peer_id: str) -> None:
        """See that a link is cut."""
        for half in self.halves:
            if half.peer_id == peer_id:
                half.finish(PeerLostError("lost"))

    def send_blocks(
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        self._post(peer_id, transfer_id, block_ids, heads, is_sender=True)

    def recv_blocks(
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        self._post(peer_id, transfer_id, block_ids, heads, is_sender=False)

    def fileno(self) -> int:
        raise NotImplementedError

    def poll(self) -> list[TransferOutcome]:
        outcomes = []
        stuck: set[tuple[str, bool]] = set()
        for half in list(self.halves):
            queue = half.peer_id, half.is_sender
            if half.outcome is None:
                stuck.add(queue)
            elif queue not in stuck:
                self.halves.remove(half)
                outcomes.append(half.outcome)
        return outcomes

    def close(self) -> None:
        for peer_id in list(self.peers):
            self.remove_peer(peer_id)

    def _post(
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        heads: Heads | None,
        *,
        is_sender: bool,
    ) -> None:
        chosen = heads if heads is not None else (0, self._num_heads)
        if peer_id not in self.peers:
            raise LocalProtocolError(f"unknown peer {peer_id}")
        if not all(0 <= block_id < self._num_blocks for block_id in block_ids):
            raise LocalProtocolError("block ids out of range")
        if chosen[0] < 0 or chosen[1] < 1 or sum(chosen) > self._num_heads:
            raise LocalProtocolError("heads out of range")
        if any(
            (h.peer_id, h.is_sender, h.transfer_id) == (peer_id, is_sender, transfer_id)
            for h in self.halves
        ):
            raise LocalProtocolError(f"transfer {transfer_id} is posted already")
        half = Half(self, peer_id, is_sender, transfer_id, tuple(block_ids), chosen)
        self.halves.append(half)
