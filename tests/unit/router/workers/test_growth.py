"""Instances that come and go for ever leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.router.workers.deployment import until
from vllm_pd.config import InstanceSpec
from vllm_pd.router.affinity import AffinityIndex, read_prompt
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.workers.board import Board, News, key_of, make_board
from vllm_pd.router.workers.changes import Add, Change, Drain, Remove
from vllm_pd.router.workers.hub import Hub
from vllm_pd.router.workers.messages import Ask, FileChanged, MakeChange, Welcome, framed
from vllm_pd.router.workers.shared import Shared

URL = "http://a"
NUM_MANY = 300


async def healthy(_url: str) -> bool:
    return True


async def metrics_text(_url: str) -> str:
    return ""


@pytest.fixture
def boards() -> Iterator[tuple[Board, Board]]:
    fd = make_board(2)
    yield Board(fd, 2, 0), Board(fd, 2, 1)
    os.close(fd)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is old is collected so rarely in a router that it may never be."""
    gc.disable()
    yield
    gc.enable()


def pool_of(board: Board) -> InstancePool:
    return InstancePool(
        [],
        [],
        probe=healthy,
        scrape=metrics_text,
        health_interval_s=3600.0,
        row_of=lambda url: board.row(key_of("instance", url)),
    )


def has_row(reader: Board, url: str) -> bool:
    return bool(reader.row(key_of("instance", url)).each())


async def come_and_go(pool: InstancePool, url: str, *, drained: bool) -> None:
    instance = pool.add(InstanceSpec(url=url))
    await instance.probed.wait()
    if drained:
        pool.drain(instance)
        await until(lambda: pool.get(instance.instance_id) is None)
    else:
        pool.remove(instance)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("drained", [False, True])
async def test_the_rows_of_many_instances_that_have_gone_are_free(
    boards: tuple[Board, Board], *, drained: bool
) -> None:
    pool = pool_of(boards[0])
    await pool.start()
    kept = pool.add(InstanceSpec(url=URL))
    assert has_row(boards[1], kept.base_url)
    gone = [f"http://c{number}" for number in range(NUM_MANY)]
    for url in gone:
        await come_and_go(pool, url, drained=drained)
    await pool.stop()  # which waits for the watchers
    assert not [url for url in gone if has_row(boards[1], url)]
    assert has_row(boards[1], kept.base_url)


class OneAtATime:
    """Scrapes that are answered when the test says so."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.get_running_loop().create_future()
        self.noted: list[str] = []

    async def scrape(self, url: str) -> str:
        self.asked.set()
        text: str = await self.answer
        self.noted.append(url)
        return text


async def test_what_was_asked_before_a_removal_is_not_remembered_after_it() -> None:
    scrapes = OneAtATime()
    pool = InstancePool([], [URL], probe=healthy, scrape=scrapes.scrape, health_interval_s=3600.0)
    await pool.start()
    await scrapes.asked.wait()
    scrapes.answer.set_result("")  # in the same moment
    (instance,) = pool
    pool.remove(instance)
    await pool.stop()
    assert scrapes.noted == []


@dataclass
class Worker:
    """One worker's side of the link, and what it needs."""

    shared: Shared
    pool: InstancePool
    index: AffinityIndex


@pytest.fixture
async def worker(boards: tuple[Board, Board]) -> AsyncIterator[Worker]:
    ours, theirs = socket.socketpair()
    theirs.sendall(framed(Welcome(())))
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    shared = Shared(reader, writer, asyncio.Event())
    shared.use_board(boards[0])
    pool = pool_of(boards[0])
    index = AffinityIndex(gossip=shared)
    pool.subscribe(lambda instance: index.forget(instance.base_url))
    await pool.start()
    await shared.join(pool, Metrics(), {})
    yield Worker(shared, pool, index)
    await shared.leave()
    await pool.stop()
    writer.close()
    await writer.wait_closed()
    theirs.close()


async def test_late_news_of_an_instance_that_is_gone_are_not_taken(
    worker: Worker, boards: tuple[Board, Board]
) -> None:
    other = boards[1]
    for _ in range(3):
        instance = worker.pool.add(InstanceSpec(url=URL))
        news = News(key_of("instance", instance.base_url), 7, 256)
        other.tell(news)
        assert worker.shared.seen() == [(instance.base_url, 7, 256)]
        worker.pool.remove(instance)
        other.tell(news)
        assert worker.shared.seen() == []


async def test_nothing_that_others_have_sent_to_many_that_are_gone_is_remembered(
    worker: Worker, boards: tuple[Board, Board]
) -> None:
    prompt = read_prompt({"prompt": "x" * 5000})
    for number in range(NUM_MANY):
        instance = worker.pool.add(InstanceSpec(url=f"http://c{number}"))
        news = News(key_of("instance", instance.base_url), prompt.prefix[0], 256)
        boards[1].tell(news)
        assert list(worker.index.matches(prompt).cached) == [instance.base_url]
        worker.pool.remove(instance)
        boards[1].tell(news)
        assert worker.index.matches(prompt).cached == {}


NAMES = ("a:80", "b:80", "c:80", "d:80")
CONFIGURED = NAMES[:1]


def add(name: str) -> Add:
    return Add(InstanceSpec(url=f"http://{name}"))


CHANGES = st.builds(
    lambda make, name: make(name), st.sampled_from((add, Drain, Remove)), st.sampled_from(NAMES)
)


def told(hub: Hub) -> tuple[Change, ...]:
    ((_, message),) = hub.join(0)
    assert isinstance(message, Welcome)
    return message.changes


@given(st.lists(st.tuples(CHANGES, st.booleans()), max_size=60))
def test_a_newcomer_is_told_of_none_that_have_gone_but_those_it_is_configured_with(
    steps: list[tuple[Change, bool]],
) -> None:
    hub = Hub(CONFIGURED)
    hub.join(0)
    for number, (change, in_file) in enumerate(steps):
        question = FileChanged((change,)) if in_file else MakeChange(change)
        hub.ask(0, Ask(number, question))
    for name in NAMES:  # the file drops all, and then they are removed
        hub.ask(0, Ask(0, FileChanged((Drain(name),))))
        hub.ask(0, Ask(0, MakeChange(Remove(name))))
    assert told(hub) == tuple(Remove(name) for name in CONFIGURED)
