"""How the workers of one router share the slots of a stage. No worker asks another.

Each shows how many slots it holds, how many requests wait for one and how urgent the
most urgent of these is. There are as many slots as one process would have; two workers
that take the last one in the same moment may exceed that by one. A free slot belongs to
the worker with the most urgent request, and among equals to the one that holds the
fewest slots. Who does not take it in time, e.g. because its host has stopped it, is
passed over.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_pd.router.workers.board import Row

PATIENCE_S = 0.25
"""How long a slot is left to another worker; each looks for one every few milliseconds."""


class Siblings:
    """The other workers, as the stage of one worker sees them.

    Args:
        row: of the stage.
        clock: returns seconds.
    """

    def __init__(self, row: Row, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._row = row
        self._clock = clock
        self._left_since: float | None = None  # a slot to another worker

    def show(self, *, in_use: int, num_waiting: int, most_urgent: int) -> None:
        """Show the others how this worker's stage is."""
        self._row.put(in_use, num_waiting, most_urgent)

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait elsewhere."""
        return sum(num_waiting for _, num_waiting, _, _ in self._row.each())

    def may_take(self, *, capacity: int, in_use: int, priority: int) -> bool:
        """Return whether a request of this worker may have a slot now.

        Args:
            capacity: slots of all workers together.
            in_use: slots that this worker holds.
            priority: of the request; the lower, the more urgent.
        """
        others = self._row.each()
        if in_use + sum(held for held, _, _, _ in others) >= capacity:
            self._left_since = None
            return False
        mine = (priority, in_use)
        if not any(waiting and (urgent, held) < mine for held, waiting, urgent, _ in others):
            self._left_since = None
            return True
        now = self._clock()
        if self._left_since is None:
            self._left_since = now
        return now - self._left_since >= PATIENCE_S
