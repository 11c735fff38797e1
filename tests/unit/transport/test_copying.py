"""Jobs of the copier threads, run by the threads of the test."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from vllm_pd.errors import TransferError
from vllm_pd.transport.chunks import Move, Stack
from vllm_pd.transport.copying import CopyJob, Part
from vllm_pd.transport.digests import digest
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction
from vllm_pd.transport.memory import address_of, copy_all
from vllm_pd.transport.sources import Source

SIZE = 1000


class Local(Source):
    """Reads this process, and can be told to fail or to call something in between."""

    def __init__(self) -> None:
        super().__init__([])
        self.num_reads = 0
        self.error: Exception | None = None
        self.job_to_cancel: CopyJob | None = None

    def plan(self, *_: object) -> tuple[list[Move], list[bytearray]]:
        raise NotImplementedError

    def read(self, moves: Sequence[Move], stack: Stack | None = None) -> None:
        self.num_reads += 1
        if self.error is not None:
            raise self.error
        if self.job_to_cancel is not None:
            self.job_to_cancel.cancel()
        copy_all(moves)


class Rig:
    """A job that copies bytes one by one, and who waits for its end."""

    def __init__(self, num_parts: int = 1) -> None:
        self.come, self.to = bytearray(range(250)) * 4, bytearray(SIZE)
        self.source = Local()
        posted = Posted("peer", Direction.RECEIVING, 1, (0,), None, SIZE)
        self.ended: list[CopyJob] = []
        self.job = CopyJob(posted, self.source, self.ended.append)
        moves = [(address_of(self.to) + i, address_of(self.come) + i, 1) for i in range(SIZE)]
        self.job.parts += Part(moves, {}).split(num_parts)

    def span(self, first: int, length: int) -> list[tuple[int, int]]:
        return [(address_of(self.to) + first, length)]

    def expected(self, first: int, length: int) -> bytes:
        return digest([(address_of(self.come) + first, length)])


def test_all_is_copied_and_the_end_told_once() -> None:
    rig = Rig()
    rig.job.run()
    assert rig.to == rig.come
    assert rig.ended == [rig.job]
    assert (rig.job.error, rig.job.digests) == (None, {})


@pytest.mark.parametrize("num_parts", [1, 3, 7, SIZE, 2 * SIZE])
def test_split_keeps_every_move_in_parts_of_about_equal_size(num_parts: int) -> None:
    part = Part([(i, i, 1) for i in range(SIZE)], {})
    parts = part.split(num_parts)
    assert [move for piece in parts for move in piece.moves] == part.moves
    assert len(parts) <= num_parts
    assert max(len(piece.moves) for piece in parts) <= -(-SIZE // num_parts)


def test_threads_share_the_parts_and_the_last_one_tells() -> None:
    rig = Rig(num_parts=7)
    rig.job.num_threads = 3
    rig.job.hashed_last = {0: rig.span(0, SIZE)}
    threads = [threading.Thread(target=rig.job.run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rig.to == rig.come
    assert rig.ended == [rig.job]
    assert rig.job.digests == {0: rig.expected(0, SIZE)}


def test_job_is_not_over_before_all_its_threads_are() -> None:
    rig = Rig()
    rig.job.num_threads = 2
    rig.job.run()
    assert rig.ended == []
    rig.job.run()
    assert rig.ended == [rig.job]


def test_parts_are_hashed_when_they_are_copied() -> None:
    rig = Rig(num_parts=2)
    rig.job.parts = [
        Part(part.moves, {i: rig.span(500 * i, 500)}) for i, part in enumerate(rig.job.parts)
    ]
    rig.job.run()
    assert rig.job.digests == {0: rig.expected(0, 500), 1: rig.expected(500, 500)}
    assert rig.job.verify_s > 0


def test_job_without_a_source_only_hashes() -> None:
    rig = Rig()
    job = CopyJob(rig.job.posted, None, rig.ended.append)
    job.parts.append(Part([], {0: [(address_of(rig.come), SIZE)], 1: [(address_of(rig.come), 3)]}))
    job.run()
    assert job.digests == {0: rig.expected(0, SIZE), 1: rig.expected(0, 3)}
    assert (job.error, rig.ended) == (None, [job])


@pytest.mark.parametrize("is_hashed_last", [True, False])
def test_received_bytes_are_shown_once_and_before_they_are_hashed(is_hashed_last: bool) -> None:
    rig = Rig(num_parts=2)
    seen: list[int] = []

    def on_received(data: memoryview) -> None:
        seen.append(len(data))
        data[0] ^= 1

    rig.job.on_received = on_received
    if is_hashed_last:
        rig.job.hashed_last = {0: rig.span(0, SIZE)}
    else:
        rig.job.parts[0].hashed[0] = rig.span(0, 500)
    rig.job.run()
    assert seen == [1]
    assert rig.job.digests[0] != rig.expected(0, SIZE if is_hashed_last else 500)


@pytest.mark.parametrize("error", [OSError(14, "Bad address"), ValueError("a bug")])
def test_error_of_a_copy_is_the_job_s(error: Exception) -> None:
    rig = Rig()
    rig.source.error = error
    rig.job.hashed_last = {0: rig.span(0, SIZE)}
    rig.job.run()
    assert isinstance(rig.job.error, TransferError)
    assert rig.ended == [rig.job]
    assert rig.job.digests == {}


def test_cancelled_job_stops_soon_and_still_ends() -> None:
    rig = Rig()
    rig.source.job_to_cancel = rig.job
    rig.job.run()
    assert rig.source.num_reads == 1
    assert "lost" in str(rig.job.error)
    assert rig.ended == [rig.job]


def test_job_that_is_cancelled_before_it_begins_copies_nothing() -> None:
    rig = Rig()
    rig.job.cancel()
    rig.job.run()
    assert (rig.source.num_reads, rig.to) == (0, bytearray(SIZE))
    assert rig.ended == [rig.job]


def test_cancelled_job_hashes_no_further() -> None:
    rig = Rig()
    job = CopyJob(rig.job.posted, None, rig.ended.append)
    job.parts.append(Part([], {0: [(address_of(rig.come), SIZE)]}))
    job.cancel()
    job.run()
    assert job.digests == {}
    assert rig.ended == [job]
