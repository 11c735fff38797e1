"""What the router counts, for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from vllm_pd.config import Role
from vllm_pd.router.activity import Activity, Tally, Timed
from vllm_pd.router.collectors import Counts, Durations
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.pace import Pace
from vllm_pd.router.spread import bucket_of
from vllm_pd.router.timeline import Timeline
from vllm_pd.router.usage import PromptDetails
from vllm_pd.router.workers.merge import Page, page_of

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

# In seconds, all of them of ``spread.BOUNDS``.
_QUEUE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 28.0, 63.0)
_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    *(5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 630.0),
)
_FETCH_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0),
)
_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.063, 0.08),
    *(0.1, 0.16, 0.25, 0.5, 1.0, 2.5, 10.0),
)

BUSY = 8
"""Requests in flight from which on not every stream is timed."""

ONE_IN = 4
"""Of so many streams one is timed then."""

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
    """The metrics of one process, in a registry of its own.

    Attributes:
        activity: the last minutes of them, for the dashboard.
        num_in_flight: requests that are being served.
    """

    LEAST_OF = ("vllm_pd:router_instance_up",)
    """Gauges of which the lowest value of all workers counts; others are added up."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.activity = Activity()
        self.num_in_flight = 0
        self._num_streams = 0
        self._make_stages()
        self._requests = self._counts(
            "requests", "Requests to the OpenAI endpoints.", "endpoint", "path", "code"
        )
        self._in_flight = Gauge(
            "vllm_pd:router_requests_in_flight",
            "Requests to the OpenAI endpoints that are being served.",
            registry=self._registry,
        )
        self._prefill_retries = Counter(
            "vllm_pd:router_prefill_retries",
            "Prefill legs sent again, to another prefill instance.",
            registry=self._registry,
        )
        self._decode_only = self._counts(
            "decode_only", "Requests that the decode instance prefilled by itself.", "reason"
        )
        self.early_decodes = Counter(
            "vllm_pd:router_early_decodes",
            "Decode legs that were sent before their prefill had ended, and served.",
            registry=self._registry,
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

    def _make_stages(self) -> None:
        """Make the histograms of a request's stages."""
        self._queue = self._durations(
            "queue", "Wait for a slot of a stage in the router.", _QUEUE_BUCKETS, "stage"
        )
        self._prefill = self._durations(
            "prefill", "Prefill legs that succeeded, from the request to the answer.", _BUCKETS
        )
        self._first_bytes = self._durations(
            "first_bytes",
            "From a request's arrival to the first bytes of its answer.",
            _BUCKETS,
            "path",
        )
        self._request = self._durations(
            "request", "From a request's arrival to the end of its answer.", _BUCKETS, "path"
        )
        self._engine_queue = self._durations(
            "decode_queue",
            "In the queue of the decode engine until it has blocks, where it tells.",
            _QUEUE_BUCKETS,
        )
        self._handover = self._durations(
            "kv_handover", "Fetching the KV cache, where the decode engine tells.", _FETCH_BUCKETS
        )
        self._decode_start = self._durations(
            "decode_start",
            "From a decode leg, its prefill being over, to the first bytes of its stream.",
            _BUCKETS,
        )
        self._inter_token = self._durations(
            "inter_token", "Between two parts of a stream as they pass the router.", _TOKEN_BUCKETS
        )

    def _durations(
        self, name: str, documentation: str, bounds: Sequence[float], label: str | None = None
    ) -> Durations:
        made = Durations(f"vllm_pd:router_{name}_seconds", documentation, bounds, label=label)
        self._registry.register(made)
        return made

    def _counts(self, name: str, documentation: str, *label_names: str) -> Counts:
        made = Counts(f"vllm_pd:router_{name}", documentation, label_names)
        self._registry.register(made)
        return made

    def add(self, collector: Collector) -> None:
        """Show metrics that somebody else keeps, too."""
        self._registry.register(collector)

    @contextlib.contextmanager
    def request(self, endpoint: str) -> Iterator[Outcome]:
        """Count one request, for the time of the context."""
        outcome = Outcome()
        self.num_in_flight += 1
        try:
            yield outcome
        except (asyncio.CancelledError, ConnectionResetError):
            outcome.code = CLIENT_CLOSED
            raise
        finally:
            self.num_in_flight -= 1
            self._note_end(endpoint, outcome)

    def note_queue(self, role: Role, seconds: float) -> None:
        """Take note of a wait for a slot of a stage."""
        what = Timed.PREFILL_QUEUE if role is Role.PREFILL else Timed.DECODE_QUEUE
        self._time(self._queue, what, seconds, role.value)

    def note_prefill(self, seconds: float) -> None:
        """Take note of a prefill leg that succeeded."""
        self._time(self._prefill, Timed.PREFILL, seconds)

    def note_prompt(self, details: PromptDetails, kv_params: Mapping[str, object]) -> None:
        """Take note of a prompt that was prefilled, as far as the instance tells of it."""
        tokens = kv_params.get("remote_num_tokens")
        if type(tokens) is int:
            self.activity.count(Tally.PROMPT_TOKENS, "handed_over", tokens)
        if cached := details.get("cached_tokens"):
            self.activity.count(Tally.PROMPT_TOKENS, "cached", cached)

    def note_prefill_retry(self) -> None:
        """Take note that a prefill leg is sent to another instance."""
        self._prefill_retries.inc()
        self.activity.count(Tally.PREFILL_RETRY)

    def note_decode_only(self, reason: str) -> None:
        """Take note that a decode instance prefills by itself."""
        self._decode_only.add(reason)
        self.activity.count(Tally.DECODE_ONLY, reason)

    def note_decode_start(self, seconds: float) -> None:
        """Take note of how long a decode instance took to begin a stream."""
        self._time(self._decode_start, Timed.DECODE_START, seconds)

    def note_first_bytes(self, outcome: Outcome, *, streamed: bool) -> None:
        """Take note that an instance has begun to answer a request."""
        since = time.monotonic() - outcome.began
        what = Timed.FIRST_TOKEN if streamed else None
        self._time(self._first_bytes, what, since, outcome.path)

    def note_timeline(self, timeline: Timeline | None) -> None:
        """Take note of what a decode instance tells of a request, if it does.

        ``activity`` has the hand-over from elsewhere, with those of streams.
        """
        if timeline is None:
            return
        self._time(self._handover, None, timeline.handover_s)
        if timeline.queue_s is not None:
            self._time(self._engine_queue, Timed.ENGINE_QUEUE, timeline.queue_s)

    def pace(self) -> Pace | None:
        """Return what is to be told of the parts of one stream; None: it is not timed.

        Timing all of them takes about two hundredths of a busy router's time.
        """
        self._num_streams += 1
        if self.num_in_flight >= BUSY and self._num_streams % ONE_IN:
            return None
        return Pace(self._note_gaps)

    def _note_gaps(self, buckets: list[int], total_s: float) -> None:
        self._inter_token.add_all(buckets, total_s)
        self.activity.time_all(Timed.INTER_TOKEN, buckets, total_s)

    def _note_end(self, endpoint: str, outcome: Outcome) -> None:
        code = str(outcome.code)
        self._requests.add(endpoint, outcome.path, code)
        self._time(self._request, Timed.REQUEST, time.monotonic() - outcome.began, outcome.path)
        self.activity.count(Tally.CODE, code)
        self.activity.count(Tally.PATH, outcome.path)

    def _time(
        self, durations: Durations, what: Timed | None, seconds: float, label: str = ""
    ) -> None:
        """Count a duration, and remember it for the last minutes if ``what`` is given."""
        bucket = bucket_of(seconds)
        durations.add(bucket, seconds, label)
        if what is not None:
            self.activity.add(what, bucket, seconds)

    def render(self, pool: InstancePool) -> bytes:
        """Return everything in Prometheus' text format."""
        self._note_state(pool)
        return generate_latest(self._registry)

    def page(self, pool: InstancePool) -> Page:
        """Return everything in a form that can be added up."""
        self._note_state(pool)
        return page_of(self._registry)

    def _note_state(self, pool: InstancePool) -> None:
        self._tasks.set(len(asyncio.all_tasks()))
        self._in_flight.set(self.num_in_flight)
        self._instance_up.clear()  # of those that are not there any more, too
        self._instance_in_flight.clear()
        for instance in pool:
            labels = (instance.role.value, instance.base_url)
            self._instance_up.labels(*labels).set(pool.is_accepting(instance))
            self._instance_in_flight.labels(*labels).set(instance.ledger.own_in_flight)
