from __future__ import annotations

import asyncio
import json
from unittest.mock import Mock

import pytest
from aiohttp import ClientError, web

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import FakeInstance, Streams, answers, completes
from vllm_pd.router.resources import POOL
from vllm_pd.router.sse import MAX_EVENT_LEN, SseReader

DONE = b"data: [DONE]\n\n"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
RESPONSE_BODY = {"model": "m", "input": "hi", "stream": True}
BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


async def test_a_stream_reaches_the_client_byte_for_byte(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    text = 'data: {"a": "\u00e4\u4f60"}\r\n\r\n: keep-alive\n\ndata: [DONE]\n\n'.encode()
    decode = await start_instance(Streams([text[i : i + 1] for i in range(len(text))]))
    router = await start_router([prefill], [decode])

    async with router.post(CHAT, json=BODY) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["X-VLLM-PD-Path"] == "disaggregated"
        assert await response.read() == text

    assert prefill.received[0].json["stream"] is False
    assert decode.received[0].json["stream"] is True


async def test_the_first_event_does_not_wait_for_the_next(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    streams = Streams([b"data: 1\n\ndata: half an ev"], wait=True, more=[b"ent\n\n" + DONE])
    decode = await start_instance(streams)
    router = await start_router([prefill], [decode])

    async with router.post(CHAT, json=BODY) as response:
        assert await response.content.readany() == b"data: 1\n\n"
        streams.go_on.set()
        assert await response.content.read() == b"data: half an event\n\n" + DONE


def event(name: str) -> bytes:
    return f'event: {name}\ndata: {{"type":"{name}"}}\n\n'.encode()


PRELUDE = [event("response.created"), event("response.in_progress")]
OUTPUT = [event("response.output_text.delta"), event("response.completed")]


async def test_another_instance_answers_if_one_dies_before_the_output_of_a_response(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    bad = await start_instance(Streams(PRELUDE, die=True))
    good = await start_instance(Streams([*PRELUDE, *OUTPUT]))
    router = await start_router([prefill], [bad, good])

    async with router.post(RESPONSES, json=RESPONSE_BODY) as response:
        assert await response.read() == b"".join([*PRELUDE, *OUTPUT])
    assert len(bad.received) == len(good.received) == 1


async def test_a_response_without_an_output_is_broken(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams(PRELUDE))
    router = await start_router([prefill], [decode])

    async with router.post(RESPONSES, json=RESPONSE_BODY) as response:
        assert response.status == 502


async def test_a_response_that_dies_after_its_first_output_is_not_repeated(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    bad = await start_instance(Streams([*PRELUDE, OUTPUT[0]], die=True))
    other = await start_instance(Streams([*PRELUDE, *OUTPUT]))
    router = await start_router([prefill], [bad, other])

    async with router.post(RESPONSES, json=RESPONSE_BODY) as response:
        text = await response.read()
    assert text.startswith(b"".join([*PRELUDE, OUTPUT[0]]))
    assert text.count(event("response.created")) == 1
    assert b'"code":502' in text.replace(b" ", b"")
    assert other.received == []


async def test_a_prelude_of_a_response_that_is_too_long_to_be_held_passes(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    long = b"event: response.created\ndata: " + b"x" * MAX_EVENT_LEN + b"\n\n"
    streams = Streams([long], wait=True, more=OUTPUT)
    decode = await start_instance(streams)
    router = await start_router([prefill], [decode])

    async with router.post(RESPONSES, json=RESPONSE_BODY) as response:
        await response.content.readexactly(MAX_EVENT_LEN)
        streams.go_on.set()
        assert (await response.content.read()).endswith(b"".join(OUTPUT))


async def test_a_client_that_takes_nothing_is_given_up(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:  # until the router closes the connection
            await response.write(b"data: " + b"x" * 2**16 + b"\n\n")

    decode = await start_instance(endless)
    router = await start_router([prefill], [decode], client_timeout_s=0.05)
    async with router.post(CHAT, json=BODY) as response:
        assert response.status == 200
        await decode.ended.wait()  # although nobody has read or left
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_takes_nothing_of_a_long_answer_is_given_up(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(answers(200, {"text": "x" * 2**25}))
    router = await start_router([prefill], [decode], client_timeout_s=0.05)
    async with router.post(CHAT, json=BODY) as response:
        assert response.status == 200
        while any(one.in_flight for one in router.app[POOL]):  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.01)
        with pytest.raises(ClientError):
            await response.read()


async def test_a_long_answer_comes_whole(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    long = {"text": "x" * 1_000_001}
    decode = await start_instance(answers(200, long))
    router = await start_router([prefill], [decode])
    for _ in range(2):  # on one connection
        async with router.post(CHAT, json=BODY) as response:
            assert await response.json() == long


async def test_a_stream_that_ends_without_saying_so_ends_with_an_error_event(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([b"data: 1\n\n"]))
    router = await start_router([prefill], [decode])

    async with router.post(CHAT, json=BODY) as response:
        stream = await response.read()
    first, error = [event for event in stream.split(b"\n\n") if event]
    assert first == b"data: 1"
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502


async def test_a_decode_instance_that_dies_mid_stream_ends_it_with_an_error_event(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([b'data: {"a": 1}\n\n', b'data: {"b"'], die=True))
    other = await start_instance(completes)
    router = await start_router([prefill], [decode, other])

    async with router.post(CHAT, json=BODY) as response:
        stream = await response.read()
    async with router.get("/metrics") as response:
        metrics = await response.text()

    *before, error = [event for event in stream.split(b"\n\n") if event]
    assert before == [b'data: {"a": 1}']  # and no half event
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502
    assert other.received == []
    assert f'code="502",endpoint="{CHAT}",path="disaggregated"' in metrics


async def test_a_decode_instance_that_falls_silent_ends_the_stream_with_an_error_event(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([b"data: 1\n\n"], wait=True))
    router = await start_router([prefill], [decode], decode_idle_timeout_s=0.05)

    async with router.post(CHAT, json=BODY) as response:
        stream = await response.read()

    assert json.loads(stream.split(b"data: ")[-1])["error"]["code"] == 504
    await decode.cancelled.wait()


async def test_a_stream_that_dies_before_its_first_byte_moves_to_another_instance(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    bad = await start_instance(Streams([], die=True))
    good = await start_instance(Streams([b"data: 1\n\n", DONE]))
    router = await start_router([prefill], [bad, good])

    async with router.post(CHAT, json=BODY) as response:
        assert await response.read() == b"data: 1\n\n" + DONE

    assert len(bad.received) == len(good.received) == 1


async def test_an_empty_stream_is_no_success(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([]))
    router = await start_router([prefill], [decode])

    async with router.post(CHAT, json=BODY) as response:
        assert response.status == 502


async def test_a_client_that_leaves_ends_the_stream(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([b"data: 1\n\n"], wait=True))
    router = await start_router([prefill], [decode])

    async with router.post(CHAT, json=BODY) as response:
        await response.content.readany()
        response.close()

    await decode.cancelled.wait()


async def test_a_bug_in_the_middle_of_a_stream_ends_it_with_an_error_event(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = await start_instance(Streams([b"data: 1\n\n", DONE]))
    router = await start_router([prefill], [decode])
    monkeypatch.setattr(SseReader, "feed", Mock(side_effect=RuntimeError("bug")))

    async with router.post(CHAT, json=BODY) as response:
        stream = await response.read()

    assert json.loads(stream.strip().removeprefix(b"data: "))["error"]["code"] == 500
    monkeypatch.undo()
    async with router.post(CHAT, json=BODY) as response:
        assert await response.read() == b"data: 1\n\n" + DONE
