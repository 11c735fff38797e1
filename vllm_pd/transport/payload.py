"""From where a chunk is sent and into what it is received.

``DirectPayload``: the KV cache itself, in host memory. ``StagedPayload``: pinned
buffers, because the KV cache is on a device.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from vllm_pd.errors import TransportUnavailableError
from vllm_pd.transport.base import KVRegion
from vllm_pd.transport.chunks import Chunk, spans_of_piece
from vllm_pd.transport.device import DeviceInterface, TorchDevice
from vllm_pd.transport.lanes import one_line
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction
from vllm_pd.transport.memory import view
from vllm_pd.transport.staging import StageKind, Stager, StagingBuffer

Taken: TypeAlias = tuple[list[memoryview], Callable[[], None] | None]
"""Memory to send, and what to call when it is sent."""


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """Where a chunk is received."""

    parts: list[memoryview]
    buffer: StagingBuffer | None = None


class Payload(ABC):
    """Memory of the chunks of one transport. Called by the session thread only."""

    name: ClassVar[str]
    takes_buffers: ClassVar[bool] = False

    @abstractmethod
    def start_sending(self, posted: Posted, chunks: Sequence[Chunk]) -> None:
        """Prepare the chunks of a transfer to be taken, in this order."""

    @abstractmethod
    def take(self, posted: Posted, index: int, chunk: Chunk) -> Taken | None:
        """Return a chunk's bytes; None while they are on their way."""

    def start_receiving(self, posted: Posted) -> None:  # noqa: B027 - as below
        """Prepare for the chunks of a transfer.

        Raises:
            TransferError: they cannot be received.
        """

    @abstractmethod
    def land(self, posted: Posted, index: int, chunk: Chunk) -> Landing | None:
        """Return where to receive a chunk; None while there is no room."""

    @abstractmethod
    def landed(self, posted: Posted, index: int, chunk: Chunk, landing: Landing) -> None:
        """Bring a received chunk home; the transfer is busy while that lasts."""

    def give_up(self, landing: Landing) -> None:  # noqa: B027 - nothing to do by default
        """Take back what ``land`` returned: the chunk does not come."""

    def collect(self) -> list[tuple[Posted, str | None]]:
        """Return transfers of which a chunk can be taken or is home, or failed."""
        return []

    def forget(self, peer_id: str, direction: Direction) -> None:  # noqa: B027
        """Drop what waits for a direction of a peer; what is under way ends."""

    def close(self) -> None:  # noqa: B027
        """Wait for what is under way."""


class DirectPayload(Payload):
    """KV cache in host memory."""

    name = "direct"

    def __init__(self, regions: Sequence[KVRegion]) -> None:
        self._regions = regions
        # Views of whole regions: a slice of one is made faster than a new view.
        self._memory = [view(r.addr, r.num_blocks * r.block_len) for r in regions]

    def start_sending(self, posted: Posted, chunks: Sequence[Chunk]) -> None:  # noqa: D102
        pass

    def take(self, posted: Posted, index: int, chunk: Chunk) -> Taken | None:  # noqa: ARG002, D102
        return self._views(posted, chunk), None

    def land(self, posted: Posted, index: int, chunk: Chunk) -> Landing | None:  # noqa: ARG002, D102
        return Landing(self._views(posted, chunk))

    def landed(self, posted: Posted, index: int, chunk: Chunk, landing: Landing) -> None:  # noqa: D102
        pass

    def _views(self, posted: Posted, chunk: Chunk) -> list[memoryview]:
        parts = []
        for piece in chunk.pieces:
            memory, region = self._memory[piece.region], self._regions[piece.region]
            spans = spans_of_piece(region, piece, posted.block_ids, posted.heads)
            parts += [memory[offset : offset + length] for offset, length in spans]
        return parts


def device_of(regions: Sequence[KVRegion]) -> DeviceInterface:
    """Return what torch has the tensors of a KV cache on.

    Raises:
        TransportUnavailableError: they are in several kinds of memory, missing, or on
            something that torch has no module for.
    """
    kinds = {region.device for region in regions}
    tensors = [region.tensor for region in regions]
    if len(kinds) != 1 or any(tensor is None for tensor in tensors):
        raise TransportUnavailableError(f"KV cache in {', '.join(sorted(kinds))} memory")
    kind = kinds.pop()
    try:
        return TorchDevice(kind, tensors[0].device.index or 0)
    except (RuntimeError, AttributeError, AssertionError) as exc:  # torch raises any of them
        raise TransportUnavailableError(f"KV cache in {kind} memory: {one_line(exc)}") from exc


@dataclass(slots=True, eq=False)
class _Work:
    """What the stager does for one transfer."""

    posted: Posted
    under_way: set[int]  # chunks that the device copies, or will
    ready: deque[tuple[int, StagingBuffer]]  # gathered, to be sent


class StagedPayload(Payload):
    """KV cache on a device, through pinned buffers.

    Args:
        regions: the KV cache, with its tensors.
        device: what holds it.
        staging_len: bytes of all buffers together.
        chunk_len: longest chunk.
        wake: see ``Stager``.

    Raises:
        TransportUnavailableError: the memory cannot be had, or is too little.
    """

    name = "staged"
    takes_buffers = True

    def __init__(
        self,
        regions: Sequence[KVRegion],
        device: DeviceInterface,
        *,
        staging_len: int,
        chunk_len: int,
        wake: Callable[[], None],
    ) -> None:
        buffer_len = max(chunk_len, *(region.block_len for region in regions))
        num_buffers = staging_len // buffer_len // 2 * 2
        if num_buffers < 2:
            raise TransportUnavailableError(
                f"staging_len {staging_len} is less than two buffers of {buffer_len} bytes"
            )
        self._stager = Stager(
            regions, device, buffer_len=buffer_len, num_buffers=num_buffers, wake=wake
        )
        self._work: dict[tuple[str, Direction, int], _Work] = {}

    def start_sending(self, posted: Posted, chunks: Sequence[Chunk]) -> None:  # noqa: D102
        work = self._work_of(posted)
        work.under_way.update(range(len(chunks)))
        posted.is_busy = True
        for index, chunk in enumerate(chunks):
            self._stager.gather((*_key(posted), index), chunk, posted.block_ids, posted.heads)

    def take(self, posted: Posted, index: int, chunk: Chunk) -> Taken | None:  # noqa: D102
        work = self._work.get(_key(posted))
        if work is None or not work.ready or work.ready[0][0] != index:
            return None
        _, buffer = work.ready.popleft()
        if not work.under_way and not work.ready:
            del self._work[_key(posted)]
        release = functools.partial(self._stager.release, buffer)
        return [buffer.view[: chunk.num_bytes]], release

    def start_receiving(self, posted: Posted) -> None:  # noqa: ARG002, D102
        self._stager.fence(StageKind.SCATTER)

    def land(self, posted: Posted, index: int, chunk: Chunk) -> Landing | None:  # noqa: ARG002, D102
        buffer = self._stager.acquire()
        return None if buffer is None else Landing([buffer.view[: chunk.num_bytes]], buffer)

    def landed(self, posted: Posted, index: int, chunk: Chunk, landing: Landing) -> None:  # noqa: D102
        assert landing.buffer is not None
        self._work_of(posted).under_way.add(index)
        posted.is_busy = True
        key = (*_key(posted), index)
        self._stager.scatter(key, chunk, posted.block_ids, posted.heads, landing.buffer)

    def give_up(self, landing: Landing) -> None:  # noqa: D102
        if landing.buffer is not None:
            self._stager.release(landing.buffer)

    def collect(self) -> list[tuple[Posted, str | None]]:  # noqa: D102
        ended = []
        for staged in self._stager.take_done():
            assert isinstance(staged.key, tuple)
            *key, index = staged.key
            work = self._work[key[0], key[1], key[2]]
            work.under_way.discard(index)
            if staged.buffer is not None:
                if work.posted.error is None and staged.error is None:
                    work.ready.append((index, staged.buffer))
                else:
                    self._stager.release(staged.buffer)
            self._settle(work)
            ended.append((work.posted, staged.error))
        return ended

    def forget(self, peer_id: str, direction: Direction) -> None:  # noqa: D102
        def match(key: Hashable) -> bool:
            return isinstance(key, tuple) and key[:2] == (peer_id, direction)

        for key in self._stager.cancel(match):
            assert isinstance(key, tuple)
            self._work[peer_id, direction, key[2]].under_way.discard(key[3])
        for key, work in list(self._work.items()):
            if key[:2] == (peer_id, direction):
                while work.ready:
                    self._stager.release(work.ready.popleft()[1])
                self._settle(work)

    def close(self) -> None:  # noqa: D102
        self._stager.close()

    def _work_of(self, posted: Posted) -> _Work:
        return self._work.setdefault(_key(posted), _Work(posted, set(), deque()))

    def _settle(self, work: _Work) -> None:
        """Take note that the device has stopped touching a transfer's blocks."""
        if not work.under_way:
            work.posted.is_busy = False
            if not work.ready:
                self._work.pop(_key(work.posted), None)


def _key(posted: Posted) -> tuple[str, Direction, int]:
    return posted.peer_id, posted.direction, posted.transfer_id
