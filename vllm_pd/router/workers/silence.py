"""When a worker that says nothing any more is taken to hang. Pure."""

from __future__ import annotations

LOOK_INTERVAL_S = 1.0
"""Pause between two looks at a worker; it copies its metrics to the parent as often."""

MAX_LOOKS = 10
"""Looks in a row without a word after which a worker is ended."""


class Silence:
    """Counts looks and not time, so that a parent that was stopped itself blames nobody."""

    def __init__(self) -> None:
        self._num_looks = 0

    def heard(self) -> None:
        """The worker has said something."""
        self._num_looks = 0

    def is_too_long(self) -> bool:
        """Look once more; return whether the worker is to be ended."""
        self._num_looks += 1
        return self._num_looks > MAX_LOOKS
