"""What happened to each request, and figures of it. Pure.

Latencies count from the moment a request was to be sent, not from when the client got
round to it: a client that is late would otherwise hide the wait that it causes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_pd.bench.stats import Run, Values
from vllm_pd.errors import ConfigError

EARLY_S = 0.005
"""A request that is sent so much before its time shows that the times are not its own."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Instants are seconds since the start of the run.

    Attributes:
        intended_s: when it was to be sent.
        sent_s: when it was sent.
        first_s: when the first token was there; NaN if it failed.
        gaps_s: between one chunk of tokens and the next.
        prompt_len: tokens.
        output_len: tokens; 0 if it failed.
        error: why it failed, one line; empty if it did not.
    """

    intended_s: float
    sent_s: float
    first_s: float
    gaps_s: tuple[float, ...]
    prompt_len: int
    output_len: int
    error: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it was answered."""
        return not self.error

    @property
    def lag_s(self) -> float:
        """How late the client was."""
        return self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_s - self.intended_s

    @property
    def second_s(self) -> float:
        """Time to second token, which no early first chunk can hide; NaN without one."""
        return self.ttft_s + self.gaps_s[0] if self.gaps_s else math.nan

    @property
    def ended_s(self) -> float:
        """When the last token was there."""
        return self.first_s + sum(self.gaps_s)

    @property
    def e2el_s(self) -> float:
        """Time to the last token."""
        return self.ended_s - self.intended_s

    @property
    def tpot_s(self) -> float:
        """Time per token after the first; NaN if there is none."""
        return sum(self.gaps_s) / (self.output_len - 1) if self.output_len > 1 else math.nan

    @property
    def max_stall_s(self) -> float:
        """Longest gap; NaN without one."""
        return max(self.gaps_s, default=math.nan)


METRICS: Mapping[str, str] = {
    "ttft": "TTFT",
    "second": "Time to 2nd token",
    "tpot": "TPOT",
    "itl": "ITL",
    "stall": "Max stall",
    "e2el": "E2E latency",
}
"""Latencies by name, and how reports call them."""


def metric_values(records: Iterable[Record], metric: str) -> Run:
    """Return a latency of each request in milliseconds; failed requests have none.

    Args:
        records: in the order of arrival.
        metric: one of ``METRICS``.
    """
    return [_values(record, metric) for record in records]


def pooled(records: Iterable[Record], metric: str) -> list[float]:
    """Return the same of all requests together."""
    return [float(value) for values in metric_values(records, metric) for value in values]


def read_result(
    result: Mapping[str, Any], schedule: Mapping[str, Any] | None
) -> tuple[list[Record], bool]:
    """Read what ``vllm bench serve --save-detailed`` wrote.

    Args:
        result: its JSON. ``start_times`` are of the monotonic clock, ``queue_times``
            the delays between the release of a request and its sending.
        schedule: ``started`` (on the same clock) and ``offsets_s``, when each request was
            to be sent; None: not known.

    Returns:
        The records, and whether ``intended_s`` is from the schedule. If not, it is the
        moment in which the client released the request.

    Raises:
        ConfigError: a part is missing.
    """
    try:
        starts = [float(value) for value in result["start_times"]]
        queued = [float(value) for value in result.get("queue_times") or [0.0] * len(starts)]
        fields = zip(
            starts,
            result["ttfts"],
            result["itls"],
            result["input_lens"],
            result["output_lens"],
            result["errors"],
            strict=True,
        )
        rows = list(fields)
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"the result of vllm bench serve is incomplete: {exc}") from exc
    released = [start - delay for start, delay in zip(starts, queued, strict=True)]
    began, intended = _intended(released, schedule)
    records = []
    for due, (start, ttft, gaps, prompt_len, output_len, error) in zip(
        intended or released, rows, strict=True
    ):
        text = _one_line(error)
        if not text and not ttft:
            text = "no answer"
        records.append(
            Record(
                intended_s=due - began,
                sent_s=start - began,
                first_s=math.nan if text else start + ttft - began,
                gaps_s=() if text else tuple(float(gap) for gap in gaps),
                prompt_len=int(prompt_len),
                output_len=0 if text else int(output_len),
                error=text,
            )
        )
    return records, intended is not None


def _intended(
    released: Sequence[float], schedule: Mapping[str, Any] | None
) -> tuple[float, list[float] | None]:
    """Return when the run began, and when requests were due if that can be believed."""
    if schedule is None or len(schedule["offsets_s"]) < len(released):
        return min(released, default=0.0), None
    began = float(schedule["started"])
    due = [began + float(offset) for offset in schedule["offsets_s"][: len(released)]]
    if any(moment < wanted - EARLY_S for moment, wanted in zip(released, due, strict=True)):
        return min(released), None
    return began, due


def _one_line(error: Any) -> str:
    """Return the last line of an error, which is the message of a traceback."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _values(record: Record, metric: str) -> Values:
    if not record.is_ok:
        return np.zeros(0)
    match metric:
        case "itl":
            found: Sequence[float] = record.gaps_s
        case "ttft":
            found = (record.ttft_s,)
        case "second":
            found = (record.second_s,)
        case "tpot":
            found = (record.tpot_s,)
        case "stall":
            found = (record.max_stall_s,)
        case "e2el":
            found = (record.e2el_s,)
        case _:
            raise ValueError(f"unknown metric {metric!r}")
    return np.asarray([value * 1e3 for value in found if math.isfinite(value)], dtype=np.float64)
