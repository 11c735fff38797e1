from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.router.usage import prompt_details_of, repaired

DETAILS = {"cached_tokens": 128, "created_cache_tokens": 256}


def dumped(answer: object) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def completion(**details: Any) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "choices": [{"text": "naïve 你好 {", "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 400,
            "total_tokens": 408,
            "completion_tokens": 8,
            "prompt_tokens_details": details,
        },
        "kv_transfer_params": None,
    }


def response(cached: int, written: int) -> dict[str, Any]:
    return {
        "tools": [{"parameters": {"properties": {"kv_transfer_params": {"type": "object"}}}}],
        "usage": {
            "input_tokens": 400,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": written,
                "input_tokens_per_turn": [],
            },
            "output_tokens_details": {"reasoning_tokens": 3},
        },
        "kv_transfer_params": None,
    }


def test_counts_of_the_prompt_become_those_of_the_prefill_instance() -> None:
    answer = completion(cached_tokens=399, created_cache_tokens=0, multimodal_tokens=None)

    found = repaired(dumped(answer), DETAILS)

    answer["usage"]["prompt_tokens_details"] |= DETAILS
    assert found == dumped(answer)


def test_counts_by_modality_stay() -> None:
    answer = completion(multimodal_tokens={"image": 5}, cached_tokens=399)

    found = json.loads(repaired(dumped(answer), DETAILS))["usage"]["prompt_tokens_details"]

    assert found == {"multimodal_tokens": {"image": 5}, "cached_tokens": 128}


def test_counts_of_responses_are_repaired_by_their_own_names() -> None:
    details = prompt_details_of(dumped(response(128, 256)))

    assert repaired(dumped(response(399, 0)), details) == dumped(response(128, 256))


def test_an_answer_without_details_gets_none() -> None:
    answer = completion()
    del answer["usage"]["prompt_tokens_details"]

    assert repaired(dumped(answer), DETAILS) == dumped(answer)


def test_details_that_are_null_stay_null() -> None:
    data = b'{"usage": {"prompt_tokens_details": null}}'

    assert repaired(data, DETAILS) == data


def test_a_count_that_the_prefill_instance_does_not_give_stays() -> None:
    data = dumped(completion(cached_tokens=399, created_cache_tokens=0))

    assert repaired(data, {}) == data


def test_text_of_the_model_is_never_taken_for_usage() -> None:
    text = dumped(completion(cached_tokens=399)["usage"]).decode()
    data = dumped({"choices": [{"text": text, "logprobs": {"tokens": ["prompt_tokens_details"]}}]})

    assert repaired(data, DETAILS) == data


@pytest.mark.parametrize("space", ["", " "])
def test_transfer_params_do_not_reach_the_client(space: str) -> None:
    params = {"remote_host": "10.0.0.1", "remote_block_ids": [[1, 2]], "é}": {"a": "}"}}
    data = f'{{"a":1,"kv_transfer_params":{space}{json.dumps(params)},"z":"é"}}'.encode()

    assert json.loads(repaired(data, {})) == {"a": 1, "kv_transfer_params": None, "z": "é"}


def test_params_that_are_null_stay_as_they_are() -> None:
    data = dumped(completion())

    assert repaired(data, {}) == data


def test_a_tools_parameter_of_that_name_stays() -> None:
    answer = response(1, 2) | {"kv_transfer_params": {"remote_host": "10.0.0.1"}}

    assert json.loads(repaired(dumped(answer), {})) == response(1, 2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'"kv_transfer_params"',
        b'{"kv_transfer_params": {"half": ',
        b'{"kv_transfer_params": ' + b'{"a":' * 100_000,
        b'{"prompt_tokens_details": {"cached_tokens": 3',
        b'{"prompt_tokens_details": {"cached_tokens": "many"}}',
    ],
)
def test_what_is_no_json_is_passed_on(data: bytes) -> None:
    assert repaired(data, DETAILS) == data


def test_a_prefill_answer_gives_its_counts() -> None:
    reply = dumped(completion(cached_tokens=128, created_cache_tokens=256, multimodal_tokens=None))

    assert prompt_details_of(reply) == DETAILS


@pytest.mark.parametrize("reply", [b"", b"{}", b'{"usage":{"prompt_tokens_details":null}}'])
def test_a_prefill_answer_without_counts_gives_none(reply: bytes) -> None:
    assert prompt_details_of(reply) == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), json_values)
def test_nothing_else_of_an_answer_changes(answer: dict[str, Any], params: object) -> None:
    answer |= completion(cached_tokens=1) | {"kv_transfer_params": {"params": params}}

    found = json.loads(repaired(json.dumps(answer).encode(), {"cached_tokens": 2}))

    assert found == answer | completion(cached_tokens=2)
