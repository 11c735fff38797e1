from __future__ import annotations

import asyncio
import gzip
import io
import json
import uuid
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import (
    KV_PARAMS,
    Behaviour,
    Client,
    FakeInstance,
    answers,
    completes,
    drops,
    hangs,
    prefills,
)
from vllm_pd.router.resources import POOL

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY = {"model": "m", "prompt": "hi", "max_tokens": 8}
PD_PATH = "X-VLLM-PD-Path"
METRICS = (
    'vllm:num_requests_running{engine="0"} 0\n'
    'vllm:num_requests_waiting{engine="0"} 0\n'
    'vllm:kv_cache_usage_perc{engine="0"} 0\n'
)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_request_is_prefilled_first_and_decoded_with_the_params(
    router: Client, prefill: FakeInstance, decode: FakeInstance, path: str
) -> None:
    async with router.post(path, json=BODY) as response:
        assert response.status == 200
        assert await response.json() == {"choices": [{"text": "hello"}]}
        assert response.headers[PD_PATH] == "disaggregated"

    (first,), (second,) = prefill.received, decode.received
    assert first.path == second.path == path
    assert first.json["max_tokens"] == 1
    assert first.json["kv_transfer_params"]["do_remote_decode"] is True
    assert second.json == {**BODY, "kv_transfer_params": KV_PARAMS}


async def test_both_legs_and_the_answer_carry_one_request_id(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    async with router.post(COMPLETIONS, json=BODY) as response:
        request_id = response.headers["X-Request-Id"]

    assert str(uuid.UUID(request_id)) == request_id
    assert prefill.received[0].headers["X-Request-Id"] == request_id
    assert decode.received[0].headers["X-Request-Id"] == request_id


async def test_the_transfer_id_is_not_the_request_id(router: Client, prefill: FakeInstance) -> None:
    for _ in range(2):
        async with router.post(COMPLETIONS, json=BODY, headers={"X-Request-Id": "same"}):
            pass

    ids = {one.json["kv_transfer_params"]["transfer_id"] for one in prefill.received}
    assert len(ids) == 2
    assert all(uuid.UUID(hex=one).hex == one for one in ids)


async def test_the_clients_key_reaches_both_legs(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    async with router.post(COMPLETIONS, json=BODY, headers={"Authorization": "Bearer k"}):
        pass

    assert prefill.received[0].headers["Authorization"] == "Bearer k"
    assert decode.received[0].headers["Authorization"] == "Bearer k"


async def test_transfer_params_of_the_client_are_stripped(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    body = {**BODY, "echo": True, "kv_transfer_params": {"remote_host": "evil"}}

    async with router.post(COMPLETIONS, json=body) as response:
        assert response.headers[PD_PATH] == "decode-only"

    assert prefill.received == []
    assert "kv_transfer_params" not in decode.received[0].json


async def test_a_value_that_only_the_decode_leg_sees_is_refused_without_a_prefill(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    refusal = {"error": {"message": "max_tokens must be at least 1", "code": 400}}
    decode = await start_instance(answers(400, refusal))
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json={**BODY, "max_tokens": -1}) as response:
        assert response.status == 400
        assert await response.json() == refusal

    assert prefill.received == []
    assert decode.received[0].json["max_tokens"] == -1


@pytest.mark.parametrize("raw", [b'{"prompt": ', b'["no", "object"]', b""])
async def test_what_is_no_json_object_is_left_to_vllm_as_it_is(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance, raw: bytes
) -> None:
    decode = await start_instance(answers(400, {"error": {"message": "JSON decode error"}}))
    router = await start_router([prefill], [decode])
    headers = {"Content-Type": "application/json"}

    async with router.post(COMPLETIONS, data=raw, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "JSON decode error"

    assert prefill.received == []
    assert decode.received[0].raw == raw
    assert decode.received[0].headers["Content-Type"] == "application/json"


async def test_a_content_type_that_vllm_refuses_reaches_it(
    router: Client, prefill: FakeInstance
) -> None:
    headers = {"Content-Type": "text/plain"}

    async with router.post(COMPLETIONS, data=json.dumps(BODY), headers=headers):
        pass

    assert prefill.received[0].headers["Content-Type"] == "text/plain"


async def test_a_body_too_deep_to_read_is_refused_and_not_passed_on(
    router: Client, decode: FakeInstance
) -> None:
    raw = b'{"kv_transfer_params": {}, "a":' + b"[" * 100_000

    async with router.post(COMPLETIONS, data=raw) as response:
        assert response.status == 400
        assert "nested" in (await response.json())["error"]["message"]

    assert decode.received == []


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_beyond_the_limit_is_refused_in_vllms_shape(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, chunked: bool
) -> None:
    router = await start_router([prefill], [decode], max_body_len=100)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 101

    async with router.post(COMPLETIONS, data=pieces() if chunked else b"x" * 101) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == 413

    assert prefill.received == decode.received == []


async def test_a_body_at_the_limit_is_served(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    raw = json.dumps(BODY).encode()
    router = await start_router([prefill], [decode], max_body_len=len(raw))

    async with router.post(COMPLETIONS, data=raw) as response:
        assert response.status == 200


async def test_a_body_of_several_mebibytes_is_served(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    body = {"prompt": "x" * (3 * 2**20)}
    raw = io.BytesIO(json.dumps(body).encode())

    async with router.post(COMPLETIONS, data=raw) as response:
        assert response.status == 200

    assert prefill.received[0].json["prompt"] == body["prompt"]
    assert decode.received[0].json["prompt"] == body["prompt"]


async def test_a_compressed_body_is_passed_on_uncompressed(
    router: Client, decode: FakeInstance
) -> None:
    raw = gzip.compress(json.dumps(BODY).encode())

    async with router.post(COMPLETIONS, data=raw, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 200

    assert decode.received[0].json["prompt"] == "hi"


async def test_a_damaged_compressed_body_is_the_clients_fault(router: Client) -> None:
    async with router.post(
        COMPLETIONS, data=b"not gzip", headers={"Content-Encoding": "gzip"}
    ) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == 400


@pytest.mark.parametrize("status", [400, 422])
async def test_the_decode_instance_words_what_is_wrong_with_the_body(
    start_router: StartRouter, start_instance: StartInstance, status: int
) -> None:
    prefill = await start_instance(answers(status, {"error": {"message": "of the prefill leg"}}))
    decode = await start_instance(answers(status, {"error": {"message": "of the client's"}}))
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == status
        assert await response.json() == {"error": {"message": "of the client's"}}

    assert [json.loads(leg.raw) for leg in decode.received] == [BODY]


@pytest.mark.parametrize("status", [401, 404])
async def test_a_refusal_of_the_prefill_instance_reaches_the_client(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance, status: int
) -> None:
    prefill = await start_instance(answers(status, {"error": {"message": "no"}}))
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == status
        assert await response.json() == {"error": {"message": "no"}}

    assert decode.received == []


async def test_an_error_of_the_decode_instance_reaches_the_client(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(answers(503, {"error": {"message": "full"}}, **{"X-Why": "load"}))
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 503
        assert await response.json() == {"error": {"message": "full"}}
        assert response.headers["X-Why"] == "load"


@pytest.mark.parametrize("behave", [drops, answers(500), answers(503), answers(429)])
async def test_another_prefill_instance_takes_over(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance, behave: object
) -> None:
    bad, good = await start_instance(behave), await start_instance(prefills)  # type: ignore[arg-type]
    router = await start_router([bad, good], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
        assert response.headers[PD_PATH] == "disaggregated"

    (failed,), (served,) = bad.received, good.received
    assert decode.received[0].json["kv_transfer_params"] == KV_PARAMS
    assert (
        failed.json["kv_transfer_params"]["transfer_id"]
        != served.json["kv_transfer_params"]["transfer_id"]
    )


@pytest.mark.parametrize("behave", [drops, answers(500), answers(503)])
async def test_the_decode_instance_prefills_when_no_prefill_instance_is_left(
    start_router: StartRouter,
    start_instance: StartInstance,
    decode: FakeInstance,
    behave: Behaviour,
) -> None:
    prefills_ = [await start_instance(behave) for _ in range(2)]
    router = await start_router(prefills_, [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
        assert response.headers[PD_PATH] == "decode-only"

    assert [len(one.received) for one in prefills_] == [1, 1]
    assert decode.received[0].json == BODY


@pytest.mark.parametrize(
    ("behave", "status"), [(drops, 502), (answers(500), 500), (answers(501), 501), (hangs, 504)]
)
async def test_a_request_that_breaks_three_prefill_instances_gets_no_fourth_instance(
    start_router: StartRouter, start_instance: StartInstance, behave: Behaviour, status: int
) -> None:
    prefills_ = [await start_instance(behave) for _ in range(4)]
    decodes = [await start_instance(drops) for _ in range(3)]
    router = await start_router(prefills_, decodes, prefill_timeout_s=0.5)

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == status

    assert [len(one.received) for one in prefills_] == [1, 1, 1, 0]
    assert [len(one.received) for one in decodes] == [0, 0, 0]


async def test_a_request_that_breaks_three_decode_instances_gets_no_fourth_one(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decodes = [await start_instance(drops) for _ in range(4)]
    router = await start_router([prefill], decodes)

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 502
        assert "decode instance failed" in (await response.json())["error"]["message"]

    assert [len(one.received) for one in decodes] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("at_prefill", "at_decode", "status"),
    [(drops, drops, 502), (answers(500), answers(500), 500), (answers(500), drops, 502)],
)
@pytest.mark.parametrize("num_good", [0, 1])
async def test_what_breaks_instances_of_both_roles_gets_no_fourth_one(
    start_router: StartRouter,
    start_instance: StartInstance,
    at_prefill: Behaviour,
    at_decode: Behaviour,
    status: int,
    num_good: int,
) -> None:
    bad = await start_instance(at_prefill)
    good = [await start_instance(prefills) for _ in range(num_good)]
    decodes = [await start_instance(at_decode) for _ in range(4)]
    router = await start_router([bad, *good], decodes)

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == status

    assert len(bad.received) == 1
    assert [len(one.received) for one in decodes] == [1, 1, 0, 0]


async def test_instances_that_cannot_be_reached_are_all_tried(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    decode: FakeInstance,
) -> None:
    gone = [await start_instance(prefills) for _ in range(6)]
    for one in gone:
        one.metrics = METRICS
    router = await start_router([*gone[:3], prefill], [*gone[3:], decode])
    urls = {one.url for one in gone}
    looked_at = [one for one in router.app[POOL] if one.base_url in urls]
    while not all(one.ledger.scrape for one in looked_at):  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.001)  # to be looked at while it closes would leak a socket
    for one in gone:
        await one.stop()

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
        assert response.headers[PD_PATH] == "disaggregated"


@pytest.mark.parametrize("status", [429, 503])
async def test_prefill_instances_that_are_busy_are_all_tried(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    decode: FakeInstance,
    status: int,
) -> None:
    busy = [await start_instance(answers(status)) for _ in range(3)]
    router = await start_router([*busy, prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
        assert response.headers[PD_PATH] == "disaggregated"


async def test_decode_instances_that_are_busy_are_all_tried(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    decode: FakeInstance,
) -> None:
    busy = [await start_instance(answers(503)) for _ in range(3)]
    router = await start_router([prefill], [*busy, decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200


async def test_a_killed_prefill_instance_is_skipped_by_later_requests(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode])
    await prefill.stop()

    paths = []
    for _ in range(2):
        async with router.post(COMPLETIONS, json=BODY) as response:
            paths.append(response.headers[PD_PATH])
    async with router.get("/metrics") as response:
        metrics = await response.text()

    assert paths == ["decode-only", "decode-only"]
    assert 'vllm_pd:router_decode_only_total{reason="prefill_failed"} 1.0' in metrics
    assert 'vllm_pd:router_decode_only_total{reason="no_prefill_instance"} 1.0' in metrics


async def test_a_prefill_instance_that_is_too_slow_is_given_up(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance
) -> None:
    prefill = await start_instance(hangs)
    router = await start_router([prefill], [decode], prefill_timeout_s=0.05)

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.headers[PD_PATH] == "decode-only"
    await prefill.cancelled.wait()


async def test_overload_of_all_prefill_instances_reaches_the_client(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance
) -> None:
    busy = await start_instance(answers(429, {"error": {}}, **{"Retry-After": "7"}))
    broken = await start_instance(answers(500))
    router = await start_router([busy, broken], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "7"

    assert decode.received == []


@pytest.mark.parametrize("payload", [{"choices": []}, {"kv_transfer_params": "x"}, "no object"])
async def test_a_prefill_without_params_is_repeated_by_the_decode_instance(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance, payload: object
) -> None:
    prefill = await start_instance(answers(200, payload))
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
        assert response.headers[PD_PATH] == "decode-only"

    assert decode.received[0].json == BODY


async def test_another_decode_instance_takes_over_with_the_same_params(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    bad, good = await start_instance(drops), await start_instance(completes)
    router = await start_router([prefill], [bad, good])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200

    assert bad.received[0].json["kv_transfer_params"] == KV_PARAMS
    assert good.received[0].json["kv_transfer_params"] == KV_PARAMS
    assert len(prefill.received) == 1


async def test_a_decode_instance_that_dies_without_a_substitute_is_a_502(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(drops)
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 502
        assert (await response.json())["error"]["type"] == "Bad Gateway"
        assert response.headers["X-Request-Id"]


async def test_a_body_cut_off_by_the_decode_instance_is_a_502(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    async def cuts_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"choices": ')
        assert request.transport is not None
        request.transport.close()
        return response

    decode = await start_instance(cuts_off)
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 502


async def test_a_silent_decode_instance_is_a_504_and_not_retried(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    silent, other = await start_instance(hangs), await start_instance(completes)
    router = await start_router([prefill], [silent, other], decode_idle_timeout_s=0.05)

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 504

    assert other.received == []


async def test_without_a_decode_instance_nothing_is_prefilled(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    decode.healthy = False
    router = await start_router([prefill], [decode])

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 503
        assert (await response.json())["error"]["type"] == "Service Unavailable"

    assert prefill.received == []


async def test_requests_go_where_less_is_to_be_done(
    start_router: StartRouter, start_instance: StartInstance
) -> None:
    busy, free = await start_instance(hangs), await start_instance(prefills)
    decode = await start_instance(completes)
    router = await start_router([busy, free], [decode])
    waiting = asyncio.ensure_future(router.post(COMPLETIONS, json=BODY))
    await busy.started.wait()

    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
    assert [len(busy.received), len(free.received)] == [1, 1]
    waiting.cancel()
    await busy.cancelled.wait()


async def test_a_stale_keep_alive_connection_does_not_take_an_instance_out_of_use(
    start_router: StartRouter, prefill: FakeInstance
) -> None:
    async def one_answer_per_connection(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"Content-Length: " in head:
            length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await reader.read(1)  # closes in answer to the next request
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(one_answer_per_connection, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        router = await start_router([prefill], [], decode_urls=(f"http://127.0.0.1:{port}",))

        async with router.post(COMPLETIONS, json=BODY) as response:  # reuses the probe's
            assert response.status == 200
        await router.close()


async def test_a_client_that_leaves_ends_the_prefill(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance
) -> None:
    prefill = await start_instance(hangs)
    router = await start_router([prefill], [decode])

    request = asyncio.create_task(router.session.post(router.make_url(COMPLETIONS), json=BODY))
    await prefill.started.wait()
    request.cancel()

    await prefill.cancelled.wait()
    assert decode.received == []


async def test_a_client_that_leaves_ends_the_decode_leg(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode])

    request = asyncio.create_task(router.session.post(router.make_url(COMPLETIONS), json=BODY))
    await decode.started.wait()
    request.cancel()

    await decode.cancelled.wait()
