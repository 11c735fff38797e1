from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.router.workers.board import NUM_NEWS, NUM_ROWS, Board, News, key_of, make_board

KEY = key_of("instance", "http://a")
OTHER_KEY = key_of("instance", "http://b")


@pytest.fixture
def boards() -> Iterator[tuple[Board, Board, Board, Board]]:
    """The boards of three workers, and that of their parent."""
    fd = make_board(3)
    yield Board(fd, 3, 0), Board(fd, 3, 1), Board(fd, 3, 2), Board(fd, 3)
    os.close(fd)


Boards = tuple[Board, Board, Board, Board]


def test_a_worker_sees_the_sums_of_the_others_without_its_own(boards: Boards) -> None:
    rows = [board.row(KEY) for board in boards[:3]]
    for number, row in enumerate(rows):
        row.add(10**number, 2, -1)
    assert rows[0].others() == (110, 4, -2, 0)
    assert rows[2].others() == (11, 4, -2, 0)


NUMBERS = st.integers() | st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9)


@given(st.lists(st.lists(NUMBERS, min_size=4, max_size=4)))
def test_no_number_is_too_large_to_be_counted_and_taken_back(changes: list[list[int]]) -> None:
    fd = make_board(2)
    board, other = Board(fd, 2, 0), Board(fd, 2, 1)
    os.close(fd)
    row, reader = board.row(KEY), other.row(KEY)
    row.add(1, 2, 3, 4)
    for change in changes:
        row.add(*change)
        sums = reader.others()
        assert all(-(2**63) <= one < 2**63 for one in sums)
    for change in changes:
        row.add(*(-one for one in change))
    assert reader.others() == (1, 2, 3, 4)


def test_counts_of_different_things_do_not_mix(boards: Boards) -> None:
    other = boards[1].row(OTHER_KEY)
    row = boards[1].row(KEY)
    row.add(1)
    other.add(7)
    assert boards[0].row(KEY).others() == (1, 0, 0, 0)
    assert boards[0].row(OTHER_KEY).others() == (7, 0, 0, 0)


def test_both_holders_of_a_key_count_in_one_row(boards: Boards) -> None:
    first, second = boards[0].row(KEY), boards[0].row(KEY)
    first.add(1)
    second.add(1)
    assert boards[1].row(KEY).others()[0] == 2


def test_a_row_that_nobody_holds_is_free_for_others(boards: Boards) -> None:
    reader = boards[1].row(KEY)
    row = boards[0].row(KEY)
    row.add(5)
    assert reader.others()[0] == 5
    del row
    assert reader.others()[0] == 0
    kept = boards[0].row(OTHER_KEY)
    kept.add(9)
    assert reader.others()[0] == 0
    assert boards[1].row(OTHER_KEY).others()[0] == 9


def test_each_worker_that_counts_something_is_seen_by_itself(boards: Boards) -> None:
    row = boards[1].row(KEY)
    row.put(1, 2, 3)
    assert boards[0].row(KEY).each() == [(1, 2, 3, 0)]


def test_what_a_dead_worker_had_open_is_gone_once_its_part_is_cleared(boards: Boards) -> None:
    dead, living = boards[0].row(KEY), boards[1].row(KEY)
    dead.add(5, 5, 5, 5)
    living.add(1)
    boards[3].clear(0)
    reader = boards[2].row(KEY)
    assert reader.others() == (1, 0, 0, 0)


def test_more_rows_than_there_is_room_for_stay_private(
    boards: Boards, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [boards[0].row(number + 1) for number in range(NUM_ROWS)]
    assert not caplog.records
    surplus = boards[0].row(OTHER_KEY)
    surplus.add(1)
    assert "is not shared" in caplog.text
    assert boards[1].row(OTHER_KEY).others()[0] == 0
    assert len(rows) == NUM_ROWS


def test_a_key_is_found_only_where_it_is_whole(boards: Boards) -> None:
    halves = [boards[0].row(0xAAAA_AAAA_0000_0001), boards[0].row(0x0000_0002_BBBB_BBBB)]
    across = int.from_bytes(
        b"".join(
            key.to_bytes(8, "little") for key in (0xAAAA_AAAA_0000_0001, 0x0000_0002_BBBB_BBBB)
        )[4:12],
        "little",
    )
    for row in halves:
        row.add(1)
    assert boards[1].row(across).others()[0] == 0


def test_news_reach_every_other_worker_once(boards: Boards) -> None:
    news = [News(KEY, 2**64 - 1, 256), News(KEY, 2, 288)]
    for one in news:
        boards[0].tell(one)
    assert list(boards[1].news()) == news
    assert list(boards[2].news()) == news
    assert list(boards[1].news()) == list(boards[0].news()) == []


def test_who_comes_late_learns_what_is_still_there(boards: Boards) -> None:
    for number in range(NUM_NEWS + 3):
        boards[0].tell(News(KEY, number, 256))
    assert [one.digest for one in boards[1].news()] == list(range(3, NUM_NEWS + 3))


def test_news_of_a_worker_that_was_replaced_are_read_from_its_beginning(boards: Boards) -> None:
    for number in range(5):
        boards[0].tell(News(KEY, number, 256))
    assert len(list(boards[1].news())) == 5
    boards[3].clear(0)
    boards[0].tell(News(KEY, 7, 256))
    assert [one.digest for one in boards[1].news()] == [7]
