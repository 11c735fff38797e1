"""The transfers of a worker between their posting and their end.

The consumer says Want when it has a buffer; the producer gathers and sends through a
buffer of its own and says Go; then the consumer receives and scatters. A buffer of the
receiving side is waited for before one of the sending side, and a sending one is held
only while both sides work: so buffers are never waited for in a circle.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ascend_vllm_plugin.engine import Engine, Job
from ascend_vllm_plugin.moves import Mover
from ascend_vllm_plugin.pairs import Pair
from ascend_vllm_plugin.transfers import Buffers, Transfer, view_of
from ascend_vllm_plugin.wire import Abandoned, AnyFrame, Go, Received, TransferFrame, Vouch, Want
from vllm_pd.errors import DigestMismatchError, RemoteProtocolError, TransferError
from vllm_pd.transport.digests import digest_of
from vllm_pd.transport.ledger import Ledger, Posted
from vllm_pd.transport.links import Direction

logger = logging.getLogger(__name__)

MAX_WANTED = 4096


@dataclass(frozen=True, slots=True)
class Outside:
    """What transfers tell the transport.

    Attributes:
        send: sends a frame to the pair's peer.
        post: likewise, soon and from any thread.
        lose: closes the link of a pair, with all its transfers, and why.
        on_left: told of a pair whose communicator an operation never left.
    """

    send: Callable[[Pair, AnyFrame], None]
    post: Callable[[Pair, AnyFrame], None]
    lose: Callable[[Pair, str], None]
    on_left: Callable[[Pair, str], None]


class Traffic:
    """See the module. For the session's thread.

    Args:
        mover: makes the jobs.
        engine: runs them.
        buffers: device memory, by direction.
        ledger: is told of ends.
        outside: the transport.
    """

    def __init__(
        self,
        mover: Mover,
        engine: Engine,
        buffers: Mapping[Direction, Buffers],
        ledger: Ledger,
        outside: Outside,
    ) -> None:
        self._mover = mover
        self._engine = engine
        self._buffers = buffers
        self._ledger = ledger
        self._outside = outside
        self._queues: dict[Pair, deque[Transfer]] = {}
        self._wants: dict[Pair, dict[int, Want]] = {}

    @property
    def is_exhausted(self) -> bool:
        """Whether a direction has no buffer left that could ever be free."""
        return any(buffers.num_left == 0 for buffers in self._buffers.values())

    def open(self, pair: Pair) -> None:
        """Expect transfers of a pair, which may still have to be set up."""
        self._queues[pair] = deque()
        self._wants[pair] = {}

    def close(self, pair: Pair) -> None:
        """Stop the transfers of a pair whose link is lost; they have failed."""
        self._wants.pop(pair, None)
        for transfer in self._queues.pop(pair, ()):
            self._drop(transfer)

    def post(self, posted: Posted, pair: Pair) -> None:
        """Take a half over; it begins when the other one is there, too."""
        self._queues[pair].append(Transfer(posted, pair, self._mover.chunks_of(posted)))
        self.advance(pair)

    def advance(self, pair: Pair) -> None:
        """Begin what can begin: there is a communicator, and there is a buffer."""
        if pair.channel is None or pair.is_over:
            return
        for transfer in list(self._queues[pair]):
            if transfer.posted.error is not None:  # an earlier one has lost the peer
                return
            if pair.direction is Direction.RECEIVING:
                self._ask(transfer)
            else:
                self._answer(transfer)

    def handle(self, pair: Pair, frame: TransferFrame) -> None:
        """React to a frame of the peer.

        Raises:
            RemoteProtocolError: it is not allowed here.
        """
        match frame, pair.direction:
            case Want(), Direction.SENDING:
                wants = self._wants[pair]
                if len(wants) >= MAX_WANTED:
                    raise RemoteProtocolError(f"{MAX_WANTED} transfers wanted at once")
                wants[frame.transfer_id] = frame
                self.advance(pair)
            case Go(), Direction.RECEIVING:
                self._receive(self._transfer(pair, frame.transfer_id), frame)
            case Vouch(), Direction.RECEIVING:
                self._take_vouch(self._transfer(pair, frame.transfer_id), frame)
            case ((Received() | Abandoned()), Direction.SENDING):
                self._take_receipt(self._transfer(pair, frame.transfer_id), frame)
            case other, direction:
                raise RemoteProtocolError(f"{type(other).__name__} on a {direction} link")

    def _transfer(self, pair: Pair, transfer_id: int) -> Transfer:
        for transfer in self._queues[pair]:
            if transfer.posted.transfer_id == transfer_id:
                return transfer
        raise RemoteProtocolError(f"unknown transfer {transfer_id}")

    # Moving

    def _ask(self, transfer: Transfer) -> None:
        """Consumer: say that the transfer can come."""
        if transfer.is_asked or not self._take_buffer(transfer):
            return
        posted = transfer.posted
        transfer.is_asked = True
        want = Want(
            transfer_id=posted.transfer_id,
            num_blocks=len(posted.block_ids),
            num_bytes=posted.num_bytes,
        )
        self._outside.send(transfer.pair, want)

    def _answer(self, transfer: Transfer) -> None:
        """Producer: send what the consumer wants."""
        posted, pair = transfer.posted, transfer.pair
        wants = self._wants[pair]
        if transfer.buffer is not None or transfer.is_moved or posted.transfer_id not in wants:
            return
        want = wants[posted.transfer_id]
        if (want.num_blocks, want.num_bytes) != (len(posted.block_ids), posted.num_bytes):
            self._outside.lose(
                pair,
                f"{want.num_blocks} blocks of {want.num_bytes} bytes in all wanted, "
                f"{len(posted.block_ids)} of {posted.num_bytes} posted",
            )
            return
        if not self._take_buffer(transfer):
            return
        del wants[posted.transfer_id]
        go = self._mover.vouch(transfer)
        job = self._mover.send_job(
            transfer,
            on_done=lambda error: self._end_job(transfer, error),
            on_issued=lambda: self._outside.post(pair, go),
        )
        self._put(transfer, job)

    def _receive(self, transfer: Transfer, go: Go) -> None:
        """Consumer: the sending is issued, so receive it whatever happens here."""
        if not transfer.is_asked or transfer.job is not None or transfer.is_moved:
            raise RemoteProtocolError(f"Go of transfer {go.transfer_id}")
        self._mover.take_go(transfer, go)
        job = self._mover.recv_job(transfer, on_done=lambda error: self._end_job(transfer, error))
        self._put(transfer, job)

    def _put(self, transfer: Transfer, job: Job) -> None:
        transfer.job, transfer.posted.is_busy = job, True
        self._engine.put(job)

    def _drop(self, transfer: Transfer) -> None:
        """Stop a transfer that has failed; what the device does for it ends first."""
        job = transfer.job
        if job is None:
            self._give_back(transfer)
        elif self._engine.withdraw(job):
            transfer.posted.is_busy = False
            if not job.must_run:
                transfer.job = None
                self._give_back(transfer)

    def _end_job(self, transfer: Transfer, error: str | None) -> None:
        """Go on after the engine's thread has done something for a transfer."""
        posted = transfer.posted
        try:
            self._go_on(transfer, error)
        except Exception as exc:
            # As in HostTransport.poll: a bug, or memory that is not to be had, costs one peer.
            logger.exception("hccl: transfer %d of %s", posted.transfer_id, posted.peer_id)
            self._outside.lose(transfer.pair, f"internal error: {exc!r}")
            self._ledger.end(posted)

    def _go_on(self, transfer: Transfer, error: str | None) -> None:
        posted, job = transfer.posted, transfer.job
        assert job is not None
        transfer.job, posted.is_busy = None, False
        transfer.is_moved = True
        posted.unseen_s += job.unseen_s
        if job.is_left:
            self._write_off(transfer, error or "")
        if error is not None and posted.error is None:
            self._outside.lose(transfer.pair, error)
        if posted.error is not None:
            self._give_back(transfer)
            self._ledger.end(posted)
            return
        if transfer.host is not None:
            self._hash(transfer)
        sample = self._mover.sample_job(
            transfer, on_done=lambda error: self._end_job(transfer, error)
        )
        if sample is not None:
            self._put(transfer, sample)
            return
        self._give_back(transfer)
        if posted.direction is Direction.RECEIVING:
            self._finish_receiving(transfer)
        elif transfer.is_received:
            self._end(transfer, None)

    # Verification and ends

    def _hash(self, transfer: Transfer) -> None:
        """Hash the portion that has come to the host; a producer vouches for it."""
        posted = transfer.posted
        started = time.monotonic()
        host, transfer.host = transfer.host, None
        assert host is not None
        transfer.digests.append(digest_of([view_of(host)]))
        posted.verify_s += time.monotonic() - started
        if posted.direction is Direction.SENDING:
            vouch = Vouch(
                transfer_id=posted.transfer_id,
                portion=len(transfer.digests) - 1,
                digest=transfer.digests[-1],
            )
            self._outside.send(transfer.pair, vouch)

    def _take_vouch(self, transfer: Transfer, vouch: Vouch) -> None:
        """Consumer: keep a digest of the producer's."""
        if vouch.portion != len(transfer.vouched) or vouch.portion >= len(transfer.portions):
            raise RemoteProtocolError(f"digest of portion {vouch.portion}")
        transfer.vouched[vouch.portion] = vouch.digest
        self._finish_receiving(transfer)

    def _finish_receiving(self, transfer: Transfer) -> None:
        """Consumer: compare, once everything is here and vouched for."""
        posted = transfer.posted
        if not transfer.is_hashed or len(transfer.vouched) < len(transfer.portions):
            return
        error: TransferError | None = None
        name = f"transfer {posted.transfer_id}"
        if any(transfer.vouched[i] != digest for i, digest in enumerate(transfer.digests)):
            error = DigestMismatchError(f"{name}: the bytes received are not those sent")
        elif not transfer.is_covered:
            error = DigestMismatchError(
                f"{name}: the producer vouches for less than {posted.digests.value}"
            )
        if error is None:
            self._outside.send(transfer.pair, Received(transfer_id=posted.transfer_id))
        else:
            abandoned = Abandoned(transfer_id=posted.transfer_id, reason=str(error))
            self._outside.send(transfer.pair, abandoned)
        self._end(transfer, error)

    def _take_receipt(self, transfer: Transfer, frame: Received | Abandoned) -> None:
        """Producer: the consumer has got everything, or gives up."""
        if transfer.job is None and not transfer.is_moved:
            raise RemoteProtocolError(f"receipt of transfer {frame.transfer_id}")
        if isinstance(frame, Abandoned):
            self._drop(transfer)
            self._end(transfer, TransferError(f"given up: {frame.reason}"))
        elif transfer.job is None:
            self._end(transfer, None)
        else:
            transfer.is_received = True

    def _end(self, transfer: Transfer, error: TransferError | None) -> None:
        self._ledger.end(transfer.posted, error)
        queue = self._queues.get(transfer.pair)
        if queue is not None and transfer in queue:
            queue.remove(transfer)

    # Buffers

    def _take_buffer(self, transfer: Transfer) -> bool:
        if transfer.buffer is None:
            transfer.buffer = self._buffers[transfer.posted.direction].take()
        return transfer.buffer is not None

    def _give_back(self, transfer: Transfer) -> None:
        """Give a transfer's buffer to whoever waits for one."""
        if transfer.buffer is None:
            return
        direction = transfer.posted.direction
        self._buffers[direction].give(transfer.buffer)
        transfer.buffer = None
        for pair in list(self._queues):
            if pair.direction is direction:
                self.advance(pair)

    def _write_off(self, transfer: Transfer, reason: str) -> None:
        """Leave a transfer's buffer to the device, which may still write to it."""
        transfer.buffer = None
        self._buffers[transfer.posted.direction].write_off()
        self._outside.on_left(transfer.pair, reason)
