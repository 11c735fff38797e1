"""KV blocks of a device through pinned host memory, chunk by chunk, pipelined.

Out: rows of the KV cache are gathered into a contiguous buffer on the device, that
is copied to a pinned buffer of the host, and the transport sends from there. In:
the transport fills a pinned buffer, that is copied to the device and its rows are
scattered into the KV cache. Each direction has a thread, a stream and half of the
buffers, so that neither waits for the other: what a peer does not read holds up no
receiving, and a scatter that waits for the compute stream holds up no sending.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from vllm_pd.errors import LocalProtocolError, TransferError, TransportUnavailableError
from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.chunks import Chunk
from vllm_pd.transport.device import DeviceInterface
from vllm_pd.transport.lanes import Job, Lane, Staged, StageKind, StagingBuffer, one_line
from vllm_pd.transport.tables import Table, plan_steps

__all__ = ["StageKind", "Staged", "Stager", "StagingBuffer"]

_INDEX_LEN = 8  # bytes of a row number


class Stager:
    """Moves chunks between the KV cache of a device and pinned host buffers.

    Any thread may call any method; none waits for the device, except the
    constructor and ``close``.

    Args:
        regions: the KV cache, not empty; every region with its tensor.
        device: what holds the tensors.
        buffer_len: bytes of a buffer; at least the longest block's. torch rounds
            pinned memory up to a power of two.
        num_buffers: buffers in all, on the host and on the device; an even number,
            half for each direction. With 4 and more the device has the next chunk
            to work on when one is done.
        wake: called by our threads, and by ``release`` and ``cancel``, when
            ``take_done`` has something new or when ``acquire``, after it returned
            None, has a buffer.

    Raises:
        TransportUnavailableError: the tensors or the memory cannot be used this way.
    """

    def __init__(
        self,
        regions: Sequence[KVRegion],
        device: DeviceInterface,
        *,
        buffer_len: int,
        num_buffers: int,
        wake: Callable[[], None],
    ) -> None:
        if num_buffers < 2 or num_buffers % 2:
            raise LocalProtocolError(f"{num_buffers} staging buffers cannot be halved")
        if (longest := max(region.block_len for region in regions)) > buffer_len:
            raise TransportUnavailableError(
                f"staging buffers of {buffer_len} bytes are shorter than a block of {longest}"
            )
        self._device = device
        self._wake = wake
        self._lock = threading.Lock()
        self._done: list[Staged] = []
        tables = [Table(region) for region in regions]
        try:
            buffers = _allocate(tables, device, buffer_len, num_buffers)
            # torch may have given us memory that work queued before still uses.
            mark = device.mark()
        except RuntimeError as exc:
            raise TransportUnavailableError(f"staging buffers: {one_line(exc)}") from exc
        self._lanes = {
            kind: Lane(
                kind,
                device,
                [buffer for buffer in buffers if buffer.kind is kind],
                mark,
                plan=functools.partial(_plan, tables),
                report=self._report,
            )
            for kind in StageKind
        }
        for lane in self._lanes.values():
            lane.start()

    def fence(self, kind: StageKind) -> None:
        """Run what is queued from now on after what the device has been told to compute so far.

        Call this for scatters whenever a transfer is posted. vLLM plans ahead: when
        it gives the blocks of a finished request to another, a step that was issued
        earlier, and still writes a token of the finished one, may not have run.

        A producer needs no fence: a prefill is known to be over because the host
        has read its token, which the device computed after the last block. A fence
        would only make the transfer wait for whatever the engine computes by now,
        perhaps a whole prefill of another request.

        Raises:
            TransferError: the device did not take the event.
        """
        try:
            mark = self._device.mark()
        except RuntimeError as exc:
            raise TransferError(f"fence: {one_line(exc)}") from exc
        self._lanes[kind].fence(mark)

    def gather(
        self, key: Hashable, chunk: Chunk, block_ids: Sequence[int], heads: Heads | None
    ) -> None:
        """Queue the copy of a chunk to a host buffer; any number may wait.

        The blocks must be complete, and stay unchanged until this is over.

        Args:
            key: comes back in ``Staged``.
            chunk: what to copy.
            block_ids: blocks of the whole transfer, not changed meanwhile.
            heads: heads of each block; None for all.

        Raises:
            LocalProtocolError: the stager is closed.
        """
        job = Job(key, chunk, block_ids, heads)
        self._lanes[StageKind.GATHER].put(job)

    def acquire(self) -> StagingBuffer | None:
        """Return a buffer to receive a chunk into, or None if none is free now.

        The caller ends with ``scatter`` or ``release``. ``wake`` is called once
        there is one again.
        """
        return self._lanes[StageKind.SCATTER].acquire()

    def scatter(
        self,
        key: Hashable,
        chunk: Chunk,
        block_ids: Sequence[int],
        heads: Heads | None,
        buffer: StagingBuffer,
    ) -> None:
        """Queue the copy of a full buffer to the blocks; the buffer is given back.

        Args:
            key: comes back in ``Staged``.
            chunk: what is in the buffer.
            block_ids: blocks of the whole transfer, not changed meanwhile.
            heads: heads of each block; None for all.
            buffer: from ``acquire``.

        Raises:
            LocalProtocolError: the buffer is not the caller's, or the stager is closed.
        """
        job = Job(key, chunk, block_ids, heads, buffer)
        self._lanes[StageKind.SCATTER].put(job)

    def take_done(self) -> list[Staged]:
        """Return what ended since the last call; per direction in the order of queueing."""
        with self._lock:
            done, self._done = self._done, []
        return done

    def release(self, buffer: StagingBuffer) -> None:
        """Give a buffer back, after sending it or without having used it.

        Raises:
            LocalProtocolError: the buffer is not the caller's.
        """
        if self._lanes[buffer.kind].release(buffer):
            self._wake()

    def cancel(self, match: Callable[[Hashable], bool]) -> list[Hashable]:
        """Forget queued work. Work under way ends and is reported.

        Args:
            match: whether a key's work is to be forgotten; must not call this object.

        Returns:
            The keys of what was forgotten, which is never reported.
        """
        keys: list[Hashable] = []
        for lane in self._lanes.values():
            forgotten, has_freed = lane.cancel(match)
            keys += forgotten
            if has_freed:
                self._wake()
        return keys

    def close(self) -> None:
        """Forget queued work and wait for the work under way; idempotent.

        What ended can still be taken, and its buffers read.
        """
        for lane in self._lanes.values():
            lane.close()
        for lane in self._lanes.values():
            lane.join()

    def _report(self, staged: Staged) -> None:
        with self._lock:
            self._done.append(staged)
        self._wake()


def _plan(tables: Sequence[Table], job: Job, buffer: StagingBuffer) -> Callable[[], None]:
    """Write a job's row numbers and return what is to run on the stream.

    Raises:
        LocalProtocolError: the job fits neither the KV cache nor the buffer.
    """
    import torch

    num_bytes = job.chunk.num_bytes
    if num_bytes > buffer.view.nbytes:
        raise LocalProtocolError(f"{num_bytes} bytes for a buffer of {buffer.view.nbytes}")
    steps, num_numbers = plan_steps(tables, job.chunk, job.block_ids, job.heads, buffer.host_index)
    host, device = buffer.host[:num_bytes], buffer.device[:num_bytes]
    host_index, device_index = buffer.host_index[:num_numbers], buffer.device_index[:num_numbers]

    def work() -> None:
        # vLLM makes the KV cache in inference mode, outside which torch refuses most writes.
        with torch.inference_mode():
            device_index.copy_(host_index, non_blocking=True)
            if buffer.kind is StageKind.SCATTER:
                device.copy_(host, non_blocking=True)
            for step in steps:
                index = device_index[step.first : step.first + step.num_rows]
                part = device[step.offset : step.offset + step.length]
                payload = part.view(step.rows.dtype).view(step.num_rows, -1)
                if buffer.kind is StageKind.SCATTER:
                    step.rows.index_put_((index,), payload)
                else:
                    torch.index_select(step.rows, 0, index, out=payload)
            if buffer.kind is StageKind.GATHER:
                host.copy_(device, non_blocking=True)

    return work


def _allocate(
    tables: Sequence[Table], device: DeviceInterface, buffer_len: int, num_buffers: int
) -> list[StagingBuffer]:
    """Make all buffers, and one more on either side for the row numbers of all."""
    import torch

    max_rows = buffer_len // min(table.shortest_unit for table in tables)
    indices = [
        allocate(num_buffers * max_rows * _INDEX_LEN).view(torch.int64).view(num_buffers, max_rows)
        for allocate in (device.allocate_host, device.allocate_device)
    ]
    buffers = []
    for number in range(num_buffers):
        host: Any = device.allocate_host(buffer_len)
        buffers.append(
            StagingBuffer(
                view=memoryview(host.numpy()),
                kind=list(StageKind)[number % 2],
                host=host,
                device=device.allocate_device(buffer_len),
                host_index=indices[0][number],
                device_index=indices[1][number],
            )
        )
    return buffers
