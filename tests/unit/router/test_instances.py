from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from vllm_pd.config import InstanceSpec, Role, RoleLabel
from vllm_pd.errors import ConfigError
from vllm_pd.router.health import DEFAULT_LIMITS
from vllm_pd.router.instance import Instance, State
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.loads import Work
from vllm_pd.router.policy import choose_decode

P1, D1, D2 = "http://p1", "http://d1", "http://d2"


class FakeProbe:
    """Answers with the health it was told, and says when a round is over."""

    def __init__(self, down: Sequence[str] = ()) -> None:
        self.down = set(down)
        self.asked: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, base_url: str) -> bool:
        self.asked.put_nowait(base_url)
        return base_url not in self.down


@asynccontextmanager
async def watched(
    probe: FakeProbe,
    *,
    decode: Sequence[str] = (D1,),
    interval_s: float = 3600.0,
    **options: Any,
) -> AsyncIterator[InstancePool]:
    pool = InstancePool((f"{P1}/",), decode, probe=probe, health_interval_s=interval_s, **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


def unwatched(prefill: Sequence[str] = (P1,), decode: Sequence[str] = (D1,)) -> InstancePool:
    return InstancePool(prefill, decode, probe=FakeProbe(), health_interval_s=1.0)


def the(pool: InstancePool, url: str) -> Instance:
    return next(one for one in pool if one.base_url == url)


async def turns(num: int = 20) -> None:
    """Let tasks run that wait for nothing but each other."""
    for _ in range(num):
        await asyncio.sleep(0)


def pick(pool: InstancePool, role: Role) -> Instance | None:
    """Return where a request of a role would go."""
    view = choose_decode(pool.snapshot(role), rng=random.Random(1))
    return None if view is None else pool.at(view)


async def test_an_instance_is_starting_until_it_was_probed() -> None:
    pool = unwatched()

    assert pick(pool, Role.PREFILL) is None
    assert the(pool, P1).state is State.STARTING


async def test_the_first_probes_are_over_when_the_pool_has_started() -> None:
    async with watched(FakeProbe(down=[D2]), decode=(D1, D2)) as pool:
        assert [view.healthy for view in pool.snapshot(Role.DECODE)] == [True, False]


async def test_an_address_is_known_in_one_form() -> None:
    pool = unwatched(["http://P1:80/", "http://p1"], [])

    assert [instance.base_url for instance in pool] == [P1]


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="user"):
        unwatched(["http://me@p1"])


def test_an_instance_in_both_lists_does_both() -> None:
    pool = unwatched([P1], [P1])

    assert [one.role for one in pool] == [RoleLabel.BOTH]
    assert len(pool.snapshot(Role.PREFILL)) == 1
    assert len(pool.snapshot(Role.DECODE)) == 1


async def test_a_failed_instance_is_out_of_use_at_once_and_probed_at_once() -> None:
    probe = FakeProbe()
    async with watched(probe) as pool:
        for _ in range(2):
            probe.asked.get_nowait()
        probe.down.add(D1)

        pool.mark_unhealthy(the(pool, D1), ConnectionResetError())

        assert not pool.has_healthy(Role.DECODE)
        assert await probe.asked.get() == D1
        await turns()
        assert the(pool, D1).state is State.UNHEALTHY


async def test_an_instance_on_which_only_a_request_broke_is_back_after_one_probe() -> None:
    async with watched(FakeProbe()) as pool:
        pool.mark_unhealthy(the(pool, D1), ConnectionResetError())
        await turns()

        assert pool.has_healthy(Role.DECODE)


async def test_an_instance_is_used_again_after_good_probes() -> None:
    probe = FakeProbe(down=[D1])
    async with watched(probe, interval_s=0.001) as pool:
        assert not pool.has_healthy(Role.DECODE)
        probe.down.clear()

        while not pool.has_healthy(Role.DECODE):  # bounded by the test's timeout
            await probe.asked.get()


async def test_a_request_and_its_work_count_while_it_is_open() -> None:
    async with watched(FakeProbe()) as pool:
        work = Work(prefill_tokens=5)
        with pool.in_use(the(pool, D1), work):
            (view,) = pool.snapshot(Role.DECODE)
            assert (the(pool, D1).in_flight, view.outstanding) == (1, work)

        (view,) = pool.snapshot(Role.DECODE)
        assert (the(pool, D1).in_flight, view.outstanding) == (0, Work())


async def test_a_probe_that_breaks_does_not_end_the_watching() -> None:
    probe = FakeProbe(down=[D1])

    async def breaks_at_first(base_url: str) -> bool:
        if not await probe(base_url):
            probe.down.clear()
            raise RuntimeError("broken")
        return True

    pool = InstancePool((P1,), (D1,), probe=breaks_at_first, health_interval_s=0.001)
    await pool.start()
    while not pool.has_healthy(Role.DECODE):  # bounded by the test's timeout
        await probe.asked.get()
    await pool.stop()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_requests_that_fail_in_a_row_stop_further_ones_although_probes_are_good() -> None:
    clock = Clock()
    limits = replace(DEFAULT_LIMITS, breaker_failures=2, backoff_s=1.0)
    async with watched(FakeProbe(), clock=clock, limits=limits) as pool:
        for _ in range(2):
            with pool.in_use(the(pool, D1)) as use:
                use.failed(ConnectionResetError())
            await turns()

        assert the(pool, D1).healthy
        assert pick(pool, Role.DECODE) is None
        clock.now = 1.0
        with pool.in_use(the(pool, D1)) as use:
            assert pick(pool, Role.DECODE) is None  # one trial at a time
            use.succeeded()
        assert pick(pool, Role.DECODE) is the(pool, D1)


async def test_a_trial_whose_client_left_does_not_shut_the_instance_out() -> None:
    clock = Clock()
    async with watched(
        FakeProbe(), clock=clock, limits=replace(DEFAULT_LIMITS, breaker_failures=1)
    ) as pool:
        with pool.in_use(the(pool, D1)) as use:
            use.failed(ConnectionResetError())
        await turns()
        clock.now = 1.0
        with pytest.raises(asyncio.CancelledError), pool.in_use(the(pool, D1)):
            raise asyncio.CancelledError

        assert pick(pool, Role.DECODE) is the(pool, D1)


async def test_an_instance_that_is_added_is_watched() -> None:
    async with watched(FakeProbe()) as pool:
        added = pool.add(InstanceSpec(url=D2, role=RoleLabel.DECODE))
        await added.probed.wait()

        assert [view.base_url for view in pool.snapshot(Role.DECODE)] == [D1, D2]
        assert added.healthy


async def test_adding_an_instance_again_changes_it() -> None:
    async with watched(FakeProbe()) as pool:
        before = the(pool, D1)
        spec = InstanceSpec(url=f"{D1}:80/", role=RoleLabel.BOTH, control="d1:5600")

        assert pool.add(spec) is before
        assert (before.role, before.control) == (RoleLabel.BOTH, ("d1", 5600))


async def test_a_bad_control_address_changes_nothing() -> None:
    pool = unwatched()
    with pytest.raises(ConfigError, match="control address"):
        pool.add(InstanceSpec(url=D2, control="d2"))

    assert [one.base_url for one in pool] == [P1, D1]


async def test_another_scheme_on_a_port_replaces_the_instance() -> None:
    async with watched(FakeProbe()) as pool:
        pool.add(InstanceSpec(url="https://d1:80", role=RoleLabel.DECODE))

        assert [view.base_url for view in pool.snapshot(Role.DECODE)] == ["https://d1:80"]


async def test_a_role_change_is_a_label() -> None:
    async with watched(FakeProbe(), decode=(D1, D2)) as pool:
        changed = the(pool, D2)
        with pool.in_use(changed):
            pool.relabel(changed, RoleLabel.PREFILL)

            assert changed.in_flight == 1
            assert changed.healthy
            assert [view.base_url for view in pool.snapshot(Role.PREFILL)] == [P1, D2]
            assert [view.base_url for view in pool.snapshot(Role.DECODE)] == [D1]


async def test_a_draining_instance_gets_nothing_new_and_is_removed_when_idle() -> None:
    async with watched(FakeProbe()) as pool:
        instance = the(pool, D1)
        with pool.in_use(instance):
            pool.drain(instance)
            assert pick(pool, Role.DECODE) is None
            await turns()
            assert instance.state is State.DRAINING
            assert pool.get("d1:80") is instance
        await turns()

        assert pool.get("d1:80") is None


async def test_adding_a_draining_instance_again_ends_the_drain() -> None:
    async with watched(FakeProbe()) as pool:
        instance = the(pool, D1)
        with pool.in_use(instance):
            pool.drain(instance)
            pool.add(InstanceSpec(url=D1, role=RoleLabel.DECODE))
        await turns()

        assert pick(pool, Role.DECODE) is instance


async def test_requests_on_a_removed_instance_go_on() -> None:
    async with watched(FakeProbe()) as pool:
        instance = the(pool, D1)
        with pool.in_use(instance) as use:
            pool.remove(instance)
            pool.remove(instance)
            use.succeeded()

        assert instance.in_flight == 0
        assert pool.snapshot(Role.DECODE) == ()


async def test_listeners_learn_of_a_removed_instance_once() -> None:
    async with watched(FakeProbe()) as pool:
        lost: list[Instance] = []
        pool.subscribe(lost.append)
        instance = the(pool, D1)

        pool.remove(instance)
        pool.remove(instance)

    assert lost == [instance]


async def test_a_removed_instance_is_probed_no_more() -> None:
    probe = FakeProbe()
    async with watched(probe, interval_s=0.001) as pool:
        pool.remove(the(pool, D1))
        await turns()
        while not probe.asked.empty():
            probe.asked.get_nowait()

        assert {await probe.asked.get() for _ in range(3)} == {P1}


async def test_it_is_remembered_how_a_request_broke() -> None:
    pool = InstancePool((), (D1,), probe=FakeProbe(), health_interval_s=1.0, clock=lambda: 7.0)
    instance = the(pool, D1)
    assert (instance.num_failed, instance.last_failure) == (0, "")
    with pool.in_use(instance) as use:
        use.failed(ConnectionResetError("gone"))
    assert (instance.num_failed, instance.failed_at) == (1, 7.0)
    assert instance.last_failure == "ConnectionResetError: gone"


def test_a_request_that_breaks_on_an_instance_tells_the_other_processes() -> None:
    pool, told = unwatched(), list[str]()
    pool.subscribe_doubts(lambda url, _tripped: told.append(url))
    instance = the(pool, D1)
    instance.probes.note_probe(healthy=True)

    pool.mark_unhealthy(instance, OSError())

    assert told == [D1]


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_request_that_breaks_on_a_removed_instance_tells_nobody(is_replaced: bool) -> None:
    pool, told = unwatched(), list[str]()
    pool.subscribe_doubts(lambda url, _tripped: told.append(url))
    instance = the(pool, D1)
    instance.probes.note_probe(healthy=True)
    pool.remove(instance)
    if is_replaced:
        pool.add(InstanceSpec(url=D1, role=RoleLabel.DECODE))

    pool.mark_unhealthy(instance, OSError(), tripped=True)

    assert told == []
