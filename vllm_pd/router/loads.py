"""How busy an instance is: by its own metrics, and by what this router has open there."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from vllm_pd.router.workers.board import Row

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_USAGE = "vllm:kv_cache_usage_perc"
_MODEL_LABEL = re.compile(r'[{,]model_name="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Load:
    """What an instance's ``/metrics`` says of it, all of its engines together.

    Attributes:
        num_running: sequences that are being computed.
        num_waiting: sequences that wait, be it for room or for their KV cache.
        kv_usage: share of the KV cache that is in use, of the fullest engine; 1 is full.
    """

    num_running: int
    num_waiting: int
    kv_usage: float


class Work(msgspec.Struct, frozen=True):  # some are made for each request
    """What requests ask of an instance.

    Attributes:
        prefill_tokens: prompt tokens to compute there.
        kv_tokens: prompt tokens whose KV cache is held there while it decodes.
        num_sequences: sequences that vLLM makes of the requests.
    """

    prefill_tokens: int = 0
    kv_tokens: int = 0
    num_sequences: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.prefill_tokens + other.prefill_tokens,
            self.kv_tokens + other.kv_tokens,
            self.num_sequences + other.num_sequences,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.prefill_tokens - other.prefill_tokens,
            self.kv_tokens - other.kv_tokens,
            self.num_sequences - other.num_sequences,
        )


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading of an instance's metrics.

    Attributes:
        load: what it showed.
        num_own: how many of the sequences it showed may have been this router's.
    """

    load: Load
    num_own: int

    @property
    def num_foreign(self) -> int:
        """Sequences that came past this router: from other routers or other clients.

        Only these are added to what the router knows by itself, so that nothing
        counts twice, and what was sent since the scrape counts at once.
        """
        return max(0, self.load.num_running + self.load.num_waiting - self.num_own)


class Ledger:
    """What this router has open on one instance, and the last scrape of it.

    Args:
        row: where the workers of the router show each other what they have open; None:
            there is one process.

    Attributes:
        own_in_flight: requests that this process has open there.
        scrape: the last scrape, or None if the last attempt failed: an old one
            would count foreign work that may be long done.
    """

    __slots__ = ("_own", "_row", "own_in_flight", "scrape")

    def __init__(self, row: Row | None = None) -> None:
        self._row = row
        self._own = Work()
        self.own_in_flight = 0
        self.scrape: Scrape | None = None

    @property
    def in_flight(self) -> int:
        """Requests that the router has open there."""
        return self.totals()[0]

    @property
    def outstanding(self) -> Work:
        """The sum of all open work."""
        return self.totals()[1]

    def totals(self) -> tuple[int, Work]:
        """Return ``in_flight`` and ``outstanding`` of one moment."""
        if self._row is None:
            return self.own_in_flight, self._own
        num_requests, prefill_tokens, kv_tokens, num_sequences = self._row.others()
        work = self._own + Work(prefill_tokens, kv_tokens, num_sequences)
        return self.own_in_flight + num_requests, work

    def begin(self, work: Work, *, num_requests: int = 0) -> None:
        """Count work as outstanding, until ``end``.

        Args:
            work: what there is to do.
            num_requests: requests that begin with it; 0: it is part of one that has begun.
        """
        self._show(work, num_requests, 1)  # first: if that fails, nothing has begun
        self._own += work
        self.own_in_flight += num_requests

    def end(self, work: Work, *, num_requests: int = 0) -> None:
        """Count work as done, with the arguments of ``begin``."""
        self._own -= work
        self.own_in_flight -= num_requests
        self._show(work, num_requests, -1)

    @contextlib.contextmanager
    def open(self, work: Work, *, num_requests: int = 0) -> Iterator[None]:
        """Count work as outstanding for the time of the context."""
        self.begin(work, num_requests=num_requests)
        try:
            yield
        finally:
            self.end(work, num_requests=num_requests)

    def _show(self, work: Work, num_requests: int, sign: int) -> None:
        # What has changed and not what is there: a ledger of the same instance from before
        # its removal may count in the same row.
        if self._row is not None:
            changes = (num_requests, work.prefill_tokens, work.kv_tokens, work.num_sequences)
            self._row.add(*(sign * change for change in changes))

    def note_scrape(self, load: Load | None, *, num_own_before: int) -> None:
        """Take the result of a scrape over.

        Args:
            load: what the instance showed; None if it could not be read.
            num_own_before: ``outstanding.num_sequences`` when the instance was asked.
                What began or ended meanwhile may be in the reading or not; it is
                taken to be in it.
        """
        if load is None:
            self.scrape = None
        else:
            self.scrape = Scrape(load, max(num_own_before, self.outstanding.num_sequences))


def parse_load(text: str) -> Load | None:
    """Read the load from the text that an instance gives at ``/metrics``.

    A scan for three names: prometheus_client's parser takes tens of milliseconds
    for a page, which would hold up every stream of the router.

    Returns:
        The load, or None if a value is missing or makes no sense.
    """
    try:
        running, waiting, kv_usage = (
            _values(text, name) for name in (_RUNNING, _WAITING, _KV_USAGE)
        )
        return Load(int(sum(running)), int(sum(waiting)), max(kv_usage))
    except (ValueError, IndexError, OverflowError):
        return None


def model_name_of(text: str) -> str:
    """Return the model that an instance's ``/metrics`` name; ``""`` if they name none."""
    start = text.find(f"\n{_RUNNING}{{") + 1
    found = _MODEL_LABEL.search(text[start : text.find("\n", start)]) if start else None
    if found is None:
        return ""
    return _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], found[1])


def _values(text: str, name: str) -> list[float]:
    """Return the value of each engine.

    Raises:
        ValueError: a value is no finite number, or negative.
        IndexError: a line has no value.
    """
    values = []
    position = 0
    while (position := text.find(name, position)) >= 0:
        start, position = position, position + len(name)
        # Neither a comment nor a longer name.
        if (start == 0 or text[start - 1] == "\n") and text[position : position + 1] in "{ ":
            end = text.find("\n", position)
            line = text[position : end if end >= 0 else None]
            values.append(_value(line.rpartition("}")[2].split()[0]))
    if not values:
        raise ValueError(f"no {name}")
    return values


def _value(word: str) -> float:
    value = float(word)
    if not 0 <= value < math.inf:
        raise ValueError(f"{value} is no load")
    return value
