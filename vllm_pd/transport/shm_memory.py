"""The KV caches of both ends of the shm transport: ours as peers read it, theirs as we do."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from vllm_pd.errors import RemoteProtocolError, TransportUnavailableError
from vllm_pd.transport import memory, unix
from vllm_pd.transport.base import KVRegion
from vllm_pd.transport.link import MAX_FDS
from vllm_pd.transport.shm_frames import Memory, RegionInfo, check_region
from vllm_pd.transport.shm_plan import Outside, find_outside
from vllm_pd.transport.sources import MappedSource, ProcessSource, Source

logger = logging.getLogger(__name__)


class OfferedMemory:
    """A KV cache whose pages peers may map or, where the kernel refuses that, read otherwise.

    Args:
        regions: the KV cache.
        shares_pages: False as if the kernel refused.

    Attributes:
        refusal: why the pages are not shared; ``""`` if they are.
    """

    def __init__(self, regions: Sequence[KVRegion], *, shares_pages: bool) -> None:
        self._regions = regions
        self._spans: list[memory.SharedSpan] = []
        self._outside: Outside = {}
        self.refusal = ""
        spans = memory.join_spans((r.addr, r.num_blocks * r.block_len) for r in regions)
        try:
            self._share([memory.page_interior(*span) for span in spans], shares_pages=shares_pages)
        except TransportUnavailableError as exc:
            self.refusal = str(exc)
            logger.warning("shm: peers read this process instead of shared pages: %s", exc)
            self.close()
            memory.allow_reading()
        else:
            self._outside = find_outside(regions, self._spans)
            self._lock_spans()

    def _lock_spans(self) -> None:
        try:
            for span in self._spans:
                memory.lock_pages(span.addr, span.num_bytes)
        except OSError as exc:
            logger.info(
                "shm: not all of the KV cache is locked into memory: %s. Where the kernel reclaims "
                "idle memory, copies after a pause are slower; raise the limit with `ulimit -l` "
                "or, in a container, `--ulimit memlock=-1`",
                exc.strerror,
            )

    def _share(self, spans: Sequence[tuple[int, int]], *, shares_pages: bool) -> None:
        if not shares_pages:
            raise TransportUnavailableError("sharing pages is switched off")
        if len(spans) > MAX_FDS:
            raise TransportUnavailableError(
                f"the KV cache is in {len(spans)} places, and no more than {MAX_FDS} can be shared"
            )
        for addr, num_bytes in spans:
            if num_bytes:
                self._spans.append(memory.share_pages(addr, num_bytes))

    def announcement(self) -> tuple[Memory, list[int]]:
        """Return what a peer is told first, and the descriptors that go with it."""
        frame = Memory(
            spans=tuple((span.addr, span.num_bytes) for span in self._spans),
            regions=tuple(
                RegionInfo(r.addr, r.num_blocks, r.block_len, r.num_rows, r.num_heads)
                for r in self._regions
            ),
        )
        return frame, [span.fd for span in self._spans]

    def inline(self, block_ids: Sequence[int]) -> tuple[tuple[int, bytes], ...]:
        """Return the bytes of blocks that no shared page holds, with their addresses."""
        if not self._outside:
            return ()
        return tuple(
            (addr, bytes(memory.view(addr, length)))
            for index in range(len(self._regions))
            for block_id in block_ids
            for addr, length in self._outside.get((index, block_id), ())
        )

    def close(self) -> None:
        """Give the descriptors back; the pages stay. Idempotent."""
        for span in self._spans:
            os.close(span.fd)
        self._spans.clear()


def open_source(
    ours: Sequence[KVRegion], announced: Memory, fds: Sequence[int], pid: int
) -> Source:
    """Get at the memory that a producer announced.

    Args:
        ours: our regions.
        announced: what it said.
        fds: the descriptors that came with it; the caller closes them.
        pid: its process.

    Raises:
        RemoteProtocolError: the regions do not fit ours.
        OSError: the kernel refuses every way.
    """
    if len(fds) != len(announced.spans):
        raise RemoteProtocolError(f"{len(fds)} descriptors for {announced.spans}")
    regions = [check_region(*pair) for pair in zip(ours, announced.regions, strict=False)]
    if len(regions) != len(ours) or len(regions) != len(announced.regions):
        raise RemoteProtocolError(f"the peer has {len(announced.regions)} regions")
    spans = []
    try:
        for (addr, num_bytes), fd in zip(announced.spans, fds, strict=True):
            spans.append(memory.map_span(addr, num_bytes, fd))
    except OSError as exc:
        logger.warning("shm: reading the peer's process, not its shared pages: %s", exc)
        for span in spans:
            memory.unmap_span(span)
        spans = []
    if spans:
        return MappedSource(regions, spans)
    unix.check_readable(pid, regions[0].addr)
    return ProcessSource(regions, pid)
