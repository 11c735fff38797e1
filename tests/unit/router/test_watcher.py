from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.unit.protocol.test_messages import FINGERPRINT
from vllm_pd.config import RoleLabel
from vllm_pd.errors import PeerLostError
from vllm_pd.protocol.messages import PROTOCOL_VERSION, Fingerprint, InstanceInfo, Outstanding
from vllm_pd.router.health import DEFAULT_LIMITS, Breaker, ProbeHistory
from vllm_pd.router.instance import Instance, State
from vllm_pd.router.loads import Load, Work
from vllm_pd.router.watcher import Sources, Watcher

CONTROL = ("127.0.0.1", 5600)
LIMITS = replace(DEFAULT_LIMITS, failures_to_leave=1, successes_to_return=1)
METRICS = "vllm:num_requests_running 2\nvllm:num_requests_waiting 3\nvllm:kv_cache_usage_perc 0.5\n"


@dataclass
class World:
    """What a watcher can ask; every answer may be changed."""

    healthy: bool = True
    metrics: str | None = METRICS
    engine_id: str | None = "e1"  # None: the control endpoint is mute
    fingerprint: Fingerprint | None = FINGERPRINT
    num_leases: int = 0
    num_described: int = 0
    restarted: list[Instance] = field(default_factory=list)
    drained: list[Instance] = field(default_factory=list)

    async def probe(self, base_url: str) -> bool:
        return self.healthy

    async def scrape(self, base_url: str) -> str | None:
        return self.metrics

    async def describe(self, address: tuple[str, int]) -> InstanceInfo:
        self.num_described += 1
        if self.engine_id is None:
            raise PeerLostError("nobody listens")
        return InstanceInfo(
            protocol_version=PROTOCOL_VERSION,
            engine_id=self.engine_id,
            tp_size=1,
            workers=(),
            fingerprint=self.fingerprint,
            num_leases=self.num_leases,
            lease_s=30.0,
        )

    async def outstanding(self, address: tuple[str, int]) -> Outstanding:
        if self.engine_id is None:
            raise PeerLostError("nobody listens")
        return Outstanding(num_leases=self.num_leases, num_blocks=0, draining=False)


def instance_of(control: tuple[str, int] | None = CONTROL) -> Instance:
    return Instance("http://p1", RoleLabel.PREFILL, control, ProbeHistory(LIMITS), Breaker(LIMITS))


StartWatcher = Callable[..., Awaitable[Instance]]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def start(world: World) -> Any:
    watchers = []

    async def start(control: tuple[str, int] | None = CONTROL, **sources: Any) -> Instance:
        instance = instance_of(control)
        settings: dict[str, Any] = {"probe": world.probe, "scrape": world.scrape, "control": world}
        watcher = Watcher(
            instance,
            Sources(**(settings | {"interval_s": 3600.0} | sources)),
            on_restart=world.restarted.append,
            on_drained=world.drained.append,
        )
        watcher.start()
        watchers.append(watcher)
        await settle()
        return instance

    yield start
    for watcher in watchers:
        await watcher.stop()


async def settle() -> None:
    """Let the watcher do all that it does before its next pause."""
    for _ in range(50):
        await asyncio.sleep(0)


async def look(instance: Instance) -> None:
    """End the pauses of the watcher once."""
    instance.probe_now.set()
    await settle()
    instance.learn_now.set()
    await settle()


async def test_all_is_known_after_the_first_look(start: StartWatcher) -> None:
    instance = await start()

    assert instance.state is State.HEALTHY
    assert instance.engine_id == "e1"
    assert instance.fingerprint is not None
    assert instance.ledger.scrape is not None
    assert instance.ledger.scrape.load == Load(2, 3, 0.5)


async def test_an_instance_is_known_before_it_is_used(world: World) -> None:
    asked = asyncio.Event()

    class Slow(World):
        async def describe(self, address: tuple[str, int]) -> InstanceInfo:
            await asked.wait()
            return await super().describe(address)

    late = instance_of()
    watcher = Watcher(
        late,
        Sources(world.probe, None, Slow(), 3600.0),
        on_restart=world.restarted.append,
        on_drained=world.drained.append,
    )
    watcher.start()
    await settle()
    assert late.state is State.STARTING
    asked.set()
    await late.probed.wait()
    assert late.healthy
    await watcher.stop()


async def test_an_instance_without_control_endpoint_is_used_all_the_same(
    start: StartWatcher,
) -> None:
    instance = await start(control=None)

    assert instance.healthy
    assert instance.fingerprint is None


async def test_a_mute_control_endpoint_is_told_of_once(
    world: World, start: StartWatcher, caplog: pytest.LogCaptureFixture
) -> None:
    world.engine_id = None
    with caplog.at_level(logging.WARNING):
        instance = await start()
        await look(instance)

    assert instance.healthy
    assert caplog.text.count("cannot ask http://p1 who it is") == 1


async def test_who_was_mute_is_asked_again(world: World, start: StartWatcher) -> None:
    world.engine_id = None
    instance = await start()
    world.engine_id = "e1"
    await look(instance)

    assert instance.engine_id == "e1"


async def test_an_instance_is_asked_again_until_it_knows_its_fingerprint(
    world: World, start: StartWatcher
) -> None:
    world.fingerprint = None
    instance = await start()
    assert instance.fingerprint is None
    world.fingerprint = FINGERPRINT
    await look(instance)

    assert instance.fingerprint is not None


async def test_what_is_known_is_not_asked_again(world: World, start: StartWatcher) -> None:
    instance = await start()
    before = world.num_described
    await look(instance)

    assert world.num_described == before


async def test_another_engine_at_the_address_is_a_restart(
    world: World, start: StartWatcher
) -> None:
    instance = await start()
    world.healthy = False
    await look(instance)
    assert instance.state is State.UNHEALTHY
    world.healthy, world.engine_id = True, "e2"
    await look(instance)

    assert instance.engine_id == "e2"
    assert world.restarted == [instance]


async def test_an_engine_that_was_only_away_is_no_restart(
    world: World, start: StartWatcher
) -> None:
    instance = await start()
    world.healthy = False
    await look(instance)
    world.healthy = True
    await look(instance)

    assert instance.healthy
    assert world.restarted == []


async def test_an_unknown_engine_that_was_away_may_have_restarted(
    world: World, start: StartWatcher
) -> None:
    instance = await start(control=None)
    world.healthy = False
    await look(instance)
    world.healthy = True
    await look(instance)

    assert world.restarted == [instance]


async def test_a_probe_older_than_a_failure_does_not_count(start: StartWatcher) -> None:
    answers: asyncio.Queue[bool] = asyncio.Queue()

    async def probe(_base_url: str) -> bool:
        return await answers.get()

    instance = await start(probe=probe)
    answers.put_nowait(True)
    await settle()
    instance.probe_now.set()
    await settle()  # the next probe is under way
    instance.probes.note_failed_request()
    instance.probe_now.set()
    answers.put_nowait(True)
    await settle()
    assert not instance.healthy
    answers.put_nowait(True)
    await settle()

    assert instance.healthy


async def test_sequences_of_this_router_are_told_from_others(start: StartWatcher) -> None:
    instance = await start()
    with instance.ledger.open(Work(num_sequences=4)):
        await look(instance)

        assert instance.ledger.scrape is not None
        assert instance.ledger.scrape.num_foreign == 1


@pytest.mark.parametrize("text", [None, "", "vllm:num_requests_running nan"])
async def test_metrics_that_cannot_be_read_are_no_load(
    world: World, start: StartWatcher, text: str | None
) -> None:
    instance = await start()
    world.metrics = text
    await look(instance)

    assert instance.ledger.scrape is None


async def test_the_load_of_an_instance_that_is_away_is_not_known(
    world: World, start: StartWatcher
) -> None:
    instance = await start()
    world.healthy = False
    await look(instance)

    assert instance.ledger.scrape is None


async def test_an_instance_is_drained_when_its_last_lease_is_over(
    world: World, start: StartWatcher
) -> None:
    instance = await start()
    instance.draining, world.num_leases = True, 1
    await look(instance)
    assert world.drained == []
    world.num_leases = 0
    await look(instance)

    assert world.drained == [instance]


async def test_an_instance_is_not_drained_while_a_request_is_open(
    world: World, start: StartWatcher
) -> None:
    instance = await start()
    instance.draining = True
    with instance.ledger.open(Work(), num_requests=1):
        await look(instance)

    assert world.drained == []


async def test_an_instance_that_says_nothing_is_drained_when_idle(
    world: World, start: StartWatcher
) -> None:
    world.engine_id = None
    instance = await start()
    instance.draining = True
    await look(instance)

    assert world.drained == [instance]


async def test_one_question_that_gets_lost_ends_no_drain(world: World, start: StartWatcher) -> None:
    instance = await start()
    instance.draining, world.engine_id = True, None
    await look(instance)
    assert world.drained == []

    world.engine_id = instance.engine_id
    await look(instance)
    assert world.drained == [instance]


async def test_an_error_while_looking_does_not_end_the_watching(
    world: World, start: StartWatcher, caplog: pytest.LogCaptureFixture
) -> None:
    async def breaks(_base_url: str) -> str | None:
        raise RuntimeError("broken")

    instance = await start(scrape=breaks)
    assert "cannot watch http://p1" in caplog.text
    instance.draining = True
    instance.ledger.note_scrape(None, num_own_before=0)
    world.healthy = False  # then it is not scraped
    await look(instance)

    assert world.drained == [instance]
