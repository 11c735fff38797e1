"""What the router counts, for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_pd.router.instances import InstancePool

_QUEUE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    *(5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)  # seconds
CLIENT_CLOSED = 499
"""nginx's status for a client that left before its answer was complete."""


@dataclass(slots=True)
class Outcome:
    """How one request went; filled in while it is served.

    Attributes:
        path: ``X-VLLM-PD-Path`` of the answer, ``none`` if no instance was chosen.
        code: HTTP status; of a stream that broke, the status it should have had.
        began: when the request came, on the monotonic clock.
    """

    path: str = "none"
    code: int = 500
    began: float = field(default_factory=time.monotonic)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vllm_pd:router_requests",
            "Requests to the OpenAI endpoints.",
            ["endpoint", "path", "code"],
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "vllm_pd:router_requests_in_flight",
            "Requests to the OpenAI endpoints that are being served.",
            registry=self._registry,
        )
        self.prefill_retries = Counter(
            "vllm_pd:router_prefill_retries",
            "Prefill legs sent again, to another prefill instance.",
            registry=self._registry,
        )
        self.decode_only = Counter(
            "vllm_pd:router_decode_only",
            "Requests that the decode instance prefilled by itself.",
            ["reason"],
            registry=self._registry,
        )
        self.early_decodes = Counter(
            "vllm_pd:router_early_decodes",
            "Decode legs that were sent before their prefill had ended, and served.",
            registry=self._registry,
        )
        self.queue_seconds = Histogram(
            "vllm_pd:router_queue_seconds",
            "Wait for a slot of a stage in the router.",
            ["stage"],
            registry=self._registry,
            buckets=_QUEUE_BUCKETS,
        )
        self.prefill_seconds = Histogram(
            "vllm_pd:router_prefill_seconds",
            "Prefill legs that succeeded, from the request to the answer.",
            registry=self._registry,
            buckets=_REQUEST_BUCKETS,
        )
        self._first_bytes_seconds = Histogram(
            "vllm_pd:router_first_bytes_seconds",
            "From a request's arrival to the first bytes of its answer.",
            ["path"],
            registry=self._registry,
            buckets=_REQUEST_BUCKETS,
        )
        self._request_seconds = Histogram(
            "vllm_pd:router_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["path"],
            registry=self._registry,
            buckets=_REQUEST_BUCKETS,
        )
        self.access_log_lost = Counter(
            "vllm_pd:router_access_log_lost",
            "Lines of the access log that could not be written.",
            registry=self._registry,
        )
        self._tasks = Gauge(
            "vllm_pd:router_tasks",
            "Tasks of the router's event loop; what stays when nobody asks anything, has leaked.",
            registry=self._registry,
        )
        self._instance_up = Gauge(
            "vllm_pd:router_instance_up",
            "Whether the router sends requests to an instance.",
            ["role", "url"],
            registry=self._registry,
        )
        self._instance_in_flight = Gauge(
            "vllm_pd:router_instance_in_flight",
            "Requests that the router has open on an instance.",
            ["role", "url"],
            registry=self._registry,
        )

    @contextlib.contextmanager
    def request(self, endpoint: str) -> Iterator[Outcome]:
        """Count one request, for the time of the context."""
        outcome = Outcome()
        self._in_flight.inc()
        try:
            yield outcome
        except (asyncio.CancelledError, ConnectionResetError):
            outcome.code = CLIENT_CLOSED
            raise
        finally:
            self._in_flight.dec()
            self._requests.labels(endpoint, outcome.path, str(outcome.code)).inc()
            self._request_seconds.labels(outcome.path).observe(time.monotonic() - outcome.began)

    def note_first_bytes(self, outcome: Outcome) -> None:
        """Take note that an instance has begun to answer a request."""
        since = time.monotonic() - outcome.began
        self._first_bytes_seconds.labels(outcome.path).observe(since)

    def render(self, pool: InstancePool) -> bytes:
        """Return everything in Prometheus' text format."""
        self._tasks.set(len(asyncio.all_tasks()))
        self._instance_up.clear()  # of those that are not there any more, too
        self._instance_in_flight.clear()
        for instance in pool:
            labels = (instance.role.value, instance.base_url)
            self._instance_up.labels(*labels).set(pool.is_accepting(instance))
            self._instance_in_flight.labels(*labels).set(instance.in_flight)
        return generate_latest(self._registry)
