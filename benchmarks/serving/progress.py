"""Shows how far a run is: a line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_QUIET_S = 15.0


class Progress:
    """Tells how many requests are over.

    Args:
        console: where to.
        phases: title of each run, and how many requests it has.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        console: Console,
        phases: Sequence[tuple[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._phases = phases
        self._clock = clock
        self._began = self._told = clock()

    def __call__(self, num_over: int, done: int) -> None:
        """Show that so many runs are over, and so many requests of the present one."""
        title, total = self._phases[num_over]
        now = self._clock()
        is_over = done >= total
        text = f"{title}: {done} of {total} requests ({now - self._began:.0f} s)"
        if self._console.is_terminal:
            self._console.print(text, end="\n" if is_over else "\r")
        elif now - self._told >= _QUIET_S:
            self._told = now
            self._console.print(text)
