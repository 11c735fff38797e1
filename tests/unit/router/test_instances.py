from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from vllm_pd.config import Role
from vllm_pd.router.instances import InstancePool


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
    probe: FakeProbe, *, decode: Sequence[str] = ("d1",), interval_s: float = 3600.0
) -> AsyncIterator[InstancePool]:
    pool = InstancePool(("p1/",), decode, probe=probe, health_interval_s=interval_s)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


async def test_an_instance_is_unhealthy_until_it_was_probed() -> None:
    pool = InstancePool(("p1",), ("d1",), probe=FakeProbe(), health_interval_s=1.0)

    assert pool.pick(Role.PREFILL) is None


async def test_the_first_probes_are_over_when_the_pool_has_started() -> None:
    async with watched(FakeProbe(down=["d2"]), decode=("d1", "d2")) as pool:
        assert [view.healthy for view in pool.snapshot(Role.DECODE)] == [True, False]


async def test_a_trailing_slash_is_no_part_of_an_address() -> None:
    async with watched(FakeProbe()) as pool:
        assert [instance.base_url for instance in pool] == ["p1", "d1"]


async def test_a_failed_instance_is_out_of_use_at_once_and_probed_at_once() -> None:
    probe = FakeProbe()
    async with watched(probe) as pool:
        instance = pool.pick(Role.DECODE)
        assert instance is not None
        for _ in range(2):
            probe.asked.get_nowait()

        pool.mark_unhealthy(instance, ConnectionResetError())

        assert not pool.has_healthy(Role.DECODE)
        assert await probe.asked.get() == "d1"


async def test_an_instance_is_used_again_after_a_good_probe() -> None:
    probe = FakeProbe(down=["d1"])
    async with watched(probe, interval_s=0.001) as pool:
        assert not pool.has_healthy(Role.DECODE)
        probe.down.clear()

        while not pool.has_healthy(Role.DECODE):  # bounded by the test's timeout
            await probe.asked.get()


async def test_the_roles_take_turns_independently() -> None:
    async with watched(FakeProbe(), decode=("d1", "d2")) as pool:
        picked = []
        for _ in range(4):
            pool.pick(Role.PREFILL)
            instance = pool.pick(Role.DECODE)
            picked.append(instance.base_url if instance else None)

    assert picked == ["d1", "d2", "d1", "d2"]


async def test_a_request_counts_as_in_flight_while_it_is_open() -> None:
    async with watched(FakeProbe()) as pool:
        instance = pool.pick(Role.DECODE)
        assert instance is not None

        with pool.in_use(instance):
            assert pool.snapshot(Role.DECODE)[0].in_flight == 1
        assert pool.snapshot(Role.DECODE)[0].in_flight == 0


async def test_a_probe_that_breaks_does_not_end_the_watching() -> None:
    probe = FakeProbe(down=["d1"])

    async def breaks_at_first(base_url: str) -> bool:
        if not await probe(base_url):
            probe.down.clear()
            raise RuntimeError("broken")
        return True

    pool = InstancePool(("p1",), ("d1",), probe=breaks_at_first, health_interval_s=0.001)
    await pool.start()
    assert not pool.has_healthy(Role.DECODE)

    while not pool.has_healthy(Role.DECODE):  # bounded by the test's timeout
        await probe.asked.get()
    await pool.stop()
