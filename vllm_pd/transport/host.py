"""What the transports for host memory share: posting, links, and how transfers fail.

A subclass says what a posted half sends and how it answers frames; this class
sees to the contract of ``Transport``. It knows no implementation.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence

import msgspec

from vllm_pd.config import Digests
from vllm_pd.errors import (
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    TransportUnavailableError,
)
from vllm_pd.transport.base import (
    Heads,
    KVRegion,
    TransferOutcome,
    Transport,
    check_selection,
)
from vllm_pd.transport.chunks import slice_len
from vllm_pd.transport.ledger import Ledger, Posted
from vllm_pd.transport.link import Mark
from vllm_pd.transport.links import Direction, LinkEvent, LinkPool

logger = logging.getLogger(__name__)


class HostTransport(Transport):
    """A transport whose peers talk over links.

    Args:
        links: the subclass's links; closed by ``close``.
    """

    def __init__(self, links: LinkPool) -> None:
        self._links = links
        self._ledger = Ledger()
        self._regions: Sequence[KVRegion] = ()

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        if devices := {region.device for region in regions} - {"cpu"}:
            raise TransportUnavailableError(
                f"the {self.name} transport reaches host memory, not "
                f"{', '.join(sorted(devices))} memory"
            )
        self._regions = tuple(regions)

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:  # noqa: D102
        self._links.add_peer(peer_id, endpoint)

    def remove_peer(self, peer_id: str) -> None:  # noqa: D102
        self._links.remove_peer(peer_id)
        self._fail(peer_id, f"peer {peer_id} was removed")

    def send_blocks(  # noqa: D102
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        posted = self._post(peer_id, Direction.SENDING, transfer_id, block_ids, heads)
        posted.digests = digests
        if self._links.is_up(peer_id, Direction.SENDING):
            self._start_sending(posted)

    def recv_blocks(  # noqa: D102
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        posted = self._post(peer_id, Direction.RECEIVING, transfer_id, block_ids, heads)
        posted.digests = digests
        self._links.open_links(peer_id)
        try:
            self._start_receiving(posted)
        except RemoteProtocolError as exc:
            self._lose(peer_id, Direction.RECEIVING, str(exc))

    def fileno(self) -> int:  # noqa: D102
        return self._links.fileno()

    def poll(self) -> list[TransferOutcome]:  # noqa: D102
        for event in self._links.poll():
            try:
                self._handle(event)
            except (
                RemoteProtocolError,
                msgspec.DecodeError,
                UnicodeDecodeError,
                OSError,
            ) as exc:
                self._lose(event.peer_id, event.direction, str(exc))
            except Exception as exc:
                # A bug must cost one peer, not all.
                logger.exception("%s: link of %s", self.name, event.peer_id)
                self._lose(event.peer_id, event.direction, f"internal error: {exc!r}")
        return self._ledger.drain()

    def close(self) -> None:  # noqa: D102
        self._links.close()
        self._ledger.fail_all(PeerLostError("the transport was closed"))

    @abstractmethod
    def _start_sending(self, posted: Posted) -> None:
        """Send what the producer's half of a transfer begins with; the link is up."""

    @abstractmethod
    def _start_receiving(self, posted: Posted) -> None:
        """Go on with a transfer that the producer may have announced already.

        Raises:
            RemoteProtocolError: what it announced does not fit.
        """

    @abstractmethod
    def _handle_frame(self, event: LinkEvent, frame: bytes) -> None:
        """React to a frame.

        Raises:
            RemoteProtocolError: it is not allowed here; the link is closed.
            msgspec.DecodeError: it is none; likewise.
            UnicodeDecodeError: likewise.
            OSError: what it asked for failed; likewise.
        """

    @abstractmethod
    def _forget(self, peer_id: str, direction: Direction) -> None:
        """Drop what belongs to a direction of a peer whose links are lost."""

    def _handle_link_up(self, peer_id: str) -> None:
        """Prepare a consumer's links, before the transfers that wait for them."""

    def _handle_payload_end(self, event: LinkEvent) -> None:
        """React to the last byte of a payload that was expected."""
        raise RemoteProtocolError(f"payload on the {self.name} link of {event.peer_id}")

    def _send(self, posted: Posted, frame: msgspec.Struct) -> None:
        """Send a frame that concerns a transfer."""
        self._links.send(posted.peer_id, posted.direction, msgspec.msgpack.encode(frame))

    def _post(
        self,
        peer_id: str,
        direction: Direction,
        transfer_id: int,
        block_ids: Sequence[int],
        heads: Heads | None,
    ) -> Posted:
        if not self._links.has_peer(peer_id):
            raise LocalProtocolError(f"unknown peer {peer_id}")
        check_selection(self._regions, block_ids, heads)
        num_bytes = len(block_ids) * sum(slice_len(region, heads) for region in self._regions)
        posted = Posted(peer_id, direction, transfer_id, tuple(block_ids), heads, num_bytes)
        self._ledger.post(posted)
        return posted

    def _handle(self, event: LinkEvent) -> None:
        match event.item:
            case Mark.UP:
                self._handle_link_up(event.peer_id)
                for posted in self._ledger.posted(event.peer_id, Direction.SENDING):
                    self._start_sending(posted)
            case Mark.PAYLOAD_END:
                self._handle_payload_end(event)
            case Mark.LOST:
                self._fail(event.peer_id, event.reason, event.direction)
            case bytes() as frame:
                self._handle_frame(event, frame)

    def _lose(self, peer_id: str, direction: Direction, reason: str) -> None:
        """Close the links of a direction whose other end broke the rules."""
        self._links.drop_links(peer_id, direction)
        self._fail(peer_id, reason, direction)

    def _fail(self, peer_id: str, reason: str, direction: Direction | None = None) -> None:
        for lost in Direction if direction is None else (direction,):
            self._forget(peer_id, lost)
        self._ledger.fail_peer(peer_id, PeerLostError(f"{self.name}: {reason}"), direction)
