"""How much memory bodies may take: the account, and a router that keeps it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import cast

import pytest

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import Client, FakeInstance, Streams, answers, drops, hangs
from tests.unit.router.test_bad_clients import POST, send, served, status_of
from tests.unit.router.workers.deployment import until
from vllm_pd.errors import OverloadedError
from vllm_pd.router.body_budget import BodyBudget, Hold
from vllm_pd.router.workers.board import Row

COMPLETIONS = "/v1/completions"
EVENTS = [b'data: {"choices": [{"text": "x"}]}\n\n']
END = [b"data: [DONE]\n\n"]
LIMITS = {"max_body_len": 1000, "max_held_len": 1500}


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


class Others:
    """What another process holds, and is shown."""

    def __init__(self, held: int) -> None:
        self._held = held
        self.shown = 0

    def put(self, held: int) -> None:
        self.shown = held

    def others(self) -> tuple[int, int, int, int]:
        return self._held, 0, 0, 0


def body_of(num_bytes: int) -> bytes:
    raw = json.dumps({"model": "m", "prompt": ""}).encode()
    return raw[:-2] + b"x" * (num_bytes - len(raw)) + raw[-2:]


def hold(budget: BodyBudget, num_bytes: int) -> Hold:
    held = budget.hold()
    held.grow(num_bytes)
    return held


# --- The account ---------------------------------------------------------------------


def test_requests_share_the_budget_up_to_the_last_byte() -> None:
    budget = BodyBudget(10)
    hold(budget, 6)
    hold(budget, 4)

    with pytest.raises(OverloadedError):
        hold(budget, 1)
    assert budget.held == 10


def test_what_is_released_can_be_held_again() -> None:
    budget = BodyBudget(10)
    hold(budget, 10).release()

    hold(budget, 10)


def test_a_body_is_given_back_once() -> None:
    budget = BodyBudget(10)
    first, _ = hold(budget, 4), hold(budget, 4)

    first.release()
    first.release()

    assert budget.held == 4


def test_a_refused_part_is_not_held() -> None:
    budget = BodyBudget(10)
    one = hold(budget, 8)

    with pytest.raises(OverloadedError):
        one.grow(8)
    one.release()

    assert (budget.held, budget.num_refused) == (0, 1)


def test_an_announced_length_is_checked_but_not_held() -> None:
    budget = BodyBudget(10)
    budget.hold().expect(10)
    hold(budget, 1)

    with pytest.raises(OverloadedError):
        budget.hold().expect(10)


def test_a_client_is_told_when_as_much_as_lacks_has_come_back() -> None:
    clock = Clock()
    budget = BodyBudget(100, clock=clock)
    one = hold(budget, 80)
    clock.now += 20.0
    one.release()
    hold(budget, 80)

    with pytest.raises(OverloadedError) as refused:  # 40 of 80 that come back within 20 s
        hold(budget, 60)

    assert refused.value.retry_after_s == 10


def test_what_other_processes_hold_counts() -> None:
    others = Others(6)
    budget = BodyBudget(10, row=cast(Row, others))
    hold(budget, 4)

    with pytest.raises(OverloadedError):
        hold(budget, 1)
    assert others.shown == 4


# --- A router ------------------------------------------------------------------------


async def held(router: Client) -> int:
    """Return the bytes that the router says it holds."""
    return await metric(router, "vllm_pd:router_held_bytes ")


async def metric(router: Client, name: str) -> int:
    text = await (await router.get("/metrics")).text()
    return next(int(float(line.split()[1])) for line in text.splitlines() if line.startswith(name))


async def until_held(router: Client, num_bytes: int) -> None:
    async def is_held() -> bool:
        return await held(router) == num_bytes

    await until(is_held)


async def is_answered(port: int, status: int) -> bool:
    head = POST + b"Content-Length: 1000\r\nConnection: close\r\n\r\n"
    return status_of(await send(port, head + body_of(1000))) == status


async def pieces(num_bytes: int) -> AsyncIterator[bytes]:
    raw = body_of(num_bytes)
    for start in range(0, len(raw), 100):
        yield raw[start : start + 100]


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_without_place_is_refused_in_vllms_shape(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance, chunked: bool
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode], **LIMITS)
    first = asyncio.ensure_future(router.post(COMPLETIONS, data=body_of(900)))
    await decode.started.wait()

    data = pieces(900) if chunked else body_of(900)
    async with router.post(COMPLETIONS, data=data) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == 429

    assert await held(router) == 900
    assert await metric(router, "vllm_pd:router_held_refusals_total ") == 1
    assert len(prefill.received) == 1
    first.cancel()
    await decode.cancelled.wait()


async def test_a_body_is_held_as_long_as_another_instance_may_get_it(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    broken, decode = await start_instance(drops), await start_instance(hangs)
    router = await start_router([prefill], [broken, decode], **LIMITS)
    request = asyncio.ensure_future(router.post(COMPLETIONS, data=body_of(700)))

    await decode.started.wait()

    assert len(decode.received[0].raw) > 700
    assert await held(router) == 700
    request.cancel()
    await decode.cancelled.wait()


async def test_a_body_is_freed_when_its_answer_begins(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    stream = Streams(EVENTS, more=END, wait=True)
    decode = await start_instance(stream)
    router = await start_router([prefill], [decode], **LIMITS)

    async with router.post(COMPLETIONS, data=body_of(1000)) as response:
        await response.content.readany()
        assert await held(router) == 0
        stream.go_on.set()
        assert (await response.read()).endswith(END[0])


@pytest.mark.parametrize("prefill_status", [200, 400, 500])
async def test_nothing_is_held_after_an_answer(
    start_router: StartRouter,
    start_instance: StartInstance,
    decode: FakeInstance,
    prefill_status: int,
) -> None:
    prefill = await start_instance(answers(prefill_status, {}))
    router = await start_router([prefill], [decode], **LIMITS)

    async with router.post(COMPLETIONS, data=body_of(1000)) as response:
        await response.read()

    await until_held(router, 0)


async def test_nothing_is_held_of_a_client_that_left(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode], **LIMITS)
    request = asyncio.ensure_future(router.post(COMPLETIONS, data=body_of(900)))
    await decode.started.wait()

    request.cancel()

    await until_held(router, 0)


async def test_a_body_counts_as_it_comes(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode], **LIMITS)
    reader, writer = await asyncio.open_connection(router.host, router.port)
    writer.write(POST + b"Content-Length: 1000\r\n\r\n" + b"x" * 10)
    await until_held(router, 10)
    writer.write(b"x" * 500)
    await until_held(router, 510)

    writer.close()  # and what had come is given back

    await until_held(router, 0)
    assert await reader.read() == b""


async def test_the_next_request_works_after_one_without_place(
    prefill: FakeInstance, decode: FakeInstance
) -> None:
    async for port in served([prefill], [decode], **LIMITS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n384\r\n" + b"x" * 900)
        await until(partial(is_answered, port, 429))  # once all of it has come
        writer.close()
        await until(partial(is_answered, port, 200))
        await reader.read()
