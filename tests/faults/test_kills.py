"""One side of a fetch is killed, or stands still, at every stage: what the other one does.

The survivor runs here, the victim in a process of its own. See ``stages``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.engine import FROM, KINDS, Engine, make_engine
from tests.faults.leaks import Holdings, check_nothing_is_left
from tests.faults.nursery import EngineProcess, Nursery, Setup
from tests.faults.stages import STAGES, watch_copy, watch_parked
from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PeerLostError, TransferTimeoutError
from vllm_pd.session.stats import Outcome, SessionStats

pytestmark = pytest.mark.slow

PATIENT = ConnectorConfig(lease_s=60.0, handshake_timeout_s=15.0, transfer_timeout_s=15.0)
SURVIVOR = ConnectorConfig(lease_s=1.0, handshake_timeout_s=15.0, transfer_timeout_s=3.0)
HASTY = ConnectorConfig(lease_s=1.0, handshake_timeout_s=1.0, transfer_timeout_s=1.0)

Start = Callable[..., EngineProcess]
Make = Callable[[str, str, ConnectorConfig], Engine]


@pytest.fixture
def before(nursery: Nursery) -> Holdings:
    """What this process holds before a test."""
    return Holdings.now()


@pytest.fixture
def start(before: Holdings, nursery: Nursery) -> Iterator[Start]:
    """Starts engine processes that end with the test."""
    started: list[EngineProcess] = []

    def start(**setup: object) -> EngineProcess:
        process = nursery.start(Setup(**setup))  # type: ignore[arg-type]
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def make(before: Holdings) -> Iterator[Make]:
    """Starts engines in this process, and checks that they leave nothing behind."""
    engines: list[Engine] = []

    def make(kind: str, owner: str, config: ConnectorConfig) -> Engine:
        engines.append(make_engine(kind, owner, config))
        return engines[-1]

    yield make
    while engines:
        engines.pop().close()


def stats_of(engine: Engine) -> SessionStats:
    stats = engine.manager.take_stats()
    assert stats is not None
    return stats


def serve_a_new_peer(engine: Engine, start: Start, kind: str) -> None:
    """Fetch from, or serve, a peer that was not there before."""
    if engine.owner == "consumer":
        peer = start(kind=kind, role="producer", config=PATIENT)
        peer.ask(grant="new")
        engine.fetch(peer.address, "new")
        assert engine.wait_fetched().error is None
        assert engine.wrong_blocks("producer") == []
    else:
        peer = start(kind=kind, role="consumer", config=PATIENT)
        engine.grant("new")
        answer = peer.ask(fetch="new", producer=engine.address, wait=True)
        assert (answer.error, answer.is_right) == (None, True)
        assert engine.wait(lambda r: bool(r.freed)).freed == ["prefill-new"]
    peer.kill()


def check_survival(engine: Engine, start: Start, kind: str, alone: Holdings) -> None:
    """The survivor serves, holds nothing of its dead peers, and reports nothing twice."""
    serve_a_new_peer(engine, start, kind)
    check_nothing_is_left(alone, may_keep="vllm-pd-copy")
    results = engine.manager.take_results()
    assert (results.freed, results.fetched) == ([], [])
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_consumer_survives_its_producer(
    stage: str,
    kind: str,
    make: Make,
    start: Start,
    before: Holdings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = make(kind, "consumer", SURVIVOR)
    alone = Holdings.now()
    one_sided = stage == "copying" and kind != "tcp"  # noticed here, where it is copied
    producer = start(
        kind=kind, role="producer", config=PATIENT, stage=None if one_sided else stage
    )
    if stage != "parked":
        producer.ask(grant="t1")
    if one_sided:
        watch_copy(monkeypatch.setattr, kind, producer.kill)

    consumer.fetch(producer.address, "t1")
    result = consumer.wait_fetched()
    producer.kill()
    monkeypatch.undo()

    # The last byte, or the last word, may have been under way already.
    if result.error is None:
        assert stage in ("told", "confirmed") or (stage, kind) == ("copied", "tcp")
    else:
        assert isinstance(result.error, PeerLostError)
    assert consumer.wrong_blocks("producer" if result.error is None else None) == []
    assert [record.outcome for record in stats_of(consumer).fetches] == [result.record.outcome]
    check_survival(consumer, start, kind, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_producer_survives_its_consumer(
    stage: str,
    kind: str,
    make: Make,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    producer = make(kind, "producer", SURVIVOR)
    alone = Holdings.now()
    consumer = start(
        kind=kind, role="consumer", config=PATIENT, stage=None if stage == "parked" else stage
    )
    if stage == "parked":
        watch_parked(monkeypatch.setattr, consumer.kill)
    else:
        producer.grant("t1")

    consumer.tell(fetch="t1", producer=producer.address)
    consumer.wait_gone()
    consumer.kill()
    monkeypatch.undo()
    if stage == "parked":
        producer.grant("t1")

    assert producer.wait(lambda results: bool(results.freed)).freed == ["prefill-t1"]
    stats = stats_of(producer)
    assert (stats.num_leases_granted, stats.num_leases, stats.num_blocks_held) == (1, 0, 0)
    (reason,) = stats.num_leases_ended
    assert reason == "fetched" or stage not in ("confirmed",)
    assert reason == "expired" or stage in ("told", "confirmed")
    check_survival(producer, start, kind, alone)
