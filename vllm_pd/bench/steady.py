"""Whether a run was in a steady state, and the part of it that was. Pure.

In overload the queue grows for as long as requests come, and with it every latency: what
is measured then is the length of the run. So no latency is a property of the service
unless arrivals and completions keep pace.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_pd.bench.records import Record
from vllm_pd.bench.stats import Run, Values

_WARM_UP = 0.1
"""Part of the arrivals that is left out: the service fills up."""

_MAX_WARM_UP_S = 60.0
_NUM_POINTS = 256
_NUM_PARTS = 20
"""Parts of a window of which each has its throughput."""

_MIN_COMPLETION_RATE = 0.98
_SIGNIFICANT = 3.0
_MIN_WINDOWS = 10.0
"""How many times the longest requests must fit in the window (Little's law needs time)."""

_MIN_REQUESTS = 10
_MIN_ANSWERED = 0.5
"""Part of what was due in the first half of the window that must be answered by its end."""


class Regime(enum.Enum):
    """What can be said of a run."""

    STEADY = "steady"
    UNSTABLE = "unstable"
    SHORT = "too short to tell"


@dataclass(frozen=True, slots=True)
class Steadiness:
    """A verdict and what it rests on.

    Attributes:
        regime: the verdict.
        reason: one line for people.
        start_s: where the window begins, in seconds since the start of the run.
        end_s: where it ends: at the last arrival.
        completion_rate: requests that were answered meanwhile per request that came, by
            the trend of the number in flight; NaN where there is no window.
    """

    regime: Regime
    reason: str
    start_s: float
    end_s: float
    completion_rate: float

    def contains(self, record: Record) -> bool:
        """Return whether a request was due in the window."""
        return self.start_s <= record.intended_s <= self.end_s


def judge(records: Sequence[Record]) -> Steadiness:
    """Look for a trend in the number of requests in flight between first and last arrival.

    The trend counts if it is significant against the fluctuation that a steady service
    shows, whose memory is about as long as a request: the slope of a series with
    memory L over a time T has the standard error s / T * sqrt(24 L / T). Requests that
    failed are in no queue, so they do not count as in flight, nor as answered.

    Where requests take as long as the window, no trend is significant. It is overload all
    the same if most of those that were due in its first half were not answered by its end.

    Args:
        records: of one run, in the order of arrival; at least one.
    """
    due = np.asarray([record.intended_s for record in records])
    start, end = _window(due)
    in_window = [record for record in records if start <= record.intended_s <= end]
    if end - start <= 0 or len(in_window) < _MIN_REQUESTS:
        return _without_window(due, start, end)
    times = np.linspace(start, end, _NUM_POINTS)
    flight = _in_flight(records, times)
    slope, level = np.polyfit(times - start, flight, 1)
    residual = float(np.std(flight - (slope * (times - start) + level)))
    duration = end - start
    growth = float(slope) * duration
    # Of those that came first: in overload the later ones would take the queue for memory.
    memory = min(_long_request_s(in_window[: -(-len(in_window) // 3)]), duration)
    error = max(residual, 0.5) * math.sqrt(24 * memory / duration)
    failed = sum(not record.is_ok for record in in_window)
    rate = 1 - (growth + failed) / len(in_window)
    lost = f" ({failed} failed)" if failed else ""
    if 1 - growth / len(in_window) < _MIN_COMPLETION_RATE and growth > _SIGNIFICANT * error:
        return Steadiness(
            Regime.UNSTABLE,
            f"overload: only {rate:.0%} of what came was answered meanwhile{lost}, and the "
            f"number in flight grew by {growth:.0f}; the latencies show the length of the run",
            start,
            end,
            rate,
        )
    if reason := _backlog(in_window, start, end):
        return Steadiness(Regime.UNSTABLE, reason, start, end, rate)
    if (longest := _long_request_s(in_window)) * _MIN_WINDOWS > duration:
        return Steadiness(
            Regime.SHORT,
            f"the window of {duration:.1f} s is less than {_MIN_WINDOWS:g} times a long request "
            f"({longest:.1f} s): it cannot show a slow growth of the queue",
            start,
            end,
            rate,
        )
    return Steadiness(
        Regime.STEADY,
        f"steady for {duration:.1f} s; {rate:.1%} of what came was answered meanwhile{lost}",
        start,
        end,
        rate,
    )


def in_flight(records: Sequence[Record], times: Sequence[float]) -> list[int]:
    """Return how many requests were due and not yet over, at each of some moments."""
    return [int(count) for count in _in_flight(records, np.asarray(times))]


def is_idle(records: Sequence[Record]) -> bool:
    """Return whether most requests of a run found no other one under way."""
    free_at, found_idle = -math.inf, 0
    for record in records:
        found_idle += record.intended_s >= free_at
        free_at = max(free_at, record.ended_s) if record.is_ok else free_at
    return found_idle > len(records) / 2


def answer_rates(records: Sequence[Record]) -> Run:
    """Return answers per second in equal parts of the window, so without start and drain.

    Requests that came all at once have no window: theirs is the one rate until the last answer.
    """
    window = judge(records)
    ended = [record.ended_s for record in records if record.is_ok]
    if window.end_s <= window.start_s:
        duration_s = max(ended, default=math.inf) - window.start_s
        return [np.asarray([len(ended) / duration_s])]
    counts, edges = np.histogram(ended, bins=_NUM_PARTS, range=(window.start_s, window.end_s))
    return [np.asarray([rate]) for rate in counts / np.diff(edges)]


def _window(due: Values) -> tuple[float, float]:
    first, last = float(due.min()), float(due.max())
    return first + min(_WARM_UP * (last - first), _MAX_WARM_UP_S), last


def _without_window(due: Values, start: float, end: float) -> Steadiness:
    if len(due) > 1 and end == start:
        reason = "all requests came at once: the latencies are those of a backlog"
        return Steadiness(Regime.UNSTABLE, reason, start, end, math.nan)
    reason = f"{len(due)} requests are too few to see a trend"
    return Steadiness(Regime.SHORT, reason, start, end, math.nan)


def _backlog(in_window: Sequence[Record], start: float, end: float) -> str:
    """Return why there is a backlog that no trend shows; nothing if there is none."""
    middle = (start + end) / 2
    early = [record for record in in_window if record.is_ok and record.intended_s <= middle]
    answered = sum(record.ended_s <= end for record in early)
    if answered >= _MIN_ANSWERED * len(early):
        return ""
    return (
        f"overload: of the {len(early)} requests that were due in the first half of the window of "
        f"{end - start:.1f} s, {answered} were answered by its end; the latencies show the length "
        "of the run"
    )


def _in_flight(records: Sequence[Record], times: Values) -> Values:
    answered = [record for record in records if record.is_ok]
    came = np.sort([record.intended_s for record in answered])
    left = np.sort([record.ended_s for record in answered])
    count = np.searchsorted(came, times, side="right") - np.searchsorted(left, times, side="right")
    return count.astype(np.float64)


def _long_request_s(records: Sequence[Record]) -> float:
    """Return how long a long request takes, in seconds: the 90th percentile."""
    latencies = [record.e2el_s for record in records if record.is_ok]
    return float(np.percentile(latencies, 90)) if latencies else 0.0
