"""With whom HCCL is not tried again for a while, because it could not link this worker.

HCCL waits up to HCCL_CONNECT_TIMEOUT for a link, 120 s and 20 s more, and the engine
waits with it. Where that has happened, the next try costs as much again, and so does
one with each other worker of that host: so all of these are left alone, for hours. A
failure that held nobody up concerns one worker, for minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ascend_vllm_plugin.wire import Address

RETRY_S = 300.0
"""Pause before HCCL is tried again with a worker that it refused to link."""

STALL_RETRY_S = 6 * 3600.0
"""Pause before HCCL is tried again with a host that it held the engine up for."""

STALL_S = 10.0
"""Time in HCCL from which on the engine counts as held up: a link takes about a second."""


class Verdicts:
    """What a worker knows of others. For the session's thread.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}  # by worker and by place
        self._suspects: set[str] = set()  # places

    def forbids(self, peer: Address) -> bool:
        """Whether HCCL is not to be tried with a worker now."""
        now = self._clock()
        return any(self._until.get(key, now) > now for key in (peer.worker, peer.place))

    def add(self, peer: Address, *, blocked_s: float = 0.0, is_gone: bool = False) -> bool:
        """Take note of a failure; return whether it concerns the whole host.

        Args:
            peer: with which worker.
            blocked_s: how long HCCL took to fail.
            is_gone: the worker has left meanwhile. It may have died, which HCCL cannot
                tell from a link that is not to be had: so it takes two such failures.
        """
        is_stall = blocked_s >= STALL_S
        if is_stall and is_gone and peer.place not in self._suspects:
            self._suspects.add(peer.place)
            is_stall = False
        key, pause_s = (peer.place, STALL_RETRY_S) if is_stall else (peer.worker, RETRY_S)
        now = self._clock()
        self._until = {k: until for k, until in self._until.items() if until > now}
        self._until[key] = now + pause_s
        return is_stall
