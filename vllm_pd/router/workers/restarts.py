"""When a worker that has died is started again. Pure."""

from __future__ import annotations

SERVICE_S = 10.0
"""A worker that lived for so long does not belong to the row of failures before it."""

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 10.0


class Restarts:
    """Counts failures in a row: the first costs no pause, the pauses of further ones double."""

    def __init__(self) -> None:
        self._num_failures = 0

    def pause_s(self, lived_s: float) -> float:
        """Return how long to wait after a worker that lived for so long."""
        if lived_s >= SERVICE_S:
            self._num_failures = 0
        self._num_failures += 1
        if self._num_failures == 1:
            return 0.0
        return min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._num_failures - 2, 10))
