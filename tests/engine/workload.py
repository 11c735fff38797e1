"""Requests whose answers are compared: made by seed, sent by an ordinary client."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

VOCAB = range(10, 1900)
TEXT = (
    "Prefill computes the keys and values of a prompt; decode reads them once per token. "
    "The two stages want different machines, and a connector moves the cache between them. "
)


@dataclass(frozen=True)
class Case:
    """One request: path under the server's address and its body."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What must be equal, however the request was served."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int


def completion(prompt: Any, *, stream: bool, max_tokens: int = 16) -> Case:
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": stream}
    return Case("/v1/completions", _greedy(body))


def chat(text: str, *, stream: bool, max_tokens: int = 16) -> Case:
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "max_completion_tokens": max_tokens, "stream": stream}
    return Case("/v1/chat/completions", _greedy(body))


def _greedy(body: dict[str, Any]) -> dict[str, Any]:
    body |= {"model": "m", "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    return body


def equality_cases() -> list[Case]:
    """Prompts around every block boundary, repeated prefixes, text and chat, streamed or not."""
    rng = random.Random(7)
    lengths = [1, 2, 3, 64]
    for boundary in (32, 128, 256, 384, 512, 640, 1024, 1536, 2048):
        lengths += [boundary - 1, boundary, boundary + 1]
    lengths += [1000, 1500, 2500, 3000]
    prompts: list[Any] = [rng.choices(VOCAB, k=length) for length in lengths]
    shared = rng.choices(VOCAB, k=600)
    prompts += [shared + rng.choices(VOCAB, k=extra) for extra in (0, 1, 40, 168, 169, 400)]
    prompts += [prompts[20], shared, TEXT, TEXT * 8]
    cases = [completion(prompt, stream=i % 2 == 1) for i, prompt in enumerate(prompts)]
    for i, text in enumerate(["hello", TEXT, TEXT * 3, TEXT * 10, "naïve café 😀 " * 20, TEXT]):
        cases.append(chat(text, stream=i % 2 == 0))
    return cases


def load_cases(count: int) -> list[Case]:
    """Prompts of mixed length; every fifth repeats a prefix of another."""
    rng = random.Random(11)
    prompts: list[list[int]] = []
    for i in range(count):
        prompt = rng.choices(VOCAB, k=rng.choice((5, 40, 130, 260, 500, 900)))
        if i % 5 == 4:
            prompt = prompts[i // 2][:200] + prompt[:100]
        prompts.append(prompt)
    return [completion(p, stream=i % 3 == 0, max_tokens=8) for i, p in enumerate(prompts)]


async def ask(session: aiohttp.ClientSession, url: str, case: Case) -> Answer:
    """Send one request and collect its answer.

    Raises:
        AssertionError: the answer is an error, or a stream that does not end well.
    """
    async with session.post(url + case.path, json=case.body) as response:
        if not case.body["stream"]:
            payload = await response.json()
            assert response.status == 200, payload
            return _collect([payload])
        assert response.status == 200, await response.text()
        events = (await response.text()).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-3:]
        return _collect([json.loads(event.removeprefix("data: ")) for event in events[:-2]])


def _collect(payloads: list[dict[str, Any]]) -> Answer:
    text, finish_reason = "", ""
    token_ids: list[int] = []
    for payload in payloads:
        assert "error" not in payload, payload
        for choice in payload["choices"]:
            message = choice.get("message") or choice.get("delta") or choice
            text += message.get("text") or message.get("content") or ""
            token_ids += choice.get("token_ids") or []
            finish_reason = choice.get("finish_reason") or finish_reason
    usage = payloads[-1]["usage"]
    return Answer(
        text, tuple(token_ids), finish_reason, usage["prompt_tokens"], usage["completion_tokens"]
    )


async def ask_all(url: str, cases: Sequence[Case], *, concurrency: int) -> list[Answer]:
    """Send all requests, at most ``concurrency`` in flight, and return answers in order."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=300)

    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def one(case: Case) -> Answer:
            async with gate:
                return await ask(session, url, case)

        return list(await asyncio.gather(*(one(case) for case in cases)))
