"""Makes the jobs of transfers: what to move, through which memory, and what to vouch for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from ascend_vllm_plugin.backend import EngineDevice
from ascend_vllm_plugin.blocks import Planner
from ascend_vllm_plugin.jobs import Channel, Load, RecvJob, Sample, SampleJob, SendJob
from ascend_vllm_plugin.settings import Settings
from ascend_vllm_plugin.transfers import Transfer, covers, sample_of
from ascend_vllm_plugin.wire import Go
from vllm_pd.config import Digests
from vllm_pd.transport.base import KVRegion, TransportOptions
from vllm_pd.transport.chunks import Chunk, Piece, plan_chunks, slice_len
from vllm_pd.transport.digests import choose_pieces
from vllm_pd.transport.ledger import Posted

OnDone: TypeAlias = Callable[[str | None], None]


class Mover:
    """Knows the KV cache and the device.

    Args:
        regions: the KV cache.
        device: what holds it.
        settings: of HCCL.
        options: of the transport.
        chunk_len: bytes of one Send.

    Attributes:
        buffer_len: bytes of the buffer that a transfer needs.

    Raises:
        TransportUnavailableError: a tensor is not the region's contiguous blocks.
    """

    def __init__(
        self,
        regions: Sequence[KVRegion],
        device: EngineDevice,
        settings: Settings,
        options: TransportOptions,
        chunk_len: int,
    ) -> None:
        self._regions = regions
        self._device = device
        self._settings = settings
        self._options = options
        self._planner = Planner(regions, device)
        self._chunk_len = chunk_len
        self.buffer_len = max(chunk_len, *(region.block_len for region in regions))

    def chunks_of(self, posted: Posted) -> list[Chunk]:
        """Return what is sent one after the other for a transfer."""
        num_blocks = len(posted.block_ids)
        return plan_chunks(self._regions, posted.heads, num_blocks, max_len=self._chunk_len)

    def vouch(self, transfer: Transfer) -> Go:
        """Producer: choose what to vouch for; return what the consumer is to be told."""
        posted = transfer.posted
        pieces: tuple[Piece, ...] = ()
        if posted.digests is Digests.SAMPLED:
            slice_lens = [slice_len(region, posted.heads) for region in self._regions]
            pieces = tuple(choose_pieces(posted.digests, slice_lens, len(posted.block_ids)))
        self._set_portions(transfer, posted.digests, pieces)
        return Go(transfer_id=posted.transfer_id, digests=posted.digests, pieces=pieces)

    def take_go(self, transfer: Transfer, go: Go) -> None:
        """Consumer: take note of what the producer vouches for.

        Raises:
            RemoteProtocolError: the transfer does not have that.
        """
        self._set_portions(transfer, go.digests, go.pieces)
        transfer.is_covered = covers(transfer.posted.digests, go.digests, len(transfer.portions))

    def send_job(
        self, transfer: Transfer, *, on_done: OnDone, on_issued: Callable[[], None]
    ) -> SendJob:
        """Return what gathers and sends; the transfer has a buffer."""
        return SendJob(
            on_done,
            _channel(transfer),
            self._load(transfer),
            sample=self._sample(transfer),
            on_issued=on_issued,
        )

    def recv_job(self, transfer: Transfer, *, on_done: OnDone) -> RecvJob:
        """Return what receives and scatters; the transfer has a buffer."""
        return RecvJob(
            on_done,
            _channel(transfer),
            self._load(transfer),
            sample=self._sample(transfer),
            device=self._device,
            on_received=self._options.on_received,
        )

    def sample_job(self, transfer: Transfer, *, on_done: OnDone) -> SampleJob | None:
        """Return what copies the next portion to the host; None if there is none."""
        if (sample := self._sample(transfer)) is None:
            return None
        assert transfer.buffer is not None
        return SampleJob(on_done, _channel(transfer), sample, transfer.buffer)

    def _set_portions(self, transfer: Transfer, digests: Digests, pieces: Sequence[Piece]) -> None:
        if digests is Digests.ALWAYS:
            transfer.portions = transfer.chunks
        else:
            transfer.portions = sample_of(pieces, self._regions, transfer.posted, self.buffer_len)

    def _load(self, transfer: Transfer) -> Load:
        posted = transfer.posted
        assert transfer.buffer is not None
        plan = self._planner.plan(transfer.chunks, posted.block_ids, posted.heads)
        lens = tuple(chunk.num_bytes for chunk in transfer.chunks)
        return Load(plan, lens, transfer.buffer, self._settings.exec_timeout_s)

    def _sample(self, transfer: Transfer) -> Sample | None:
        """Return the next portion to hash; None if there is none."""
        index = len(transfer.digests)
        if index == len(transfer.portions):
            return None
        portion = transfer.portions[index]
        posted = transfer.posted
        plan = self._planner.plan([portion], posted.block_ids, posted.heads)
        transfer.host = self._device.allocate_host(portion.num_bytes)
        return Sample(plan, 0, transfer.host)


def _channel(transfer: Transfer) -> Channel:
    assert transfer.pair.channel is not None
    return transfer.pair.channel
