from __future__ import annotations

import json

import pytest

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.router import body


def test_the_prefill_leg_makes_one_token_and_keeps_the_blocks() -> None:
    leg = body.prefill_body({"model": "m", "prompt": "a", "max_tokens": 9, "stream": True}, "t1")

    assert leg == {
        "model": "m",
        "prompt": "a",
        "max_tokens": 1,
        "n": 1,
        "stream": False,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
            "transfer_id": "t1",
        },
    }


def test_the_prefill_leg_overrides_max_completion_tokens_only_if_the_client_sent_it() -> None:
    assert body.prefill_body({"max_completion_tokens": 9}, "t")["max_completion_tokens"] == 1
    assert "max_completion_tokens" not in body.prefill_body({}, "t")


@pytest.mark.parametrize(
    "name",
    [
        "best_of",
        "echo",
        "logprob_token_ids",
        "logprobs",
        "min_tokens",
        "prompt_logprobs",
        "return_token_ids",
        "stream_options",
        "top_logprobs",
    ],
)
def test_the_prefill_leg_drops_what_only_shapes_the_output(name: str) -> None:
    assert name not in body.prefill_body({name: 1}, "t")


@pytest.mark.parametrize(
    "name", ["tools", "tool_choice", "response_format", "chat_template_kwargs", "seed", "priority"]
)
def test_the_prefill_leg_keeps_what_may_change_the_prompt(name: str) -> None:
    assert body.prefill_body({name: "value"}, "t")[name] == "value"


def test_the_legs_do_not_change_the_clients_body() -> None:
    client = {"prompt": "a", "max_tokens": 9}

    body.prefill_body(client, "t")
    body.decode_body(client, {"k": 1})

    assert client == {"prompt": "a", "max_tokens": 9}


def test_the_decode_leg_is_the_clients_body_plus_the_params() -> None:
    assert body.decode_body({"a": 1}, {"k": 2}) == {"a": 1, "kv_transfer_params": {"k": 2}}
    assert body.decode_body({"a": 1}, None) == {"a": 1}


def test_clients_cannot_name_a_transfer() -> None:
    raw = b'{"kv_transfer_params": {"remote_host": "evil"}, "prompt": "a"}'

    assert body.parse(raw) == {"prompt": "a"}


def test_clients_cannot_name_a_transfer_through_vllm_xargs() -> None:
    raw = b'{"vllm_xargs": {"kv_transfer_params": "x", "other": 1}}'

    assert body.parse(raw) == {"vllm_xargs": {"other": 1}}


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"a"', b"null", b"\xff\xfe\xfd"])
def test_what_is_no_json_object_is_not_parsed(raw: bytes) -> None:
    assert body.parse(raw) is None


def test_json_nested_too_deeply_blames_the_client() -> None:
    with pytest.raises(RemoteProtocolError):
        body.parse(b'{"a":' + b"[" * 200_000)


@pytest.mark.parametrize(
    "value",
    ["\u4f60\u597d", "\ud83d", 1e-300, 2**70, float("inf"), {"nested": [None, True]}],
)
def test_a_dumped_value_reads_back_equal(value: object) -> None:
    assert json.loads(body.dump({"prompt": value})) == {"prompt": value}


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"kv_transfer_params": null}',
        b'{"kv_transfer_params": {}}',
        b'{"kv_transfer_params": [1]}',
    ],
)
def test_an_answer_without_params_has_none(reply: bytes) -> None:
    assert body.kv_params_of(reply) is None
