"""Responses that one instance has stored: fetched, cancelled and continued there."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import FakeInstance, Streams, drops
from tests.unit.router.test_bad_clients import send, status_of
from vllm_pd.config import InstanceSpec, Role, RoleLabel
from vllm_pd.router.resources import POOL

RESPONSES = "/v1/responses"
GOES_ON = {"model": "m", "input": "go on", "previous_response_id": "resp_1"}
EVENT = b'event: response.created\ndata: {"type":"response.created"}\n\n'
LAST = b'event: response.completed\ndata: {"type":"response.completed"}\n\n'


class Store:
    """Answers for responses as vLLM 0.32 does with a store."""

    def __init__(self, *response_ids: str) -> None:
        self.response_ids = response_ids
        self.stream = Streams([EVENT, LAST])

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.path == RESPONSES:
            wanted = (await request.json()).get("previous_response_id")
        else:
            wanted = request.path.split("/")[3]
        if wanted not in (None, *self.response_ids):
            message = f"Response with id '{wanted}' not found."
            error = {"message": message, "type": "invalid_request_error", "code": 404}
            return web.json_response({"error": {**error, "param": "response_id"}}, status=404)
        if request.query.get("stream") == "true":
            return await self.stream(request)
        cancelled = request.path.endswith("/cancel")
        status = "cancelled" if cancelled else "completed"
        return web.json_response({"id": wanted, "object": "response", "status": status})


@pytest.fixture
async def other(start_instance: StartInstance) -> FakeInstance:
    return await start_instance(Store("resp_2"))


@pytest.fixture
async def owner(start_instance: StartInstance) -> FakeInstance:
    return await start_instance(Store("resp_1", "a.b:c~d-e"))


@pytest.fixture
async def prefill(start_instance: StartInstance) -> FakeInstance:
    return await start_instance(Store())


def asked(instance: FakeInstance) -> list[str]:
    return [one.path for one in instance.received]


@pytest.mark.parametrize("response_id", ["resp_1", "a.b:c~d-e"])
async def test_a_response_is_fetched_from_the_instance_that_has_it(
    start_router: StartRouter,
    prefill: FakeInstance,
    other: FakeInstance,
    owner: FakeInstance,
    response_id: str,
) -> None:
    router = await start_router([prefill], [other, owner])

    async with router.get(f"{RESPONSES}/{response_id}") as response:
        assert response.status == 200
        assert (await response.json())["id"] == response_id


async def test_a_response_may_be_where_nobody_answers(
    start_router: StartRouter, prefill: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [owner])
    (instance,) = [one for one in router.app[POOL] if one.serves(Role.DECODE)]
    owner.healthy = False
    while instance.healthy:
        instance.probe_now.set()
        await asyncio.sleep(0.001)

    async with router.get(f"{RESPONSES}/resp_1") as response:
        assert response.status == 503
    assert asked(owner) == []


async def test_what_was_found_at_an_instance_that_lost_it_is_asked_for_again(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])
    async with router.get(f"{RESPONSES}/resp_1") as response:
        assert response.status == 200
    other.behave, owner.behave = Store("resp_1"), Store()
    pool = router.app[POOL]
    (instance,) = [one for one in pool if one.base_url == owner.url]
    pool.remove(instance)
    again = pool.add(InstanceSpec(url=owner.url, role=RoleLabel.DECODE))
    while not again.healthy:  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.001)

    async with router.get(f"{RESPONSES}/resp_1") as response:
        assert response.status == 200


async def test_a_response_that_nobody_has_is_not_found_in_vllms_words(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])

    for method, path in [("GET", "resp_3"), ("POST", "resp_3/cancel")]:
        async with router.request(method, f"{RESPONSES}/{path}") as response:
            assert response.status == 404
            error = (await response.json())["error"]
            assert (error["code"], error["param"]) == (404, "response_id")


async def test_a_response_is_cancelled_where_it_is_made_and_nowhere_else(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])

    async with router.post(f"{RESPONSES}/resp_1/cancel") as response:
        assert (await response.json())["status"] == "cancelled"

    cancelled = [f"{RESPONSES}/resp_1/cancel" in asked(one) for one in (prefill, other, owner)]
    assert cancelled == [False, False, True]


async def test_a_response_can_be_streamed_from_any_event_on(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])
    queries: list[str] = []
    behave = owner.behave

    async def noting(request: web.Request) -> web.StreamResponse:
        queries.append(request.query_string)
        return await behave(request)

    owner.behave = noting
    async with router.get(f"{RESPONSES}/resp_1?stream=true&starting_after=2") as response:
        assert response.content_type == "text/event-stream"
        assert await response.read() == EVENT + LAST

    assert queries == ["", "stream=true&starting_after=2"]


async def test_a_client_that_polls_makes_the_router_ask_once(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])

    for _ in range(3):
        async with router.get(f"{RESPONSES}/resp_1") as response:
            assert response.status == 200

    assert [len(asked(one)) for one in (prefill, other, owner)] == [1, 1, 1 + 3]


async def test_a_conversation_goes_on_where_its_last_response_is(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])

    async with router.post(RESPONSES, json=GOES_ON) as response:
        assert response.status == 200
        assert response.headers["X-VLLM-PD-Path"] == "decode-only"

    assert json.loads(owner.received[-1].raw)["previous_response_id"] == "resp_1"
    assert RESPONSES not in asked(other)


async def test_a_conversation_that_nobody_has_is_refused_in_vllms_words(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])

    async with router.post(RESPONSES, json={**GOES_ON, "previous_response_id": "x"}) as response:
        assert response.status == 404
        assert "'x'" in (await response.json())["error"]["message"]


async def test_an_instance_that_has_a_response_has_no_substitute(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])
    async with router.get(f"{RESPONSES}/resp_1") as response:
        assert response.status == 200
    owner.behave = drops

    async with router.post(RESPONSES, json=GOES_ON) as response:
        assert response.status == 502
    async with router.post(RESPONSES, json=GOES_ON) as response:  # it is known to be gone now
        assert response.status == 503

    assert RESPONSES not in asked(other)


async def test_a_response_is_not_called_lost_while_an_instance_is_silent(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])
    owner.behave = drops

    async with router.get(f"{RESPONSES}/resp_1") as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == 503


async def test_a_response_is_found_where_another_role_was_given_since(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])
    pool = router.app[POOL]
    for one in pool:
        if one.base_url == owner.url:
            pool.relabel(one, RoleLabel.PREFILL)

    async with router.get(f"{RESPONSES}/resp_1") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "path",
    ["..%2F..%2Fmetrics", "%2E%2E", "a%2Fb", "a%3Fb", "a%20b", "%0d%0a", "x" * 300, ".hidden"],
)
async def test_an_id_cannot_lead_to_another_endpoint(
    start_router: StartRouter,
    prefill: FakeInstance,
    other: FakeInstance,
    owner: FakeInstance,
    path: str,
) -> None:
    router = await start_router([prefill], [other, owner])
    request = f"GET {RESPONSES}/{path} HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n"

    answer = await send(router.port or 0, request.encode())

    assert status_of(answer) == 404
    assert prefill.received == other.received == owner.received == []


@pytest.mark.parametrize("previous", ["../../metrics", "resp_1\n", "a b", "", 5, ["resp_1"]])
async def test_nobody_is_asked_for_a_predecessor_that_is_no_id(
    start_router: StartRouter,
    prefill: FakeInstance,
    other: FakeInstance,
    owner: FakeInstance,
    previous: object,
) -> None:
    router = await start_router([prefill], [other, owner])

    async with router.post(RESPONSES, json={**GOES_ON, "previous_response_id": previous}):
        assert asked(prefill) + asked(other) + asked(owner) == [RESPONSES]


async def test_metrics_do_not_grow_with_the_ids(
    start_router: StartRouter, prefill: FakeInstance, other: FakeInstance, owner: FakeInstance
) -> None:
    router = await start_router([prefill], [other, owner])
    for path in ("resp_1", "resp_2"):
        async with router.get(f"{RESPONSES}/{path}") as response:
            assert response.status == 200

    text = await (await router.get("/metrics")).text()

    assert 'router_requests_total{code="200",endpoint="/v1/responses/{response_id}"' in text
    assert "resp_1" not in text
