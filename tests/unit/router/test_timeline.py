"""Timelines of decode instances: asked for, read, kept from the client, counted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import KV_PARAMS, Client, FakeInstance, answers
from vllm_pd.router.timeline import Timeline, asking, timeline_of

OURS = {**KV_PARAMS, "remote_prompt_digest": "d"}
TOLD = {
    "timeline": {
        "total_s": 0.0125,
        "engine_queue_s": 0.25,
        "outcome": "ok",
        "num_bytes": 4096,
    }
}
BODY = {"model": "m", "prompt": "hi"}


def answer(**timeline: Any) -> bytes:
    told = {"timeline": TOLD["timeline"] | timeline}
    return json.dumps({"choices": [{"text": "a"}], "kv_transfer_params": told}).encode()


def test_a_decode_instance_of_ours_is_asked() -> None:
    assert asking(OURS, {}) == {**OURS, "timeline": True}


@pytest.mark.parametrize(
    ("params", "body"),
    [(None, {}), (KV_PARAMS, {}), (OURS, {"stream": True})],
    ids=["no hand-over", "another connector", "a stream, which cannot carry it"],
)
def test_others_are_not_asked(params: dict[str, Any] | None, body: dict[str, Any]) -> None:
    assert asking(params, body) == params


def test_the_timeline_is_read() -> None:
    assert timeline_of(answer()) == Timeline(handover_s=0.0125, queue_s=0.25)


def test_a_timeline_without_the_queue_is_read() -> None:
    assert timeline_of(answer(engine_queue_s=None)) == Timeline(handover_s=0.0125, queue_s=None)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'{"choices": [{"text": "\\"timeline\\""}], "kv_transfer_params": null}',
        b'{"kv_transfer_params": {"timeline": 1}}',
        b'{"kv_transfer_params": {"timeline": {"outcome": "ok"}}}',
        b'{"kv_transfer_params": {"timeline": ',
        answer(outcome="corrupt"),
        answer(total_s=-1.0),
        answer(total_s="1"),
        answer(total_s=True),
        answer(total_s=float("nan")),
    ],
)
def test_what_makes_no_sense_is_no_timeline(raw: bytes) -> None:
    assert timeline_of(raw) is None


async def metrics_of(router: Client) -> str:
    async with router.get("/metrics") as response:
        return await response.text()


async def test_the_hand_over_is_counted_and_kept_from_the_client(
    start_router: StartRouter, start_instance: StartInstance
) -> None:
    prefill = await start_instance(answers(200, {"kv_transfer_params": OURS}))
    decode = await start_instance(answers(200, {"choices": [], "kv_transfer_params": TOLD}))
    router = await start_router([prefill], [decode])

    async with router.post("/v1/completions", json=BODY) as response:
        assert await response.json() == {"choices": [], "kv_transfer_params": None}

    assert decode.received[0].json["kv_transfer_params"] == {**OURS, "timeline": True}
    text = await metrics_of(router)
    assert 'vllm_pd:router_kv_handover_seconds_bucket{le="0.025"} 1.0' in text
    assert 'vllm_pd:router_kv_handover_seconds_bucket{le="0.01"} 0.0' in text
    assert "vllm_pd:router_decode_queue_seconds_sum 0.25" in text


async def test_a_connector_without_a_timeline_is_not_asked_and_not_counted(
    router: Client, decode: FakeInstance
) -> None:
    async with router.post("/v1/completions", json=BODY) as response:
        assert response.status == 200
    assert decode.received[0].json["kv_transfer_params"] == KV_PARAMS
    assert "vllm_pd:router_kv_handover_seconds_count 0.0" in await metrics_of(router)


class PartByPart:
    """Streams a part whenever it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Semaphore(0)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in [b"{}"] * 4 + [b"[DONE]"]:
            await self.go_on.acquire()
            await response.write(b"data: " + event + b"\n\n")
        return response


async def test_the_pace_of_a_stream_is_counted_but_for_its_ends(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    stream = PartByPart()
    router = await start_router([prefill], [await start_instance(stream)])
    stream.go_on.release()
    async with router.post("/v1/completions", json={**BODY, "stream": True}) as response:
        while await response.content.readany():
            stream.go_on.release()
    text = await metrics_of(router)
    assert "vllm_pd:router_inter_token_seconds_count 2.0" in text
    assert 'vllm_pd:router_inter_token_seconds_bucket{le="10.0"} 2.0' in text
    assert "vllm_pd:router_decode_start_seconds_count 1.0" in text
