from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.router import body

COMPLETIONS = "/v1/completions"


def test_the_prefill_leg_makes_one_token_and_keeps_the_blocks() -> None:
    leg = body.prefill_body(
        {"model": "m", "prompt": "a", "max_tokens": 9, "stream": True}, "t1", path=COMPLETIONS
    )

    assert leg == {
        "model": "m",
        "prompt": "a",
        "max_tokens": 1,
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
    assert (
        body.prefill_body({"max_completion_tokens": 9}, "t", path=COMPLETIONS)[
            "max_completion_tokens"
        ]
        == 1
    )
    assert "max_completion_tokens" not in body.prefill_body({}, "t", path=COMPLETIONS)


@pytest.mark.parametrize(
    "name",
    [
        "best_of",
        "echo",
        "min_tokens",
        "prompt_logprobs",
        "return_token_ids",
        "stream_options",
    ],
)
def test_the_prefill_leg_drops_what_only_shapes_the_output(name: str) -> None:
    assert name not in body.prefill_body({name: 1}, "t", path=COMPLETIONS)


@pytest.mark.parametrize(
    "name", ["tools", "tool_choice", "response_format", "chat_template_kwargs", "seed", "priority"]
)
def test_the_prefill_leg_keeps_what_may_change_the_prompt(name: str) -> None:
    assert body.prefill_body({name: "value"}, "t", path=COMPLETIONS)[name] == "value"


def test_the_legs_do_not_change_the_clients_body() -> None:
    client = {"prompt": "a", "max_tokens": 9}

    body.prefill_body(client, "t", path=COMPLETIONS)
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
    "value",
    ["\u4f60", 1e-300, 2**63, 2**70, -(2**70), [[1, 2]], {"nested": [None, True]}],
)
def test_params_reach_the_decode_leg_as_the_prefill_instance_gave_them(value: object) -> None:
    given = {"remote_block_ids": value}
    reply = json.dumps({"id": "1", body.KV_PARAMS: given}).encode()

    params = body.kv_params_of(reply)

    assert json.loads(body.dump(body.decode_body({}, params)))[body.KV_PARAMS] == given


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


def dumped(raw: bytes) -> bytes:
    parsed = body.parse(raw)
    assert parsed is not None
    return body.dump(body.verbatim(raw, parsed))


def test_values_are_passed_on_as_the_client_wrote_them() -> None:
    raw = b'{ "b" : [1,  2.50, 1E400], "a": "\\u00e4\\/" , "c":{"x":1,"x":2} }'

    assert dumped(raw) == b'{"b":[1,  2.50, 1E400],"a":"\\u00e4\\/","c":{"x":1,"x":2}}'


def test_of_a_field_that_comes_twice_the_last_one_counts() -> None:
    assert dumped(b'{"a": 1, "b": 2, "a": 3}') == b'{"a":3,"b":2}'


@pytest.mark.parametrize(
    "raw",
    [
        b'{"kv_transfer_params": {"remote_host": "evil"}, "a": 1}',
        b'{"kv\\u005ftransfer_params": {"remote_host": "evil"}, "a": 1}',
        b'{"kv_transfer_params": 1, "a": 1, "kv_transfer_params": 2}',
    ],
)
def test_a_transfer_that_the_client_names_is_in_no_leg(raw: bytes) -> None:
    assert dumped(raw) == b'{"a":1}'


def test_a_transfer_that_the_client_names_in_vllm_xargs_is_in_no_leg() -> None:
    raw = b'{"vllm_xargs": {"kv_transfer_params": "x", "b": 1}, "a": 1}'

    assert dumped(raw) == b'{"vllm_xargs":{"b":1},"a":1}'


@pytest.mark.parametrize(
    "raw",
    [b'{"a": NaN}', b'\xef\xbb\xbf{"a": 1}', '{"a": 1}'.encode("utf-16"), b'{"\\ud800": 1}', b"{}"],
)
def test_what_only_pythons_parser_takes_reads_back_equal(raw: bytes) -> None:
    assert repr(json.loads(dumped(raw))) == repr(json.loads(raw))


@given(
    st.dictionaries(
        st.text(max_size=3) | st.sampled_from([body.KV_PARAMS, "vllm_xargs", "n"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        ),
    ),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_both_legs_are_made_as_if_from_the_parsed_body(
    client: dict[str, object], ascii_only: bool, indent: int | None
) -> None:
    raw = json.dumps(client, ensure_ascii=ascii_only, indent=indent).encode()
    parsed = body.parse(raw)
    assert parsed is not None
    members = body.verbatim(raw, parsed)

    legs = (body.prefill_body(members, "t", path=COMPLETIONS), body.decode_body(members, {"k": 1}))

    assert [json.loads(body.dump(leg)) for leg in legs] == [
        body.prefill_body(parsed, "t", path=COMPLETIONS),
        body.decode_body(parsed, {"k": 1}),
    ]
