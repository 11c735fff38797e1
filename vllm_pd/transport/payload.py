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
from vllm_pd.transport.chunks import Chunk, scatter_of_chunk, spans_of_chunk
from vllm_pd.transport.device import DeviceInterface, TorchDevice
from vllm_pd.transport.lanes import one_line
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction
from vllm_pd.transport.scatter import Scatter
from vllm_pd.transport.staging import StageKind, Stager, StagingBuffer

_FEW_BLOCKS = 64
"""So many are faster one by one than with arrays, which take as long for one as for a hundred."""

Taken: TypeAlias = tuple[Scatter, Callable[[], None] | None]
"""Memory to send, and what to call when it is sent."""


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """Where a chunk is received."""

    memory: Scatter
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

    def start_sending(self, posted: Posted, chunks: Sequence[Chunk]) -> None:  # noqa: D102
        pass

    def take(self, posted: Posted, index: int, chunk: Chunk) -> Taken | None:  # noqa: ARG002, D102
        return self._memory(posted, chunk), None

    def land(self, posted: Posted, index: int, chunk: Chunk) -> Landing | None:  # noqa: ARG002, D102
        return Landing(self._memory(posted, chunk))

    def landed(self, posted: Posted, index: int, chunk: Chunk, landing: Landing) -> None:  # noqa: D102
        pass

    def _memory(self, posted: Posted, chunk: Chunk) -> Scatter:
        num_blocks = sum(piece.num_blocks for piece in chunk.pieces)
        if posted.heads is None and num_blocks <= _FEW_BLOCKS:
            return Scatter.at(spans_of_chunk(self._regions, chunk, posted.block_ids, None))
        return scatter_of_chunk(self._regions, chunk, posted.block_array, posted.heads)


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
        return Scatter.of(buffer.view[: chunk.num_bytes]), release

    def start_receiving(self, posted: Posted) -> None:  # noqa: ARG002, D102
        self._stager.fence(StageKind.SCATTER)

    def land(self, posted: Posted, index: int, chunk: Chunk) -> Landing | None:  # noqa: ARG002, D102
        buffer = self._stager.acquire()
        if buffer is None:
            return None
        return Landing(Scatter.of(buffer.view[: chunk.num_bytes]), buffer)

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
