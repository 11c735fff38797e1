"""What one end of one measured transport does; one child process each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from benchmarks.transfer.arena import Arena
from benchmarks.transfer.plan import Plan
from benchmarks.transfer.wire import Wire

GO = "go"
"""Consumer to producer, after the clock has started: begin."""


class Mover(ABC):
    """One end. The parent calls the public methods by name, on both ends at once.

    Args:
        link: to the other end, for set-up and for starting rounds.
        name: the transport.
    """

    def __init__(self, link: Wire, name: str) -> None:
        self.name = name
        self._link = link
        self._arena: Arena | None = None
        self._plan: Plan | None = None

    def prepare(self, plan: dict[str, int], capacity: int) -> None:
        """Get everything ready that needs no clock.

        Args:
            plan: what ``run`` is to move.
            capacity: bytes of the greatest plan to come.
        """
        self._release()
        self._plan = Plan(**plan)
        if self._arena is None:
            self._arena = Arena(capacity)
            self._take_memory(self._arena)
        self._set_up(self._plan, self._arena)

    @abstractmethod
    def run(self) -> float:
        """Move the plan's blocks once; return the seconds it took, on the consumer."""

    def verify(self) -> bool:
        """Return whether every byte of the plan has arrived; for the consumer."""
        if self._arena is None or self._plan is None:
            raise RuntimeError("prepare comes first")
        return self._arena.find_wrong_block(self._plan) is None

    def spoil(self) -> None:
        """Overwrite the destination; for the consumer."""
        if self._arena is not None:
            self._arena.spoil()

    def close(self) -> None:
        """Give everything back."""
        self._release()

    def _take_memory(self, arena: Arena) -> None:  # noqa: B027 - may need nothing
        """Fill or register memory that is there for several plans."""

    @abstractmethod
    def _set_up(self, plan: Plan, arena: Arena) -> None:
        """Connect and compute addresses, for one plan."""

    def _release(self) -> None:  # noqa: B027 - may need nothing
        """Undo ``_set_up``, if it was called."""

    def _swap(self, ours: Any) -> Any:
        """Exchange a JSON value with the other end."""
        self._link.send(ours)
        return self._link.receive()
