"""How many bytes of request bodies a router holds at one time, and who is refused for it.

A body is held from its first byte until nobody needs it any more: an instance has begun
to answer, the client has left, or the request has failed. The slots of ``admission``
bound how many requests are served, but not how long their bodies are.

Bytes count as they come, not as they are announced: a client that announces a long body
and then sends nothing takes no place from others. An announced length for which there is
no place is refused before it is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_pd.errors import OverloadedError
from vllm_pd.router.admission import HoldTime
from vllm_pd.router.workers.board import Row

Clock = Callable[[], float]


class BodyBudget(Collector):
    """The bytes that all requests of a router share; shows its state to Prometheus.

    Args:
        limit: most bytes at one time.
        row: where the processes of the router show each other what they hold; None:
            there is one.
        clock: returns seconds.

    Attributes:
        held: bytes that this process holds.
        num_refused: requests that were refused here.
    """

    def __init__(
        self, limit: int, *, row: Row | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.held = 0
        self.num_refused = 0
        self._limit = limit
        self._row = row
        self._clock = clock
        self._hold_time = HoldTime()

    def hold(self) -> Hold:
        """Return the account of a new request, with nothing in it."""
        return Hold(self)

    def check(self, num_bytes: int) -> None:
        """Check that there is place for so many bytes more.

        Raises:
            OverloadedError: there is not.
        """
        held = self.held if self._row is None else self.held + self._row.others()[0]
        lacking = held + num_bytes - self._limit
        if lacking > 0:
            self.num_refused += 1
            raise OverloadedError(
                "The router holds as many bytes of request bodies as it may.",
                wait_s=self._hold_time.wait_s(lacking, of=held),
            )

    def change(self, num_bytes: int) -> None:
        """Hold so many bytes more, or less."""
        self.held += num_bytes
        if self._row is not None:
            self._row.put(self.held)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this process."""
        yield GaugeMetricFamily(
            "vllm_pd:router_held_bytes", "Request bodies that the router holds.", self.held
        )
        yield CounterMetricFamily(
            "vllm_pd:router_held_refusals",
            "Requests refused as there was no memory for their bodies.",
            self.num_refused,
        )

    def now(self) -> float:
        """Return the time, in seconds."""
        return self._clock()

    def note_held(self, seconds: float) -> None:
        """Take note of how long a body was held."""
        self._hold_time.note(seconds)


class Hold:
    """What one request holds of the budget. Made by ``BodyBudget.hold``."""

    __slots__ = ("_budget", "_num_bytes", "_since")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0
        self._since = 0.0

    def expect(self, num_bytes: int) -> None:
        """Check that a body of an announced length has a chance.

        Raises:
            OverloadedError: it has none now.
        """
        self._budget.check(num_bytes)

    def grow(self, num_bytes: int) -> None:
        """Hold some bytes more.

        Raises:
            OverloadedError: there is no place for them. What is held stays held.
        """
        self._budget.check(num_bytes)
        if not self._num_bytes:
            self._since = self._budget.now()
        self._num_bytes += num_bytes
        self._budget.change(num_bytes)

    def release(self) -> None:
        """Give all of it back; idempotent."""
        if self._num_bytes:
            self._budget.note_held(self._budget.now() - self._since)
            self._budget.change(-self._num_bytes)
            self._num_bytes = 0
