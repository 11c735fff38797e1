"""KV hand-overs of all requests, by the metrics of the instances that fetched.

A timeline comes with whole answers only. The histograms that connectors fill on the
decode side have every hand-over, of streams and of other connectors, too; what is new in
them since the last scrape is what happened since.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from vllm_pd.router.spread import bucket_of

_HISTOGRAMS = (
    "vllm_pd:kv_fetch_seconds",  # PDConnector
    "vllm:nixl_xfer_time_seconds",  # NixlConnector of vLLM 0.32, ``nixl/stats.py``
)
_LINE = re.compile(r'\{(?:[^\n]*?[{,])?le="([0-9.e+-]+|\+Inf)"[^\n]*\} ([0-9.e+]+)$', re.MULTILINE)
_MAX_NEW = 10_000
"""Hand-overs of one scrape that are counted; there are never so many in an interval."""

Scrape = Callable[[str], Awaitable[str | None]]
Note = Callable[[list[int], float], None]


class HandoverWatch:
    """Reads hand-overs from what instances show whenever they are scraped.

    Args:
        scrape: returns the metrics of the instance at a base URL, or None.
        note: takes new hand-overs, by ``bucket_of``, and about how long all took.
    """

    def __init__(self, scrape: Scrape, note: Note) -> None:
        self._scrape = scrape
        self._note = note
        self._last: dict[str, Mapping[float, int]] = {}

    async def scrape(self, base_url: str) -> str | None:
        """Return the metrics of an instance, and take note of its hand-overs."""
        text = await self._scrape(base_url)
        if text is not None:
            found = parse_handovers(text)
            last, self._last[base_url] = self._last.get(base_url), found
            # Nobody knows when those of the first scrape were.
            if last is not None and (seconds := new_handovers(last, found)):
                self._note([bucket_of(one) for one in seconds], sum(seconds))
        return text

    def forget(self, base_url: str) -> None:
        """An instance has restarted or is gone."""
        self._last.pop(base_url, None)


def parse_handovers(text: str) -> Mapping[float, int]:
    """Return how many hand-overs an instance has made, by upper bound in seconds.

    Those of all its engines together; none where it shows no such histogram.
    """
    found: Counter[float] = Counter()
    for name in _HISTOGRAMS:
        name = f"\n{name}_bucket"
        start = text.find(name)
        while start >= 0:
            line = _LINE.match(text, start + len(name))
            if line is not None:
                with contextlib.suppress(ValueError, OverflowError):  # these are no numbers
                    found[float(line[1])] += int(float(line[2]))
            start = text.find(name, start + len(name))
    return found


def new_handovers(last: Mapping[float, int], now: Mapping[float, int]) -> list[float]:
    """Return about how long each hand-over between two scrapes took, in seconds.

    Those of a bucket are spread evenly over it; of those beyond the last bound only that
    is known. Nothing, if the counts are not of the same engines.
    """
    seconds: list[float] = []
    lower, seen = 0.0, 0
    for upper in sorted(now):
        total = now[upper] - last.get(upper, 0)
        num = total - seen
        if num < 0 or total > _MAX_NEW:
            return []
        top = upper if upper < math.inf else lower
        seconds += [lower + (top - lower) * (i + 0.5) / num for i in range(num)]
        lower, seen = top, total
    return seconds
