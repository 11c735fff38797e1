from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_pd.config import Role
from vllm_pd.router.record import Record

COMPLETION = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}
RESPONSE = {
    "input_tokens": 7,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 3,
    "output_tokens_details": {"reasoning_tokens": 1},
}


def record_of(*parts: bytes, prefill: bytes | None = None) -> Record:
    record = Record("r1")
    record.wanted = True
    if prefill is not None:
        record.note_prompt(prefill)
    for part in parts:
        record.passed(part)
    record.end()
    return record


def counts_of(record: Record) -> list[int | None]:
    return [record.prompt_tokens, record.cached_tokens, record.completion_tokens]


def reply(**members: Any) -> bytes:
    return json.dumps(members).encode()


@pytest.mark.parametrize("usage", [COMPLETION, RESPONSE])
def test_tokens_are_those_of_the_usage(usage: dict[str, Any]) -> None:
    assert counts_of(record_of(reply(text="hi", usage=usage))) == [7, 4, 3]


@pytest.mark.parametrize("text", ["usage", '"usage": {"prompt_tokens": 99}', "usage\\"])
def test_text_does_not_pass_for_usage(text: str) -> None:
    answer = reply(usage=COMPLETION, text=text, other=[text, {text: text}])
    assert counts_of(record_of(answer)) == [7, 4, 3]


def test_usage_may_be_cut_into_parts_of_a_stream() -> None:
    data = reply(usage=COMPLETION)
    parts = [data[:5], data[5:30], data[30:]]
    assert counts_of(record_of(b"before", *parts, b"\n\ndata: [DONE]\n\n")) == [7, 4, 3]


def test_the_last_usage_of_a_stream_counts() -> None:
    early = reply(usage=COMPLETION | {"completion_tokens": 1})
    assert counts_of(record_of(early, reply(usage=COMPLETION))) == [7, 4, 3]


def test_without_usage_nothing_is_known() -> None:
    assert counts_of(record_of(reply(text="hi"))) == [None, None, None]


def test_of_a_prefill_only_the_prompt_counts() -> None:
    assert counts_of(record_of(b"data", prefill=reply(usage=COMPLETION))) == [7, 4, None]


def test_the_answer_counts_before_the_prefill() -> None:
    prefill = reply(usage={"prompt_tokens": 1})
    assert counts_of(record_of(reply(usage=COMPLETION), prefill=prefill)) == [7, 4, 3]


def test_what_nobody_wants_is_not_kept() -> None:
    record = Record("r1")
    record.note_prompt(reply(usage=COMPLETION))
    record.passed(reply(usage=COMPLETION))
    record.end()
    assert counts_of(record) == [None, None, None]
    assert record.response_len == len(reply(usage=COMPLETION))


@pytest.mark.parametrize(
    ("legs", "num"),
    [
        ([], 0),
        ([Role.DECODE], 0),
        ([Role.PREFILL, Role.DECODE], 0),
        ([Role.PREFILL, Role.PREFILL, Role.DECODE], 1),
        ([Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE], 3),
    ],
)
def test_retries_are_the_legs_after_the_first_of_each_role(legs: list[Role], num: int) -> None:
    record = Record("r1")
    for number, role in enumerate(legs):
        record.leg(role, f"http://h:{number}", path="/v1/completions")
    assert record.num_retries == num
