"""Keys, queues, limits and further endpoints, through the whole router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import FakeInstance, answers, completes, hangs, prefills

COMPLETIONS = "/v1/completions"
BODY = {"model": "m", "prompt": "hi", "max_tokens": 8}


@pytest.fixture
def api_keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.yaml"
    path.write_text("- {name: ann, key: k-ann, max_concurrent: 1}\n- {name: bob, key: k-bob}\n")
    path.chmod(0o600)
    return str(path)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize("headers", [{}, bearer("wrong")])
async def test_without_a_key_nothing_is_served(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    api_keys_file: str,
    path: str,
    headers: dict[str, str],
) -> None:
    router = await start_router([prefill], [decode], api_keys_file=api_keys_file)
    async with router.post(path, json=BODY, headers=headers) as response:
        assert response.status == 401
        assert await response.json() == {"error": "Unauthorized"}
    assert prefill.received == decode.received == []


async def test_the_clients_key_stays_here_and_the_instances_get_theirs(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    api_keys_file: str,
    tmp_path: Path,
) -> None:
    upstream = tmp_path / "upstream.key"
    upstream.write_text("inner\n")
    upstream.chmod(0o600)
    router = await start_router(
        [prefill], [decode], api_keys_file=api_keys_file, upstream_key_file=str(upstream)
    )
    async with router.post(COMPLETIONS, json=BODY, headers=bearer("k-bob")) as response:
        assert response.status == 200
    keys = [one.received[0].headers["Authorization"] for one in (prefill, decode)]
    assert keys == ["Bearer inner"] * 2


async def test_a_client_over_its_limit_is_told_when_to_come_back(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    api_keys_file: str,
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode], api_keys_file=api_keys_file)
    first = asyncio.ensure_future(router.post(COMPLETIONS, json=BODY, headers=bearer("k-ann")))
    await decode.started.wait()
    async with router.post(COMPLETIONS, json=BODY, headers=bearer("k-ann")) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == 429
    first.cancel()
    await decode.cancelled.wait()


async def test_a_full_queue_refuses_what_comes_next(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode], decode_max_concurrent=1, max_queue=0)
    first = asyncio.ensure_future(router.post(COMPLETIONS, json=BODY))
    await decode.started.wait()
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
    first.cancel()
    await decode.cancelled.wait()


async def test_requests_that_wait_are_served_by_priority(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode], decode_max_concurrent=1)
    first = asyncio.ensure_future(router.post(COMPLETIONS, json=BODY))
    await decode.started.wait()
    late = asyncio.ensure_future(router.post(COMPLETIONS, json={**BODY, "priority": 5}))
    urgent = asyncio.ensure_future(
        router.post(COMPLETIONS, json={**BODY, "prompt": "urgent"}, headers={"X-Priority": "-1"})
    )
    while "router_requests_in_flight 3.0" not in await (await router.get("/metrics")).text():
        pass  # bounded by the test's timeout
    decode.behave = completes
    first.cancel()
    for task in (urgent, late):
        async with await task as response:
            assert response.status == 200
    assert decode.received[1].json["prompt"] == "urgent"


async def test_a_priority_that_a_key_may_not_have_reaches_no_engine(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("- {name: ann, key: k, min_priority: 3}\n")
    path.chmod(0o600)
    router = await start_router([prefill], [decode], api_keys_file=str(path))
    body = {**BODY, "priority": -9}
    async with router.post(COMPLETIONS, json=body, headers=bearer("k")) as response:
        assert response.status == 200
    assert prefill.received[0].json["priority"] == decode.received[0].json["priority"] == 3


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/detokenize"])
async def test_what_needs_no_prefill_is_served_by_a_decode_instance(
    start_router: StartRouter, prefill: FakeInstance, start_instance: StartInstance, path: str
) -> None:
    decode = await start_instance(answers(200, {"data": [1]}))
    router = await start_router([prefill], [decode])
    body = {"model": "m", "input": "a", "kv_transfer_params": {"remote_host": "198.51.100.1"}}
    async with router.post(path, json=body) as response:
        assert await response.json() == {"data": [1]}
    assert decode.received[0].json == {"model": "m", "input": "a"}
    assert prefill.received == []


async def test_a_response_is_prefilled_first_by_its_own_limits(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode])
    body = {"model": "m", "input": "hi", "max_output_tokens": 8}
    async with router.post("/v1/responses", json=body) as response:
        assert response.headers["X-VLLM-PD-Path"] == "disaggregated"
    leg = prefill.received[0].json
    assert (leg["max_output_tokens"], leg["store"], leg["stream"]) == (1, False, False)
    assert "max_tokens" not in leg
    assert decode.received[0].json["max_output_tokens"] == 8


async def test_a_short_prompt_skips_the_prefill_instance(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode], min_prefill_tokens=100)
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.headers["X-VLLM-PD-Path"] == "decode-only"
    async with router.get("/metrics") as response:
        assert (
            'vllm_pd:router_decode_only_total{reason="short_prompt"} 1.0' in await response.text()
        )
    assert prefill.received == []


async def test_stages_are_timed(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode])
    async with router.post(COMPLETIONS, json=BODY):
        pass
    async with router.get("/metrics") as response:
        metrics = await response.text()
    path = '{path="disaggregated"}'
    for count in (
        'queue_seconds_count{stage="prefill"}',
        'queue_seconds_count{stage="decode"}',
        "prefill_seconds_count",
        f"first_bytes_seconds_count{path}",
        f"request_seconds_count{path}",
    ):
        assert f"vllm_pd:router_{count} 1.0" in metrics


async def test_a_long_prompt_is_not_prefilled_where_others_decode(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance
) -> None:
    prefill = await start_instance(answers(500))
    router = await start_router([prefill], [decode], max_local_prefill_tokens=100)
    body = {**BODY, "prompt": [1] * 101}
    async with router.post(COMPLETIONS, json=body) as response:
        assert response.status == 503
        assert "no room" in (await response.json())["error"]["message"]
    assert decode.received == []


async def test_the_same_beginning_goes_to_the_same_instance(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance
) -> None:
    producers = [await start_instance(prefills) for _ in range(2)]
    router = await start_router(producers, [decode])
    beginning = list(range(2000))
    bodies: list[dict[str, Any]] = [{**BODY, "prompt": [*beginning, i]} for i in range(4)]
    for body in bodies:
        async with router.post(COMPLETIONS, json=body) as response:
            assert response.status == 200
    assert sorted(len(one.received) for one in producers) == [0, 4]


async def test_an_answer_that_a_draining_instance_aborted_comes_from_another(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    aborted = {"choices": [{"text": "", "finish_reason": "abort"}]}
    draining, other = await start_instance(answers(200, aborted)), await start_instance(completes)
    router = await start_router([prefill], [draining, other])
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert await response.json() == {"choices": [{"text": "hello"}]}
    assert len(draining.received) == len(other.received) == 1


async def test_an_instance_whose_engine_fails_is_replaced_twice_at_most(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    bad = [await start_instance(answers(500, {"error": {"message": str(i)}})) for i in range(4)]
    router = await start_router([prefill], bad)
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 500
        assert await response.json() == {"error": {"message": "2"}}
    assert [len(one.received) for one in bad] == [1, 1, 1, 0]


async def test_what_a_response_repeats_of_its_client_is_no_failure(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    repeated = {"output": [], "metadata": {"finish_reason": "abort"}}
    decode = await start_instance(answers(200, repeated))
    router = await start_router([prefill], [decode])
    async with router.post("/v1/responses", json={"model": "m", "input": "hi"}) as response:
        assert await response.json() == repeated


async def test_a_body_that_does_not_come_is_not_waited_for(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode], client_timeout_s=0.05)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with router.post(COMPLETIONS, data=slowly()) as response:
        assert response.status == 408
    assert prefill.received == []


@pytest.mark.parametrize(("header", "priority"), [("3", 0), ("-3", 5)])
async def test_the_priority_of_the_header_stays_in_the_router(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    header: str,
    priority: int,
) -> None:
    router = await start_router([prefill], [decode])
    body = {**BODY, "priority": priority}
    async with router.post(COMPLETIONS, json=body, headers={"X-Priority": header}) as response:
        assert response.status == 200
    assert decode.received[0].json["priority"] == priority


async def test_admin_is_there_only_with_a_key(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    router = await start_router([prefill], [decode])
    async with router.get("/admin/instances") as response:
        assert response.status == 404
    path = tmp_path / "admin.key"
    path.write_text("secret")
    path.chmod(0o600)
    router = await start_router([prefill], [decode], admin_key_file=str(path))
    async with router.get("/admin/instances") as response:
        assert response.status == 401
    async with router.get("/admin/instances", headers=bearer("secret")) as response:
        urls = [one["url"] for one in (await response.json())["instances"]]
    assert sorted(urls) == sorted([prefill.url, decode.url])


async def test_instances_of_a_file_are_served_too(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    path = tmp_path / "instances.yaml"
    path.write_text(
        f"instances:\n- {{url: '{prefill.url}', role: prefill}}\n"
        f"- {{url: '{decode.url}', role: decode}}\n"
    )
    router = await start_router([], [], instances_file=str(path))
    async with router.get("/ready") as response:
        assert response.status == 200
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.headers["X-VLLM-PD-Path"] == "disaggregated"
