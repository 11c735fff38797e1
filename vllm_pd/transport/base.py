"""What a data-plane transport must do.

A transport is two-sided: the producer calls ``send_blocks`` and the consumer
``recv_blocks`` with the same transfer id, after agreeing on it over the
control plane. HCCL leaves no choice (send and receive must pair), TCP fits,
and shared memory makes the producer's half a permission to read. Both sides
post the transfers of one peer pair in the same order; the session sees to it.

Threading: one thread, the session's, calls every method but ``pump``, which belongs to
the thread that computes. No method blocks. An idle transport uses no CPU: ``fileno``
tells when ``poll`` has something to do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from vllm_pd.config import Digests
from vllm_pd.errors import LocalProtocolError, TransferError

Heads: TypeAlias = tuple[int, int]
"""``(first, count)``: heads of every block, counted on one worker."""


@dataclass(frozen=True, slots=True)
class KVRegion:
    """One contiguous span of KV cache as a transport sees it.

    A block consists of ``num_rows`` rows, each of ``num_heads`` heads; the bytes
    of the same head in all rows of a block are what one tensor-parallel rank of
    another engine may want.

    Attributes:
        name: layer name, equal on both sides.
        addr: address of block 0.
        num_blocks: number of blocks.
        block_len: bytes of one block; blocks follow each other without gaps.
        device: torch device type that ``addr`` belongs to.
        num_rows: rows per block.
        num_heads: heads per row.
        tensor: the torch tensor, for memory that only torch can reach.
    """

    name: str
    addr: int
    num_blocks: int
    block_len: int
    device: str = "cpu"
    num_rows: int = 1
    num_heads: int = 1
    tensor: Any = None

    @property
    def row_len(self) -> int:
        """Bytes of one row."""
        return self.block_len // self.num_rows

    @property
    def head_len(self) -> int:
        """Bytes of one head in one row."""
        return self.row_len // self.num_heads


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """What every transport is told when it is made.

    Attributes:
        host: address that listening sockets bind to and that peers are told.
        num_copy_threads: threads that copy on behalf of ``recv_blocks``.
        num_streams: connections to each peer.
        staging_len: pinned host memory for the KV cache of a device, in bytes.
        transfer_timeout_s: longest wait for the other half of a transfer that has begun.
        certificate: PEM of the cluster's certificate; None: no encryption.
        private_key: PEM of its key.
        shares_pages: whether peers on this host may map the KV cache; False as if the
            kernel refused it.
        on_received: sees the first bytes of every transfer before they are verified, on
            any thread; lets a fault damage them.
    """

    host: str = "127.0.0.1"
    num_copy_threads: int = 1
    num_streams: int = 2
    staging_len: int = 64 * 1024 * 1024
    transfer_timeout_s: float = 30.0
    certificate: bytes | None = None
    private_key: bytes | None = None
    shares_pages: bool = True
    on_received: Callable[[memoryview], None] | None = None


@dataclass(frozen=True, slots=True)
class TransferOutcome:
    """The end of one transfer on this side; ``error`` is None on success.

    Attributes:
        peer_id: with whom.
        transfer_id: which.
        num_bytes: bytes moved; 0 on failure.
        error: why it failed.
        verify_s: seconds spent on digests, on this side.
        unseen_s: seconds, at most, in which the blocks were moved and the thread that computes
            had not looked; of transports with ``needs_pump``.
    """

    peer_id: str
    transfer_id: int
    num_bytes: int
    error: TransferError | None = None
    verify_s: float = field(default=0.0, compare=False)
    unseen_s: float = field(default=0.0, compare=False)


class Transport(ABC):
    """Copies KV blocks between this worker and its peers.

    Contract, checked by ``tests/transport_conformance.py`` for every backend:

    - each posted transfer yields exactly one outcome from ``poll``;
    - outcomes of one peer are returned in the order they were posted, those of
      ``send_blocks`` and of ``recv_blocks`` each;
    - the producer's outcome follows the consumer's receipt of the last byte;
    - after an outcome, success or not, the backend no longer touches the blocks;
    - a transfer whose bytes do not match the producer's digests fails;
    - bytes from or for a peer that was removed are never written;
    - ``close`` fails what is still posted, for ``poll`` to return, and is idempotent.
    """

    name: ClassVar[str]
    needs_pump: bool = False

    @abstractmethod
    def register_regions(self, regions: Sequence[KVRegion]) -> None:
        """Make the KV cache usable for transfers. Called once, before the rest.

        Raises:
            TransportUnavailableError: this transport cannot reach that memory.
        """

    @abstractmethod
    def local_endpoint(self) -> bytes:
        """Return what a peer needs in ``add_peer``; opaque outside the backend."""

    @abstractmethod
    def can_reach(self, endpoint: bytes) -> bool:
        """Return whether ``add_peer`` with this endpoint could work from this host."""

    @abstractmethod
    def add_peer(self, peer_id: str, endpoint: bytes) -> None:
        """Prepare transfers with a peer whose handshake has succeeded.

        Args:
            peer_id: the session's id, the same on both sides, so that two workers
                that fetch from each other are two peers.
            endpoint: the other side's ``local_endpoint()``.

        Raises:
            RemoteProtocolError: ``endpoint`` is not one of this backend's.
            LocalProtocolError: there is a peer of that id already.
        """

    @abstractmethod
    def remove_peer(self, peer_id: str) -> None:
        """Fail the peer's posted transfers and forget it. Unknown ids are ignored."""

    @abstractmethod
    def send_blocks(
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        """Post the producer's half: these blocks of all regions, in this order.

        What raises, whatever it is, has posted nothing.

        Args:
            peer_id: to whom.
            transfer_id: the same on both sides.
            block_ids: blocks of this worker.
            heads: the heads of each block; None for all.
            digests: how much of the bytes to vouch for; the consumer verifies what it
                is given.

        Raises:
            LocalProtocolError: unknown peer, no blocks, or a block id or head out of range.
        """

    @abstractmethod
    def recv_blocks(
        self,
        peer_id: str,
        transfer_id: int,
        block_ids: Sequence[int],
        *,
        heads: Heads | None = None,
        digests: Digests = Digests.OFF,
    ) -> None:
        """Post the consumer's half. Same contract as ``send_blocks``.

        A producer that vouches for less than ``digests`` asks fails the transfer.
        """

    @property
    def mode(self) -> tuple[str, str]:
        """How this transport works here and, if that is second best, why."""
        return "default", ""

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that is readable while ``poll`` has something to do."""

    @abstractmethod
    def poll(self) -> list[TransferOutcome]:
        """Make progress and return the transfers that ended since the last call."""

    def pump(self) -> bool:
        """Issue what only the thread that computes may issue; called by it, between steps.

        A library that wants all operations of a device from one thread leaves no other
        choice. Called only where ``needs_pump``.

        Returns:
            Whether something of it has ended, so that ``poll`` may soon have outcomes.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Release memory, sockets and communicators."""


def check_selection(
    regions: Sequence[KVRegion], block_ids: Sequence[int], heads: Heads | None
) -> None:
    """Refuse blocks or heads that any region lacks, and a transfer of nothing.

    Raises:
        LocalProtocolError: there are no blocks, or a block id or a head is out of range.
    """
    if not block_ids:
        raise LocalProtocolError("a transfer of no blocks")
    num_blocks = min((region.num_blocks for region in regions), default=0)
    if min(block_ids) < 0 or max(block_ids) >= num_blocks:
        bad = [b for b in block_ids if not 0 <= b < num_blocks]
        raise LocalProtocolError(f"block ids out of range 0 to {num_blocks - 1}: {bad[:8]}")
    if heads is not None:
        first, count = heads
        num_heads = min((region.num_heads for region in regions), default=0)
        if first < 0 or count < 1 or first + count > num_heads:
            raise LocalProtocolError(f"{count} heads from {first}, of {num_heads}")


def merge_runs(
    src_block_ids: Sequence[int], dst_block_ids: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Join blocks that are adjacent on both sides.

    Returns:
        ``(src_block_id, dst_block_id, num_blocks)`` per run, in the given order.
    """
    runs: list[tuple[int, int, int]] = []
    for src, dst in zip(src_block_ids, dst_block_ids, strict=True):
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (src, dst):
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((src, dst, 1))
    return runs
