"""One side of a fetch is killed, or stands still, at every stage: what the other one does.

The survivor runs here, the victim in a process of its own. See ``stages``.
"""

from __future__ import annotations

import signal

import pytest

from tests.faults.engine import FROM, KINDS
from tests.faults.scene import Scene
from tests.faults.stages import STAGES, watch_copy, watch_parked
from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import IncompatiblePeerError, PeerLostError, TransferTimeoutError
from vllm_pd.session.stats import Outcome

pytestmark = pytest.mark.slow

SURVIVOR = ConnectorConfig(lease_s=0.6, handshake_timeout_s=15.0, transfer_timeout_s=2.0)
HASTY = ConnectorConfig(lease_s=0.6, handshake_timeout_s=1.2, transfer_timeout_s=1.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_consumer_survives_the_death_of_its_producer(
    stage: str, kind: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = scene.survivor("consumer", SURVIVOR)
    one_sided = stage == "copying" and kind != "tcp"  # noticed here, where it is copied
    producer = scene.peer("producer", stage=None if one_sided else stage)
    if stage != "parked":
        producer.ask(grant="t1")
    if one_sided:
        watch_copy(monkeypatch.setattr, kind, producer.kill)

    consumer.fetch(producer.address, "t1")
    result = consumer.wait_fetched()
    producer.kill()
    monkeypatch.undo()

    # The last byte, or the last word, may have been under way already.
    may_be_here = stage in ("told", "confirmed") or (stage, kind) == ("copied", "tcp")
    # Who is killed while the consumer looks how to reach it seems to be out of reach.
    lost = (PeerLostError, IncompatiblePeerError) if stage == "greeted" else PeerLostError
    assert (result.error is None and may_be_here) or isinstance(result.error, lost)
    assert consumer.wrong_blocks("producer" if result.error is None else None) == []
    assert [fetch.outcome for fetch in scene.stats().fetches] == [result.record.outcome]
    scene.check_survival()
    scene.check_that_it_holds_nothing_of_its_peers()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_producer_survives_the_death_of_its_consumer(
    stage: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = scene.survivor("producer", SURVIVOR)
    is_parked = stage == "parked"  # noticed here, where it is
    consumer = scene.peer("consumer", stage=None if is_parked else stage)
    if is_parked:
        watch_parked(monkeypatch.setattr, consumer.kill)

    consumer.tell(fetch="t1", producer=producer.address)
    if is_parked:
        consumer.wait_kill()
        monkeypatch.undo()
        producer.grant("t1")
    else:
        producer.grant("t1")
        consumer.wait_gone()

    assert producer.wait(lambda results: bool(results.freed)).freed == ["prefill-t1"]
    stats = scene.stats()
    assert (stats.num_leases_granted, stats.num_leases, stats.num_blocks_held) == (1, 0, 0)
    (reason,) = stats.num_leases_ended
    # The consumer's last word may or may not have left its process.
    wanted = {"told": ("fetched", "expired"), "confirmed": ("fetched",)}
    assert reason in wanted.get(stage, ("expired",))
    scene.check_survival()
    scene.check_that_it_holds_nothing_of_its_peers()


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("stage", ["describe", "hello", "ready", "copying", "copied"])
def test_consumer_gives_up_a_producer_that_stands_still(
    stage: str, kind: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = scene.survivor("consumer", HASTY)
    one_sided = stage == "copying" and kind != "tcp"
    producer = scene.peer(
        "producer", stage=None if one_sided else stage, signal=int(signal.SIGSTOP)
    )
    producer.ask(grant="t1")
    if one_sided:
        watch_copy(monkeypatch.setattr, kind, producer.stop)

    consumer.fetch(producer.address, "t1")
    result = consumer.wait_fetched()
    monkeypatch.undo()

    # All bytes may be here already, if their sender need not be asked again.
    assert isinstance(result.error, TransferTimeoutError) or (stage, kind) == ("copied", "tcp")
    assert result.record.outcome is (Outcome.TIMEOUT if result.error else Outcome.OK)
    assert consumer.wrong_blocks("producer" if result.error is None else None) == []
    scene.check_survival()
    scene.check_that_it_holds_nothing_of_its_peers()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["greeted", "ready", "copying", "copied"])
def test_consumer_that_stood_still_never_takes_blocks_that_were_freed(
    stage: str, kind: str, scene: Scene
) -> None:
    producer = scene.survivor("producer", HASTY)
    consumer = scene.peer("consumer", stage=stage, signal=int(signal.SIGSTOP))
    consumer.tell(fetch="t1", producer=producer.address)
    producer.grant("t1")
    consumer.wait_stopped()
    assert producer.wait(lambda results: bool(results.freed)).freed == ["prefill-t1"]
    scene.check_survival()

    producer.overwrite(FROM)
    consumer.signal(signal.SIGCONT)
    consumer.receive()
    answer = consumer.ask(wait=True)

    # Over tcp all bytes may have been sent in time; elsewhere nobody confirms the copy.
    assert answer.error is not None or kind == "tcp"
    assert answer.is_right
    scene.check_that_it_holds_nothing_of_its_peers()
