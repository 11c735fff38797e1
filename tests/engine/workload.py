"""Requests whose answers are compared: made by seed, sent by an ordinary client."""

from __future__ import annotations

import asyncio
import json
import random
import re
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


@dataclass(frozen=True)
class Reply:
    """A whole response as a client sees it, a stream put together."""

    status: int
    path: str  # how the router served it; "" without a router
    payload: Any


async def exchange(session: aiohttp.ClientSession, url: str, name: str, case: Case) -> Reply:
    """Send one request, named on every leg, and take down all of its answer.

    Raises:
        AssertionError: a stream that does not end well.
    """
    headers = {"X-Request-Id": name}
    async with session.post(url + case.path, json=case.body, headers=headers) as response:
        path = response.headers.get("X-VLLM-PD-Path", "")
        if response.content_type != "text/event-stream":
            return Reply(response.status, path, json.loads(await response.text()))
        *events, rest = (await response.text()).split("\n\n")
        assert rest == "", "half an event at the end"
        if case.path == "/v1/responses":
            return Reply(response.status, path, _put_responses_together(events))
        assert events.pop() == "data: [DONE]"
        whole: dict[str, Any] = {}
        for event in events:
            _add(whole, json.loads(event.removeprefix("data: ")))
            _check_running_usage(whole)
        return Reply(response.status, path, whole)


def _put_responses_together(events: list[str]) -> dict[str, Any]:
    """Return the last response of a stream, its kinds of events, and its text from deltas."""
    payloads = [json.loads(event.split("\ndata: ", 1)[1]) for event in events]
    assert payloads[-1]["type"] == "response.completed"
    return {
        "kinds": list(dict.fromkeys(payload["type"] for payload in payloads)),
        "first": payloads[0]["response"],
        "last": payloads[-1]["response"],
        "delta": "".join(payload.get("delta") or "" for payload in payloads),
        "logprobs": [p for payload in payloads for p in payload.get("logprobs") or []],
    }


# How many tokens come in one event depends on the moment: only their sum can be compared.
_LAST_WINS = {"id", "object", "model", "role", "type", "name", "finish_reason", "stop_reason"}


def _add(whole: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if value is None:
            whole.setdefault(name, None)
        elif isinstance(value, dict):
            if not isinstance(whole.get(name), dict):
                whole[name] = {}
            _add(whole[name], value)
        elif isinstance(value, list):
            whole[name] = _added(whole.get(name) or [], value)
        elif isinstance(value, str) and name not in _LAST_WINS:
            whole[name] = (whole.get(name) or "") + value
        else:
            whole[name] = value


def _added(whole: list[Any], delta: list[Any]) -> list[Any]:
    """Choices and tool calls belong together by index; all other lists grow."""
    if not all(isinstance(item, dict) and "index" in item for item in delta):
        return whole + delta
    by_index = {item["index"]: item for item in whole}
    for item in delta:
        _add(by_index.setdefault(item["index"], {}), item)
    return [by_index[index] for index in sorted(by_index)]


def _check_running_usage(whole: dict[str, Any]) -> None:
    """Of a single choice whose token ids are there: usage counts them as they come."""
    choices = whole.get("choices") or []
    if "usage" in whole and len(choices) == 1 and choices[0].get("token_ids"):
        assert whole["usage"]["completion_tokens"] == len(choices[0]["token_ids"])


_TIMES = {"created", "created_at", "completed_at"}
# It has a hash of the engine's whole configuration: no two instances need have the same.
_LEFT_OUT = _TIMES | {"system_fingerprint"}
_RANDOM_ID = re.compile(r"\b([a-z]+(?:-tool)?)[-_][0-9a-f]{16,32}\b")

LOGPROB_TOLERANCE = 1e-3
"""The last token of a prompt is computed in another batch: rounding differs."""


def differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Return what differs between two answers, times and random ids apart."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            line
            for name in sorted((wanted.keys() | found.keys()) - _LEFT_OUT)
            for line in differences(
                wanted.get(name, "(nothing)"), found.get(name, "(nothing)"), f"{where}.{name}"
            )
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        return [
            line
            for i, pair in enumerate(zip(wanted, found, strict=True))
            for line in differences(*pair, f"{where}[{i}]")
        ]
    if isinstance(wanted, float) and isinstance(found, float):
        same = abs(wanted - found) <= LOGPROB_TOLERANCE
    elif isinstance(wanted, str) and isinstance(found, str):
        same = _RANDOM_ID.sub(r"\1", wanted) == _RANDOM_ID.sub(r"\1", found)
    else:
        same = type(wanted) is type(found) and wanted == found
    return [] if same else [f"{where}: {found!r} instead of {wanted!r}"]
