"""What the parts of the router count together, each in a process of its own."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from vllm_pd.config import Role, RoleLabel
from vllm_pd.errors import OverloadedError
from vllm_pd.router.affinity import AffinityIndex, read_prompt
from vllm_pd.router.api_keys import Client, Limits
from vllm_pd.router.health import DEFAULT_LIMITS
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.loads import Ledger, Load, Work
from vllm_pd.router.workers.board import Board, News, Row, make_board

KEY = 1
URL = "http://d"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def boards() -> list[Board]:
    fd = make_board(3)
    boards = [Board(fd, 3, own) for own in range(3)]
    boards.append(Board(fd, 3))
    os.close(fd)
    return boards


@pytest.fixture
def rows(boards: list[Board]) -> list[Row]:
    return [board.row(KEY) for board in boards[:3]]


# Load


def test_all_workers_see_what_is_open_on_an_instance(rows: list[Row]) -> None:
    one, other, idle = (Ledger(row) for row in rows)
    with one.open(Work(1, 2, 3), num_requests=1), other.open(Work(10, 20, 30)):
        for ledger in (one, other, idle):
            assert (ledger.in_flight, ledger.outstanding) == (1, Work(11, 22, 33))
        assert (one.own_in_flight, idle.own_in_flight) == (1, 0)
    for ledger in (one, other, idle):
        assert (ledger.in_flight, ledger.outstanding) == (0, Work())


def test_requests_of_another_worker_are_not_foreign(rows: list[Row]) -> None:
    one, other = Ledger(rows[0]), Ledger(rows[1])
    with one.open(Work(num_sequences=4), num_requests=4):
        other.note_scrape(Load(5, 0, 0.0), num_own_before=other.outstanding.num_sequences)
        assert other.scrape is not None
        assert other.scrape.num_foreign == 1


def test_an_instance_that_comes_back_while_old_requests_are_open_counts_both(
    rows: list[Row],
) -> None:
    old, new, reader = Ledger(rows[0]), Ledger(rows[0]), Ledger(rows[1])
    with old.open(Work(kv_tokens=5), num_requests=1):
        with new.open(Work(kv_tokens=7), num_requests=1):
            assert (reader.in_flight, reader.outstanding.kv_tokens) == (2, 12)
        assert (reader.in_flight, reader.outstanding.kv_tokens) == (1, 5)


class FullRow(Row):
    """A row that takes nothing."""

    def add(self, *_changes: int) -> None:
        raise OSError("no room")


def test_work_that_cannot_be_shown_has_not_begun(boards: list[Board]) -> None:
    ledger = Ledger(FullRow(boards[0], KEY, None))
    with pytest.raises(OSError, match="no room"), ledger.open(Work(1, 2, 3), num_requests=1):
        pass
    assert (ledger.own_in_flight, ledger.outstanding) == (0, Work())


# Limits of a client


def test_open_requests_of_a_client_are_limited_over_all_workers(rows: list[Row]) -> None:
    one, other = (Client("a", Limits(max_concurrent=2), row=row) for row in rows[:2])
    with (
        one.request(),
        one.request(),
        pytest.raises(OverloadedError, match="2 requests open"),
        other.request(),
    ):
        pass
    with other.request(), other.request():
        pass


def send(client: Client, count: int) -> None:
    for _ in range(count):
        with client.request():
            pass


def test_requests_per_minute_are_limited_over_all_workers(rows: list[Row]) -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=6)
    one, other, late = (Client("a", limits, row=row, clock=clock) for row in rows)
    send(one, 3)
    send(other, 2)
    send(one, 1)
    for client in (one, other, late):
        with pytest.raises(OverloadedError) as caught:
            send(client, 1)
        assert caught.value.retry_after_s == 10
    clock.now += 10.0
    send(late, 1)
    with pytest.raises(OverloadedError):
        send(one, 1)


def test_a_silent_worker_does_not_count_what_others_have_used_long_ago(rows: list[Row]) -> None:
    clock = Clock()
    one, other = (
        Client("a", Limits(requests_per_minute=6), row=row, clock=clock) for row in rows[:2]
    )
    for _ in range(5):
        send(one, 6)
        clock.now += 60.0
    send(other, 6)
    with pytest.raises(OverloadedError):
        send(one, 1)


# What instances have seen


class Gossip:
    """News by the board, for instances that all workers know by a number."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def tell_seen(self, base_url: str, digest: int, tokens: int) -> None:

        assert base_url == URL
        self._board.tell(News(KEY, digest, tokens))

    def seen(self) -> list[tuple[str, int, int]]:
        return [(URL, one.digest, one.tokens) for one in self._board.news()]


def test_a_prompt_that_went_through_one_worker_is_known_to_all(boards: list[Board]) -> None:
    one, other = (AffinityIndex(gossip=Gossip(board)) for board in boards[:2])
    prompt = read_prompt({"prompt": "x" * 5000}, session="s")
    assert other.matches(prompt).credit == {}
    one.note(prompt, URL)
    assert other.matches(prompt) == one.matches(prompt)
    assert other.matches(prompt).cached[URL] > 1000


def test_what_was_told_before_an_instance_restarted_is_forgotten(boards: list[Board]) -> None:
    one, other = (AffinityIndex(gossip=Gossip(board)) for board in boards[:2])
    prompt = read_prompt({"prompt": "x" * 5000})
    one.note(prompt, URL)
    other.forget(URL)
    assert other.matches(prompt).cached == {}


# Doubts


async def healthy(_url: str) -> bool:
    return True


def pool_of(clock: Clock, breaker_failures: int = 2) -> InstancePool:
    pool = InstancePool(
        [],
        [URL],
        probe=healthy,
        health_interval_s=3600.0,
        limits=replace(DEFAULT_LIMITS, breaker_failures=breaker_failures),
        clock=clock,
    )
    for instance in pool:
        instance.probes.note_probe(healthy=True)
    return pool


def test_what_fails_in_one_worker_is_told_and_doubted_in_another() -> None:
    clock = Clock()
    one, other = pool_of(clock), pool_of(clock)
    told: list[tuple[str, bool]] = []
    one.subscribe_doubts(lambda url, tripped: told.append((url, tripped)))
    other.subscribe_doubts(lambda _url, _tripped: pytest.fail("an echo"))
    (instance,) = one
    for _ in range(2):
        with one.in_use(instance) as use:
            use.failed(ConnectionResetError())
    assert told == [(URL, False), (URL, True)]

    other.doubt(URL, tripped=False)
    (doubted,) = other
    assert not doubted.healthy
    assert doubted.probe_now.is_set()
    doubted.probes.note_probe(healthy=True)
    other.doubt(URL, tripped=True)
    assert not other.has_healthy(Role.DECODE)


def test_a_failure_that_opens_the_breaker_is_told_at_once() -> None:
    # In two messages, the probe after the first one could bring the instance back.
    clock = Clock()
    one, other = (pool_of(clock, breaker_failures=1) for _ in range(2))
    told: list[tuple[str, bool]] = []
    one.subscribe_doubts(lambda url, tripped: told.append((url, tripped)))
    (instance,) = one
    with one.in_use(instance) as use:
        use.failed(ConnectionResetError())
    assert told == [(URL, True)]

    other.doubt(URL, tripped=True)
    (doubted,) = other
    assert not doubted.healthy
    assert doubted.probe_now.is_set()
    doubted.probes.note_probe(healthy=True)
    assert not other.has_healthy(Role.DECODE)


def test_a_doubt_about_an_instance_that_is_not_known_is_none_of_our_business() -> None:
    pool = pool_of(Clock())
    pool.doubt("http://other", tripped=True)
    assert [one.role for one in pool if pool.is_accepting(one)] == [RoleLabel.DECODE]
