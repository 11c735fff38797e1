"""The decode leg that is sent while its prefill still runs, and prefills that are released."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import ClientError, web

from tests.unit.protocol.test_messages import FINGERPRINT
from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import (
    Client,
    FakeInstance,
    Streams,
    answers,
    completes,
    drops,
    hangs,
)
from vllm_pd.config import ConnectorConfig, Role, RoleLabel
from vllm_pd.router.early import Early
from vllm_pd.router.forecast import PrefillForecast
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.prefill import Prefilled, is_as_expected
from vllm_pd.router.resources import POOL
from vllm_pd.router.sink import Sink
from vllm_pd.session.instance import InstanceEndpoint

COMPLETIONS = "/v1/completions"
BODY = {"model": "m", "prompt": "hi", "max_tokens": 8}
ENGINE = "p0"


class Foretold(PrefillForecast):
    """Tells a pause that does not depend on a prompt or on what prefills took."""

    def __init__(self, pause_s: float, then: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._pause_s = pause_s
        self._then = then

    def pause_s(self, num_tokens: int, lead_s: float) -> float | None:
        self._then()
        return self._pause_s


class Producer:
    """Answers prefill legs as our connector does, once ``go_on`` is set."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.engine_id = ENGINE
        self.status = 200
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        asked = (await request.json())["kv_transfer_params"]
        await self.go_on.wait()
        params = {
            "do_remote_prefill": True,
            "transfer_id": asked["transfer_id"],
            "remote_engine_id": self.engine_id,
            "remote_host": "127.0.0.1",
            "remote_port": self.port,
            "remote_num_tokens": 2,
            "remote_prompt_digest": "d",
        }
        payload = {"choices": [{"text": "x"}], "kv_transfer_params": params}
        return web.json_response(payload, status=self.status)


@pytest.fixture
def endpoint() -> Iterator[InstanceEndpoint]:
    endpoint = InstanceEndpoint(ConnectorConfig(), engine_id=ENGINE, tp_size=1)
    endpoint.set_workers((), FINGERPRINT)
    yield endpoint
    endpoint.close()


@pytest.fixture
def producer(endpoint: InstanceEndpoint) -> Producer:
    return Producer(endpoint.port)


@pytest.fixture
async def prefill(start_instance: StartInstance, producer: Producer) -> FakeInstance:
    return await start_instance(producer)


async def post(router: Client) -> tuple[int, str]:
    async with router.post(COMPLETIONS, json=BODY) as response:
        return response.status, response.headers["X-VLLM-PD-Path"]


async def known(router: Client, *instances: FakeInstance) -> Client:
    """Send one request, from which the router learns who prefills; forget that it came."""
    assert await post(router) == (200, "disaggregated")
    pool = router.app[POOL]
    while not any(instance.engine_id for instance in pool):  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.001)
    for instance in instances:
        instance.received.clear()
        instance.started.clear()
    return router


def the(router: Client, fake: FakeInstance) -> Instance:
    """Return an instance as the router knows it."""
    (instance,) = (one for one in router.app[POOL] if one.base_url == fake.url)
    return instance


def params_of(instance: FakeInstance) -> list[Any]:
    return [received.json.get("kv_transfer_params") for received in instance.received]


async def test_the_decode_leg_does_not_wait_for_the_prefill(
    start_router: StartRouter, producer: Producer, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await known(await start_router([prefill], [decode]), prefill, decode)
    producer.go_on.clear()
    asked = asyncio.create_task(post(router))
    await decode.started.wait()
    assert not asked.done()
    producer.go_on.set()

    assert await asked == (200, "disaggregated")
    (first,), (second,) = params_of(prefill), params_of(decode)
    assert second["do_remote_prefill"] is True
    assert second["transfer_id"] == first["transfer_id"]
    assert (second["remote_engine_id"], second["remote_port"]) == (ENGINE, producer.port)
    assert second["remote_num_tokens"] is None


async def test_the_first_request_waits_as_nobody_knows_where_its_prefill_will_be(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode])
    assert await post(router) == (200, "disaggregated")
    (params,) = params_of(decode)
    assert params["remote_num_tokens"] == 2


async def test_where_a_former_decode_instance_keeps_its_prefills_is_known_from_the_first_one(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, producer: Producer
) -> None:
    router = await start_router([], [prefill, decode])
    pool = router.app[POOL]
    (instance,) = (one for one in pool if one.base_url == prefill.url)
    assert [one.control for one in pool] == [None, None]
    pool.relabel(instance, RoleLabel.PREFILL)

    await known(router)

    assert (instance.engine_id, instance.control) == (ENGINE, ("127.0.0.1", producer.port))


async def test_it_can_be_turned_off(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode], early_decode_s=0)
    await known(router, prefill, decode)
    assert await post(router) == (200, "disaggregated")
    (params,) = params_of(decode)
    assert params["remote_num_tokens"] == 2


async def test_it_is_not_sent_long_before_its_prefill_is_expected_to_end(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await known(await start_router([prefill], [decode]), prefill, decode)
    for instance in router.app[POOL]:
        for num_tokens in (1, 2, 4, 8):
            instance.forecast.note(num_tokens, 3600.0)
    assert await post(router) == (200, "disaggregated")
    (params,) = params_of(decode)
    assert params["remote_num_tokens"] == 2


async def test_it_is_sent_once_its_prefill_is_expected_to_end_soon(
    start_router: StartRouter, producer: Producer, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await known(await start_router([prefill], [decode]), prefill, decode)
    the(router, prefill).forecast = Foretold(0.001)
    producer.go_on.clear()
    asked = asyncio.create_task(post(router))
    await decode.started.wait()
    producer.go_on.set()
    assert await asked == (200, "disaggregated")
    (params,) = params_of(decode)
    assert params["remote_num_tokens"] is None


def _drain(pool: InstancePool, instance: Instance) -> None:
    pool.drain(instance)


def _trip(pool: InstancePool, instance: Instance) -> None:
    pool.doubt(instance.base_url, tripped=True)


def _relabel(pool: InstancePool, instance: Instance) -> None:
    pool.relabel(instance, RoleLabel.PREFILL)


@pytest.mark.parametrize("change", [_drain, _trip, _relabel])
async def test_what_may_not_decode_any_more_when_the_leg_is_due_does_not_get_it(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
    decode: FakeInstance,
    change: Callable[[InstancePool, Instance], None],
) -> None:
    other = await start_instance(completes)
    router = await known(await start_router([prefill], [decode, other]), prefill, decode, other)
    pool, chosen = router.app[POOL], the(router, decode)
    the(router, prefill).forecast = Foretold(0.001, lambda: change(pool, chosen))
    producer.go_on.clear()
    asked = asyncio.create_task(post(router))
    await prefill.started.wait()
    await asyncio.sleep(0.01)  # timers are in order: the leg's is over now
    producer.go_on.set()

    assert await asked == (200, "disaggregated")
    assert decode.received == []
    (params,) = params_of(other)
    assert params["remote_num_tokens"] == 2


async def test_an_early_leg_that_is_not_to_be_sent_has_no_answer() -> None:
    early = Early()
    sent = asyncio.Event()

    def refuse() -> None:
        sent.set()

    early.start("http://d", {}, 0.001, refuse)
    await sent.wait()
    assert await early.take(Prefilled.__new__(Prefilled)) is None


async def test_an_early_leg_that_breaks_counts_as_an_attempt(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
) -> None:
    decode = [await start_instance(completes) for _ in range(4)]
    router = await start_router([prefill], decode, early_decode_s=60)
    await known(router, prefill, *decode)
    for one in decode:
        one.behave = drops
    producer.go_on.clear()
    asked = asyncio.create_task(post(router))
    first = the(router, decode[0])
    while not (first.num_failed and first.healthy):  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.001)  # as it would be asked again, were it not for its failure
    producer.go_on.set()
    assert (await asked)[0] == 502
    # The first one twice: the connection was an old one, which says nothing when it breaks.
    assert [bool(one.received) for one in decode] == [True, True, True, False]


async def test_an_early_leg_that_breaks_and_two_prefills_leave_nothing_to_be_tried(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
    decode: FakeInstance,
) -> None:
    bad, *others = [await start_instance(drops) for _ in range(3)]
    router = await start_router([prefill, bad, others[0]], [decode, others[1]], early_decode_s=60)
    await known(router, prefill, decode)
    decode.behave = drops
    producer.go_on.clear()
    producer.status = 500
    asked = asyncio.create_task(post(router))
    await decode.ended.wait()
    while not the(router, decode).num_failed:  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.001)
    producer.go_on.set()
    assert (await asked)[0] == 502
    assert len(bad.received) == 1
    assert [len(one.received) for one in others] == [0, 0]


@pytest.mark.parametrize("num_decode", [1, 2])
async def test_an_early_leg_that_fails_is_tried_once_more_elsewhere_and_no_further(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    num_decode: int,
) -> None:
    decode = [await start_instance(completes) for _ in range(num_decode)]
    router = await start_router([prefill], decode, early_decode_s=60)
    await known(router, prefill, *decode)
    for one in decode:
        one.behave = answers(500, {"error": {"message": "no", "code": 500}})
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 500
    assert [len(one.received) for one in decode] == [1] * num_decode


async def test_scarce_blocks_are_not_taken_early(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    decode.metrics = (
        'vllm:num_requests_running{engine="0"} 3\n'
        'vllm:num_requests_waiting{engine="0"} 0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.6\n'
    )
    router = await known(await start_router([prefill], [decode]), prefill, decode)
    assert await post(router) == (200, "disaggregated")
    (params,) = params_of(decode)
    assert params["remote_num_tokens"] == 2


def is_early(body: dict[str, Any]) -> bool:
    params = body.get("kv_transfer_params")
    return params is not None and params["remote_num_tokens"] is None


async def waits_if_early(request: web.Request) -> web.StreamResponse:
    """Answer as a decode instance whose early fetches never end."""
    return await (hangs if is_early(await request.json()) else completes)(request)


async def test_a_decode_leg_whose_prefill_failed_is_given_up(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
) -> None:
    decode = await start_instance(waits_if_early)
    router = await known(
        await start_router([prefill], [decode], early_decode_s=60), prefill, decode
    )
    producer.status = 500
    assert await post(router) == (200, "decode-only")
    early, last = params_of(decode)
    assert early["remote_num_tokens"] is None
    assert last is None
    await decode.cancelled.wait()


async def test_the_early_leg_does_not_outlive_the_prefill_it_waits_for(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
) -> None:
    other = await start_instance(hangs)
    decode = await start_instance(waits_if_early)
    router = await start_router([prefill, other], [decode], early_decode_s=60)
    await known(router, prefill, decode)
    producer.status = 500
    asked = asyncio.create_task(post(router))
    await other.started.wait()
    await decode.cancelled.wait()  # while the second prefill runs
    asked.cancel()
    await other.cancelled.wait()


async def test_a_slow_prefill_does_not_speak_against_the_decode_instance(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
) -> None:
    decode = await start_instance(waits_if_early)
    router = await start_router([prefill], [decode], decode_idle_timeout_s=0.5, breaker_failures=1)
    await known(router, prefill, decode)
    producer.go_on.clear()
    asked = asyncio.create_task(post(router))
    await decode.ended.wait()
    producer.go_on.set()
    assert await asked == (200, "disaggregated")


async def test_an_instance_that_restarted_elsewhere_is_found_again(
    start_router: StartRouter,
    producer: Producer,
    prefill: FakeInstance,
    decode: FakeInstance,
    endpoint: InstanceEndpoint,
) -> None:
    router = await known(await start_router([prefill], [decode]), prefill, decode)
    endpoint.close()
    moved = InstanceEndpoint(ConnectorConfig(), engine_id="p1", tp_size=1)
    moved.set_workers((), FINGERPRINT)
    try:
        producer.port, producer.engine_id = moved.port, "p1"
        (instance,) = [one for one in router.app[POOL] if one.serves(Role.PREFILL)]
        while instance.engine_id != "p1":  # bounded by the test's timeout
            assert (await post(router))[0] == 200
        assert instance.control == ("127.0.0.1", moved.port)
        assert not instance.several_engines
    finally:
        moved.close()


async def test_a_prefill_at_another_engine_than_expected_is_fetched_there(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
) -> None:
    decode = await start_instance(waits_if_early)
    router = await known(
        await start_router([prefill], [decode], early_decode_s=60), prefill, decode
    )
    producer.engine_id = "p1"
    assert await post(router) == (200, "disaggregated")
    assert await post(router) == (200, "disaggregated")
    engines = [params["remote_engine_id"] for params in params_of(decode)]
    assert engines == [ENGINE, "p1", "p1"]  # nobody guesses any more
    await decode.cancelled.wait()


async def test_another_decode_instance_fetches_what_the_first_one_waited_for(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    decode: FakeInstance,
) -> None:
    other = await start_instance(completes)
    router = await known(await start_router([prefill], [decode, other]), prefill, decode)
    decode.behave = drops
    assert await post(router) == (200, "disaggregated")
    (params,) = params_of(other)
    assert params["remote_num_tokens"] == 2


async def test_the_client_that_leaves_ends_both_legs(
    start_router: StartRouter,
    start_instance: StartInstance,
    producer: Producer,
    prefill: FakeInstance,
) -> None:
    decode = await start_instance(waits_if_early)
    router = await known(await start_router([prefill], [decode]), prefill, decode)
    producer.go_on.clear()
    asked = asyncio.create_task(post(router))
    await prefill.started.wait()
    await decode.started.wait()
    asked.cancel()
    await prefill.cancelled.wait()
    await decode.cancelled.wait()


async def released(endpoint: InstanceEndpoint) -> list[str]:
    while not (releases := endpoint.take_releases()):  # noqa: ASYNC110 - another thread's
        await asyncio.sleep(0.001)
    return releases


async def test_a_prefill_whose_client_left_is_released(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    endpoint: InstanceEndpoint,
) -> None:
    router = await start_router([prefill], [decode], early_decode_s=0)
    await known(router, prefill, decode)
    decode.behave = hangs
    asked = asyncio.create_task(post(router))
    await decode.started.wait()
    asked.cancel()
    (params,) = params_of(decode)
    assert await released(endpoint) == [params["transfer_id"]]


async def test_a_prefill_whose_client_is_lost_at_a_write_is_released(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    endpoint: InstanceEndpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = await start_router([prefill], [decode], early_decode_s=0)
    await known(router, prefill, decode)
    decode.behave = Streams([b"data: 1\n\n"], wait=True)

    async def lost(_sink: Sink, _data: bytes) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(Sink, "write", lost)
    with pytest.raises(ClientError):
        async with router.post(COMPLETIONS, json=BODY) as response:
            await response.read()
    assert await released(endpoint) == [params_of(decode)[0]["transfer_id"]]


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_prefill_that_failed_is_released(
    start_router: StartRouter,
    producer: Producer,
    prefill: FakeInstance,
    decode: FakeInstance,
    endpoint: InstanceEndpoint,
    status: int,
) -> None:
    router = await known(await start_router([prefill], [decode]), prefill, decode)
    producer.status = status
    await post(router)
    assert await released(endpoint) == [params_of(prefill)[0]["transfer_id"]]


@pytest.mark.parametrize("behave", [drops, answers(400)])
async def test_a_prefill_that_no_decode_instance_takes_is_released(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    endpoint: InstanceEndpoint,
    behave: Any,
) -> None:
    router = await start_router([prefill], [decode], early_decode_s=0)
    await known(router, prefill, decode)
    decode.behave = behave
    await post(router)
    assert await released(endpoint) == [params_of(decode)[0]["transfer_id"]]


async def is_healthy(_url: str) -> bool:
    return True


@pytest.mark.parametrize(("known_now", "has_several"), [("old", True), ("new", False)])
def test_a_restart_that_is_known_by_now_is_not_taken_for_several_engines(
    known_now: str, *, has_several: bool
) -> None:
    (instance,) = InstancePool(["http://p"], [], probe=is_healthy, health_interval_s=3600.0)
    instance.engine_id = known_now
    prefilled = Prefilled(instance, {"transfer_id": "t", "remote_engine_id": "new"}, {})
    assert not is_as_expected(prefilled, {"transfer_id": "t", "remote_engine_id": "old"})
    assert instance.several_engines is has_several
