"""Everything a client can ask for: through the router, the answer of a colocated vLLM.

Whole responses are compared, not only texts. The requests come one by one and in the
same order on both sides, so that the prefix caches of the colocated instance and of the
prefill instance hold the same, and ``cached_tokens`` can be compared.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.engine.deployment import ENGINE_ARGS, Deployment, deployed, metric, served
from tests.engine.workload import TEXT, VOCAB, Case, Reply, differences, exchange

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ARGS = ["--enable-prompt-tokens-details", "--enable-auto-tool-choice"]
ARGS += ["--tool-call-parser", "hermes", "--sse-keep-alive-interval", "5"]

END_OF_SEQUENCE = "2"
BYTES_OF_AN_EMOJI = [175, 256, 249, 225]
LETTERS = [*range(67, 77)]  # "a" to "j"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cache", "block"]}, "hit": {"type": "boolean"}},
    "required": ["kind", "hit"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "lookup", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}]
SAMPLED = {"temperature": 0.9, "seed": 11, "top_p": 0.95, "top_k": 50}
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
RUNNING: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}


class _Prompts:
    """Prompts that share no prefix, so that what is cached does not depend on the path."""

    def __init__(self) -> None:
        self._rng = random.Random(3)

    def tokens(self, count: int = 300) -> list[int]:
        return self._rng.choices(VOCAB, k=count)

    def text(self) -> str:
        return f"{self._rng.random()}: {TEXT}{TEXT}"


def _completion(prompt: Any, **options: Any) -> Case:
    body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    return Case("/v1/completions", body | {"return_token_ids": True} | options)


def _chat(text: str, **options: Any) -> Case:
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "naïve 你好 😀?"}]
    body = {"model": "m", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    return Case("/v1/chat/completions", body | {"return_token_ids": True} | options)


def _response(prompt: str, **options: Any) -> Case:
    body = {"model": "m", "input": prompt, "max_output_tokens": 12, "temperature": 0}
    return Case("/v1/responses", body | options)


def _completions_disaggregated(prompts: _Prompts) -> dict[str, Case]:
    """Completions that are prefilled elsewhere."""
    tokens, cached = prompts.tokens, prompts.tokens(700)
    options: dict[str, dict[str, Any]] = {
        "token ids": {},
        "token ids, streamed": {"stream": True},
        "usage": STREAM,
        "running usage": RUNNING,
        "logprobs": {"logprobs": 3},
        "logprobs, streamed": {"logprobs": 3, **STREAM},
        "logprobs of the sampled token only": {"logprobs": 0},
        "logprobs of given tokens": {"logprobs": 1, "logprob_token_ids": [11, 70, 900]},
        "tokens as ids": {"logprobs": 2, "return_tokens_as_token_ids": True},
        "one token": {"max_tokens": 1, "logprobs": 2},
        "one token, streamed": {"max_tokens": 1, **STREAM},
        "seed": SAMPLED,
        "seed, streamed": {**SAMPLED, **STREAM},
        "penalties": {
            "max_tokens": 40,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.7,
            "frequency_penalty": 0.4,
        },
        "bias": {"logit_bias": {"70": 4.5, "80": -9.0}, "bad_words": ["the"], "min_p": 0.1},
        "stop token": {"allowed_token_ids": LETTERS, "stop_token_ids": LETTERS[:5]},
        "stop token after min_tokens": {
            "allowed_token_ids": LETTERS,
            "stop_token_ids": LETTERS[:5],
            "min_tokens": 6,
        },
        "stop string": {"allowed_token_ids": LETTERS, "stop": ["a", "bc", "d"]},
        "stop string, streamed": {
            "allowed_token_ids": LETTERS,
            "stop": ["aa", "b", "j"],
            "include_stop_str_in_output": True,
            "min_tokens": 3,
            **STREAM,
        },
        "empty output": {"logit_bias": {END_OF_SEQUENCE: 100}},
        "empty output, streamed": {"logit_bias": {END_OF_SEQUENCE: 100}, **RUNNING},
        "ignore_eos": {"logit_bias": {END_OF_SEQUENCE: 100}, "ignore_eos": True},
        "min_tokens": {"logit_bias": {END_OF_SEQUENCE: 100}, "min_tokens": 4},
        "split characters": {"allowed_token_ids": BYTES_OF_AN_EMOJI, **SAMPLED, "max_tokens": 60},
        "split characters, streamed": {
            "allowed_token_ids": BYTES_OF_AN_EMOJI,
            "logprobs": 1,
            "max_tokens": 60,
            **SAMPLED,
            **RUNNING,
        },
        "guided JSON": {"response_format": JSON_SCHEMA, "max_tokens": 60},
        "guided JSON, streamed": {"response_format": JSON_SCHEMA, "max_tokens": 60, **STREAM},
        "guided by a regular expression": {"structured_outputs": {"regex": "[a-f]{7}[0-9]"}},
        "guided choice": {"structured_outputs": {"choice": ["prefill", "decode"]}},
        "best_of, which vLLM has dropped": {"best_of": 1},
        "truncated prompt": {"truncate_prompt_tokens": 150},
        "stream interval": {"stream_interval": 5, "max_tokens": 23, **STREAM},
        "cache salt": {"cache_salt": "pepper"},
        "extra arguments": {"vllm_xargs": {"anything": 1}},
        "very long output": {"max_tokens": 1000, "ignore_eos": True, **RUNNING},
    }
    cases = {name: _completion(tokens(), **more) for name, more in options.items()}
    return cases | {
        "text": _completion(prompts.text()),
        "text, streamed": _completion(prompts.text(), **STREAM),
        "one prompt in a list": _completion([prompts.text()]),
        "one token as prompt": _completion([77]),
        "long prompt": _completion(tokens(2600), logprobs=1),
        "nothing cached": _completion(cached),
        "all cached": _completion(cached),
        "all cached, streamed": _completion(cached, **RUNNING),
        "prefix cached": _completion(cached[:500] + tokens(90), **STREAM),
    }


def _chats_disaggregated(prompts: _Prompts) -> dict[str, Case]:
    """Chat completions that are prefilled elsewhere."""
    named = {"type": "function", "function": {"name": "look_up"}}
    cached = prompts.text()
    options: dict[str, dict[str, Any]] = {
        "chat": {},
        "chat, streamed": {"stream": True},
        "chat, usage": STREAM,
        "chat, running usage": RUNNING,
        "chat, logprobs": {"logprobs": True, "top_logprobs": 3},
        "chat, logprobs, streamed": {"logprobs": True, "top_logprobs": 3, **STREAM},
        "chat, one token": {"max_completion_tokens": 1, "logprobs": True},
        "chat, one token of max_tokens": {"max_completion_tokens": None, "max_tokens": 1},
        "chat, seed, streamed": {**SAMPLED, **RUNNING},
        "chat, empty output": {"logit_bias": {END_OF_SEQUENCE: 100}},
        "chat, no limit": {
            "max_completion_tokens": None,
            "logit_bias": {END_OF_SEQUENCE: 100},
            **STREAM,
        },
        "chat, split characters, streamed": {
            "allowed_token_ids": BYTES_OF_AN_EMOJI,
            "logprobs": True,
            **SAMPLED,
            **STREAM,
        },
        "chat, guided JSON": {"response_format": JSON_SCHEMA, "max_completion_tokens": 60},
        "chat, any JSON": {"response_format": {"type": "json_object"}},
        "chat, tools": {"tools": TOOLS},
        "chat, named tool": {"tools": TOOLS, "tool_choice": named, "max_completion_tokens": 90},
        "chat, named tool, streamed": {
            "tools": TOOLS,
            "tool_choice": named,
            "max_completion_tokens": 90,
            **STREAM,
        },
        "chat, required tool": {
            "tools": TOOLS,
            "tool_choice": "required",
            "max_completion_tokens": 90,
        },
        "chat, prompt text": {"return_prompt_text": True},
    }
    cases = {name: _chat(prompts.text(), **more) for name, more in options.items()}
    unfinished = [
        {"role": "user", "content": [{"type": "text", "text": prompts.text()}]},
        {"role": "assistant", "content": "Once"},
    ]
    go_on = {"messages": unfinished, "add_generation_prompt": False, "continue_final_message": True}
    return cases | {
        "chat, unfinished message": _chat("", **go_on),
        "chat, nothing cached": _chat(cached * 3),
        "chat, all cached": _chat(cached * 3),
        "chat, all cached, streamed": _chat(cached * 3, **STREAM),
    }


def _responses_disaggregated(prompts: _Prompts) -> dict[str, Case]:
    """Responses that are prefilled elsewhere."""
    cached = prompts.text()
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    text = {"format": {"type": "json_schema", "name": "lookup", "schema": SCHEMA}}
    function = {"type": "function", "name": "kv_transfer_params", "parameters": SCHEMA}
    return {
        "response": _response(prompts.text()),
        "response, streamed": _response(prompts.text(), stream=True),
        "response, one token": _response(prompts.text(), max_output_tokens=1),
        "response, logprobs": _response(prompts.text(), **logprobs),
        "response, logprobs, streamed": _response(prompts.text(), stream=True, **logprobs),
        "response, guided JSON": _response(prompts.text(), text=text, max_output_tokens=60),
        "response, function": _response(prompts.text(), tools=[function], stream=True),
        "response, instructions": _response("hello", instructions=prompts.text()),
        "response, not stored": _response(prompts.text(), store=False),
        "response, nothing cached": _response(cached * 3),
        "response, all cached": _response(cached * 3),
        "response, all cached, streamed": _response(cached * 3, stream=True),
    }


def _on_one_instance(prompts: _Prompts) -> dict[str, Case]:
    """What a prefill leg cannot serve: one instance does it alone."""
    tokens, cached = prompts.tokens, prompts.tokens(700)
    last = [
        {"role": "user", "content": prompts.text()},
        {"role": "assistant", "content": "Once"},
    ]
    go_on = {"messages": last, "add_generation_prompt": False, "continue_final_message": True}
    return {
        "echo": _completion(prompts.text(), echo=True, return_token_ids=False),
        "echo, logprobs": _completion(tokens(), echo=True, logprobs=2),
        "echo, streamed": _completion(tokens(), echo=True, logprobs=2, **STREAM),
        "echo of the prompt alone": _completion(tokens(), echo=True, logprobs=1, max_tokens=0),
        "prompt_logprobs": _completion(tokens(), prompt_logprobs=2),
        "n": _completion(tokens(), n=3, **SAMPLED),
        "n, streamed": _completion(tokens(), n=3, logprobs=2, **SAMPLED, **RUNNING),
        "best_of": _completion(tokens(), best_of=2),
        "beam search": _completion(tokens(), n=2, use_beam_search=True),
        "batch of texts": _completion([prompts.text(), "short", prompts.text()]),
        "batch of token ids, streamed": _completion([tokens(), tokens(40)], **RUNNING),
        "batch, n": _completion([tokens(), tokens(90)], n=2, logprobs=1, **SAMPLED),
        "truncated to what is left": _completion(tokens(), truncate_prompt_tokens=-1),
        "one instance, nothing cached": _completion(cached, best_of=2),
        "one instance, all cached": _completion(cached, best_of=2),
        "chat, echo": _chat("", echo=True, **go_on),
        "chat, echo, streamed": _chat("", echo=True, **go_on, **STREAM),
        "chat, prompt_logprobs": _chat(prompts.text(), prompt_logprobs=1),
        "chat, n": _chat(prompts.text(), n=2, **SAMPLED),
        "chat, n, streamed": _chat(
            prompts.text(), n=3, logprobs=True, top_logprobs=1, **SAMPLED, **RUNNING
        ),
        "response, truncated": _response(prompts.text(), truncation="auto"),
        "response, unknown predecessor": _response("go on", previous_response_id="resp_1"),
        "response, background": _response(prompts.text(), background=True),
    }


def _refused(prompts: _Prompts) -> dict[str, Case]:
    """Bad requests, some of which a prefill leg would not find bad."""
    tokens = prompts.tokens
    return {
        "too many tokens for the model": _completion(tokens(), max_tokens=5000),
        "chat, too many tokens": _chat(prompts.text(), max_completion_tokens=5000),
        "too many logprobs": _completion(tokens(), logprobs=1000),
        "top_logprobs without logprobs": _chat(prompts.text(), top_logprobs=2),
        "chat, logprobs as a number": _chat(prompts.text(), logprobs=5),
        "given tokens without logprobs": _completion(tokens(), logprob_token_ids=[5]),
        "bad stream options": _completion(
            tokens(), stream=True, stream_options={"include_usage": "perhaps"}
        ),
        "no choices": _completion(tokens(), n=0),
        "n is null": _completion(tokens(), n=None),
        "stream options without a stream": _completion(
            tokens(), stream_options={"include_usage": True}
        ),
        "prompt logprobs in a stream": _completion(tokens(), prompt_logprobs=1, stream=True),
        "bad grammar": _completion(tokens(), structured_outputs={"regex": "(("}),
        "tool choice without tools": _chat(prompts.text(), tool_choice="required"),
        "bad seed": _completion(tokens(), seed="x"),
        "temperature below zero": _completion(tokens(), temperature=-1),
        "min_tokens above max_tokens": _completion(tokens(), min_tokens=5, max_tokens=3),
        "token outside of the vocabulary": _completion([10**6] * 20),
        "empty prompt": _completion(""),
        "unknown model": _chat(prompts.text(), model="nope"),
        "response, no input": Case("/v1/responses", {"model": "m"}),
        "response, no tokens": _response(prompts.text(), max_output_tokens=0),
    }


PROMPTS = _Prompts()
DISAGGREGATED = (
    _completions_disaggregated(PROMPTS)
    | _chats_disaggregated(PROMPTS)
    | _responses_disaggregated(PROMPTS)
)
ON_ONE_INSTANCE = _on_one_instance(PROMPTS)
REFUSED = _refused(PROMPTS)
CASES = DISAGGREGATED | ON_ONE_INSTANCE | REFUSED
Replies = dict[str, Reply]


async def ask_in_order(url: str) -> Replies:
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        return {name: await exchange(session, url, name, case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def colocated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Replies:
    """How one plain vLLM answers."""
    with served(tmp_path_factory.mktemp("colocated"), model, args=ARGS) as url:
        return asyncio.run(ask_in_order(url))


@pytest.fixture(scope="module")
def deployment(
    model: Path,
    colocated: Replies,  # noqa: ARG001  # stopped by now: its core is wanted
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("run"), model, args=ENGINE_ARGS + ARGS) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def routed(deployment: Deployment) -> Replies:
    """How the router answers."""
    return asyncio.run(ask_in_order(deployment.router))


@pytest.mark.parametrize("name", list(CASES))
def test_the_answer_is_that_of_a_colocated_instance(
    colocated: Replies, routed: Replies, name: str
) -> None:
    wanted, found = colocated[name], routed[name]
    assert found.status == wanted.status, found.payload
    assert differences(wanted.payload, found.payload) == []


@pytest.mark.parametrize("name", list(DISAGGREGATED))
def test_the_prompt_is_prefilled_elsewhere(routed: Replies, name: str) -> None:
    assert (routed[name].status, routed[name].path) == (200, "disaggregated")


@pytest.mark.parametrize("name", list(ON_ONE_INSTANCE))
def test_one_instance_serves_what_cannot_be_disaggregated(routed: Replies, name: str) -> None:
    assert routed[name].path == "decode-only"


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_bad_request_is_refused(colocated: Replies, name: str) -> None:
    assert 400 <= colocated[name].status < 500


def test_cases_show_what_they_are_made_for(colocated: Replies) -> None:
    """An untrained model says anything: what a case waits for has to happen in it."""

    def usage(name: str) -> Any:
        return colocated[name].payload["usage"]

    def choice(name: str) -> Any:
        return colocated[name].payload["choices"][0]

    assert usage("nothing cached")["prompt_tokens_details"]["cached_tokens"] == 0
    for name in ("all cached", "all cached, streamed", "one instance, all cached"):
        assert usage(name)["prompt_tokens_details"]["cached_tokens"] >= 512, name
    assert 0 < usage("prefix cached")["prompt_tokens_details"]["cached_tokens"] < 512
    assert usage("response, all cached")["input_tokens_details"]["cached_tokens"] > 0
    for name in ("stop token", "stop string", "stop string, streamed"):
        assert choice(name)["stop_reason"] is not None, name
    for name in ("empty output", "empty output, streamed"):
        assert (choice(name)["text"], choice(name)["finish_reason"]) == ("", "stop"), name
    assert usage("very long output")["completion_tokens"] == 1000
    text = choice("split characters")["text"]
    assert "\N{REPLACEMENT CHARACTER}" in text
    assert max(text) > "\uffff", "no character of four bytes"
    assert choice("guided JSON")["text"].endswith("}")
    assert choice("chat, named tool")["message"]["tool_calls"]


@pytest.mark.usefixtures("routed")
def test_no_block_is_left_behind(deployment: Deployment) -> None:
    """Not even for the time of a lease, though some requests are refused by one leg only."""
    deployment.wait_until_no_block_is_used()
    (prefill,) = deployment.prefill
    assert metric(prefill, "vllm_pd:kv_leases_granted_total") >= len(DISAGGREGATED)
    assert metric(prefill, "vllm_pd:kv_leases_ended_total", reason="expired") == 0
