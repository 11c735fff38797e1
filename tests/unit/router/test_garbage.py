"""What requests leave behind: bodies of megabytes must not wait for a garbage collection."""

from __future__ import annotations

import asyncio
import gc
import types
from collections.abc import Iterator

import pytest

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import Client, Streams, completes, drops, prefills

METRIC = "vllm_pd:router_tasks "


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Keep whatever a collection would free."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def garbage_of_the_router() -> list[str]:
    """Return what only the garbage collector can free: functions' variables, and objects."""
    gc.collect()
    codes = [one.f_code for one in gc.garbage if isinstance(one, types.FrameType)]
    return [
        *(code.co_qualname for code in codes if "vllm_pd/router/" in code.co_filename),
        *(
            type(one).__name__
            for one in gc.garbage
            if type(one).__module__.startswith("vllm_pd.router")
        ),
    ]


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("stream", [False, True])
async def test_failed_legs_leave_nothing_to_the_garbage_collector(
    start_instance: StartInstance, start_router: StartRouter, *, stream: bool
) -> None:
    answer = Streams([b"data: [DONE]\n\n"]) if stream else completes
    producers = [await start_instance(behave) for behave in (drops, prefills)]
    consumers = [await start_instance(behave) for behave in (drops, answer)]
    router = await start_router(producers, consumers)
    body = {"model": "m", "prompt": "hi", "max_tokens": 8, "stream": stream}

    async with router.post("/v1/completions", json=body) as response:
        assert response.status == 200
        await response.read()

    assert [len(one.received) for one in (*producers, *consumers)] == [1, 1, 1, 1]
    assert garbage_of_the_router() == []


@pytest.mark.usefixtures("uncollected")
async def test_request_that_nobody_can_serve_leaves_none_either(
    start_instance: StartInstance, start_router: StartRouter
) -> None:
    router = await start_router([await start_instance(prefills)], [await start_instance(drops)])

    async with router.post("/v1/completions", json={"model": "m", "prompt": "hi"}) as response:
        assert response.status == 502

    assert garbage_of_the_router() == []


@pytest.mark.usefixtures("uncollected")
async def test_stream_that_breaks_off_leaves_none_either(
    start_instance: StartInstance, start_router: StartRouter
) -> None:
    decode = await start_instance(Streams([b"data: 1\n\n"], die=True))
    router = await start_router([await start_instance(prefills)], [decode])
    body = {"model": "m", "prompt": "hi", "stream": True}

    async with router.post("/v1/completions", json=body) as response:
        assert b'"error"' in await response.read()

    assert garbage_of_the_router() == []


async def test_metrics_count_the_tasks(router: Client) -> None:
    async def num_tasks() -> float:
        async with router.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(METRIC))

    await num_tasks()  # from here on, the connection and its task are there
    before = await num_tasks()
    task = asyncio.create_task(asyncio.Event().wait())

    assert await num_tasks() == before + 1
    task.cancel()
