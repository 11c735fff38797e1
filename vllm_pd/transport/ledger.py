"""Which transfers are posted, and in what order their outcomes are due.

Shared by the transports that run over links; pure bookkeeping, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_pd.config import Digests
from vllm_pd.errors import LocalProtocolError, TransferError
from vllm_pd.transport.base import Heads, TransferOutcome
from vllm_pd.transport.links import Direction


@dataclass(slots=True, eq=False)
class Posted:
    """One half of a transfer, from its posting to its outcome.

    Attributes:
        peer_id: with whom.
        direction: which half.
        transfer_id: the same on both sides.
        block_ids: blocks of this worker.
        heads: the heads of each block; None for all.
        num_bytes: what moves.
        digests: how much the producer vouches for.
        is_busy: a thread touches the blocks; the outcome waits until it stopped.
        is_copied: the copy is complete and waits for the other side's word.
        is_over: nothing touches the blocks any more; the outcome is due.
        error: why it failed.
        verify_s: seconds spent on digests.
        unseen_s: see ``TransferOutcome``.
    """

    peer_id: str
    direction: Direction
    transfer_id: int
    block_ids: Sequence[int]
    heads: Heads | None
    num_bytes: int
    digests: Digests = Digests.OFF
    is_busy: bool = False
    is_copied: bool = False
    is_over: bool = False
    error: TransferError | None = None
    verify_s: float = 0.0
    unseen_s: float = 0.0
    _block_array: npt.NDArray[np.int64] | None = None

    @property
    def block_array(self) -> npt.NDArray[np.int64]:
        """``block_ids`` as an array."""
        if self._block_array is None:
            self._block_array = np.array(self.block_ids, np.int64)
        return self._block_array


class Ledger:
    """Posted transfers; each ends once, in posting order per peer and direction."""

    def __init__(self) -> None:
        self._posted: dict[tuple[str, Direction], deque[Posted]] = {}

    def post(self, posted: Posted) -> None:
        """Take note of a transfer.

        Raises:
            LocalProtocolError: one of that id is posted already.
        """
        queue = self._posted.setdefault((posted.peer_id, posted.direction), deque())
        if any(other.transfer_id == posted.transfer_id for other in queue):
            raise LocalProtocolError(f"transfer {posted.transfer_id} is posted already")
        queue.append(posted)

    def find(self, peer_id: str, direction: Direction, transfer_id: int) -> Posted | None:
        """Return a transfer that is neither over nor failed."""
        for posted in self.posted(peer_id, direction):
            if posted.transfer_id == transfer_id:
                return posted
        return None

    def posted(self, peer_id: str, direction: Direction) -> list[Posted]:
        """Return the transfers of a peer that are neither over nor failed, in order."""
        queue = self._posted.get((peer_id, direction), ())
        return [posted for posted in queue if not posted.is_over and posted.error is None]

    def end(self, posted: Posted, error: TransferError | None = None) -> None:
        """Record the end of a transfer; the first error is kept."""
        posted.error = posted.error or error
        posted.is_over = not posted.is_busy

    def fail_peer(
        self, peer_id: str, error: TransferError, direction: Direction | None = None
    ) -> None:
        """Fail all that is posted with a peer, in one direction or in both."""
        for (its_id, its_direction), queue in self._posted.items():
            if its_id == peer_id and direction in (None, its_direction):
                for posted in queue:
                    if not posted.is_over:
                        self.end(posted, error)

    def fail_all(self, error: TransferError) -> None:
        """Fail all that is posted."""
        for peer_id in {peer_id for peer_id, _ in self._posted}:
            self.fail_peer(peer_id, error)

    def drain(self) -> list[TransferOutcome]:
        """Return the outcomes that are due and forget their transfers."""
        outcomes = []
        for key, queue in list(self._posted.items()):
            while queue and queue[0].is_over:
                posted = queue.popleft()
                num_bytes = 0 if posted.error else posted.num_bytes
                outcomes.append(
                    TransferOutcome(
                        posted.peer_id,
                        posted.transfer_id,
                        num_bytes,
                        posted.error,
                        posted.verify_s,
                        posted.unseen_s,
                    )
                )
            if not queue:
                del self._posted[key]
        return outcomes
