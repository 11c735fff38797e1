"""Numbers that the workers show each other, in memory that all of them have mapped.

Every worker writes into its own part only, so nothing needs a lock: rows of counts,
found by a key, and a ring of news. Whoever reads sums over the parts. A number is as
young as the store that wrote it. Rows are written number by number, so a reader may see
a row that is half a request old, which no decision minds. When a worker has died, the
parent clears its part, and what it had open is gone from all sums.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

logger = logging.getLogger(__name__)

NUM_ROWS = 4096
"""Rows of a part: one for each instance, API key and stage, and one for all bodies."""

_NUM_COLUMNS = 4
NUM_NEWS = 8192
"""News that a part holds; older ones are overwritten, whether they were read or not."""

_LEAST, _MOST = -(2**63), 2**63 - 1  # what a number of a row holds
_NEWS_LEN = 3
_KEYS_AT = 0
_VALUES_AT = _KEYS_AT + NUM_ROWS
_HEAD_AT = _VALUES_AT + NUM_ROWS * _NUM_COLUMNS
_NEWS_AT = _HEAD_AT + 1
_PART_LEN = _NEWS_AT + NUM_NEWS * _NEWS_LEN  # in numbers of 8 bytes

Values = tuple[int, int, int, int]


class News(NamedTuple):
    """What a worker has seen of an instance.

    Attributes:
        key: of the instance.
        digest: of a prompt's beginning.
        tokens: length of that beginning.
    """

    key: int
    digest: int
    tokens: int


def key_of(kind: str, name: str) -> int:
    """Return the key of a row; 64 bits, never 0."""
    return xxhash.xxh3_64_intdigest(f"{kind}\0{name}".encode("utf-8", "surrogatepass")) or 1


def make_board(num_workers: int) -> int:
    """Return the descriptor of the memory for a board, all zero."""
    fd = os.memfd_create("vllm-pd-router", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_workers * _PART_LEN * 8)
    return fd


class Board:
    """A board as one process sees it.

    Args:
        fd: what ``make_board`` made; may be closed afterwards.
        num_workers: number of parts.
        own: number of the part that this process writes; None: of the parent, which
            clears parts.
    """

    def __init__(self, fd: int, num_workers: int, own: int | None = None) -> None:
        self._memory = mmap.mmap(fd, num_workers * _PART_LEN * 8)
        self._signed = memoryview(self._memory).cast("B").cast("q")
        self._unsigned = memoryview(self._memory).cast("B").cast("Q")
        self._start = 0 if own is None else own * _PART_LEN
        self._others = [at * _PART_LEN for at in range(num_workers) if at != own]
        self._free = list(range(NUM_ROWS - 1, -1, -1))
        self._rows: weakref.WeakValueDictionary[int, Row] = weakref.WeakValueDictionary()
        self._read: dict[int, int] = {}  # news by part

    def clear(self, worker: int) -> None:
        """Forget what a worker that is gone has written."""
        start = worker * _PART_LEN * 8
        self._memory[start : start + _PART_LEN * 8] = bytes(_PART_LEN * 8)

    def row(self, key: int) -> Row:
        """Return this worker's row of a key; it is freed when nobody holds it any more."""
        row = self._rows.get(key)
        if row is None:
            at = self._free.pop() if self._free else None
            if at is None:
                logger.warning("more than %d things to count: one is not shared", NUM_ROWS)
            row = self._rows[key] = Row(self, key, at)
            if at is not None:
                self._unsigned[self._start + _KEYS_AT + at] = key
                weakref.finalize(row, self._release, at).atexit = False
        return row

    def write(self, at: int, values: Values) -> None:
        """Write a row of this worker; what does not fit counts as the most or least that does."""
        start = self._start + _VALUES_AT + at * _NUM_COLUMNS
        for column, value in enumerate(values):
            self._signed[start + column] = max(_LEAST, min(value, _MOST))

    def read(self, key: int, found: dict[int, int]) -> list[Values]:
        """Return the rows that the other workers have of a key.

        Args:
            key: of the rows.
            found: where they were, by part; kept by the caller for the next time.
        """
        rows = []
        for part in self._others:
            at = found.get(part)
            if at is None or self._unsigned[part + _KEYS_AT + at] != key:
                at = self._find(part, key)
                if at is None:
                    continue
                found[part] = at
            start = part + _VALUES_AT + at * _NUM_COLUMNS
            one, two, three, four = self._signed[start : start + _NUM_COLUMNS]
            rows.append((one, two, three, four))
        return rows

    def tell(self, news: News) -> None:
        """Show something to the other workers."""
        head = self._unsigned[self._start + _HEAD_AT]
        at = self._start + _NEWS_AT + head % NUM_NEWS * _NEWS_LEN
        for column, value in enumerate(news):
            self._unsigned[at + column] = value
        self._unsigned[self._start + _HEAD_AT] = head + 1

    def news(self) -> Iterator[News]:
        """Yield what the other workers have told since the last time, as far as it is there.

        News that are written at the same moment may come out mixed up.
        """
        for part in self._others:
            head = self._unsigned[part + _HEAD_AT]
            since = self._read.get(part, 0)
            if since > head:  # another process has that part now
                since = 0
            self._read[part] = head
            for number in range(max(since, head - NUM_NEWS), head):
                at = part + _NEWS_AT + number % NUM_NEWS * _NEWS_LEN
                yield News(*self._unsigned[at : at + _NEWS_LEN])

    def _find(self, part: int, key: int) -> int | None:
        start = (part + _KEYS_AT) * 8
        end = start + NUM_ROWS * 8
        sought = key.to_bytes(8, sys.byteorder)
        at = self._memory.find(sought, start, end)
        while at >= 0 and (at - start) % 8:  # across two keys
            at = self._memory.find(sought, at + 1, end)
        return None if at < 0 else (at - start) // 8

    def _release(self, at: int) -> None:
        self._unsigned[self._start + _KEYS_AT + at] = 0
        self.write(at, (0, 0, 0, 0))
        self._free.append(at)


class Row:
    """Four counts of this worker, and those of the others under the same key."""

    def __init__(self, board: Board, key: int, at: int | None) -> None:
        self._board = board
        self._key = key
        self._at = at
        self._own = [0] * _NUM_COLUMNS
        self._found: dict[int, int] = {}

    def add(self, *changes: int) -> None:
        """Change this worker's counts."""
        for column, change in enumerate(changes):
            self._own[column] += change
        self._write()

    def put(self, *values: int) -> None:
        """Set this worker's counts."""
        self._own[: len(values)] = values
        self._write()

    def each(self) -> list[Values]:
        """Return the counts of each other worker that has any."""
        return self._board.read(self._key, self._found)

    def others(self) -> Values:
        """Return the sums over the other workers."""
        one = two = three = four = 0
        for row in self._board.read(self._key, self._found):
            one, two, three, four = one + row[0], two + row[1], three + row[2], four + row[3]
        return one, two, three, four

    def _write(self) -> None:
        if self._at is not None:
            one, two, three, four = self._own
            self._board.write(self._at, (one, two, three, four))
