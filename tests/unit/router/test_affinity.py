from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from vllm_pd.router.affinity import (
    DIGEST_TOKENS,
    NO_MATCHES,
    AffinityIndex,
    Prompt,
    read_prompt,
    session_of,
)

SHORTEST = DIGEST_TOKENS[0]
LONG = "The quick brown fox. " * 1000  # 5,250 tokens

JSON = st.recursive(
    st.sampled_from([None, False, True, -1, 0, 1, 5, 2**70, 1.5, math.inf, "", "a", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "content"]), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = ["prompt", "messages", "input", "tools", "n", "model", "user", "session_id", "documents"]


def ids(num_tokens: int, *, start: int = 0) -> list[int]:
    return list(range(start, start + num_tokens))


def chat(*contents: object, **fields: object) -> Prompt:
    messages = [{"role": "user", "content": content} for content in contents]
    return read_prompt({"messages": messages, **fields})


def shared(one: Prompt, other: Prompt) -> int:
    index = AffinityIndex()
    index.note(one, "a")
    return index.matches(other).cached.get("a", 0)


# Length


@pytest.mark.parametrize("fields", [{"n": 2**63}, {"n": 2**19, "prompt": ["a"] * 100}])
def test_whatever_a_client_asks_for_its_sequences_stay_countable(fields: dict[str, Any]) -> None:
    assert read_prompt({"prompt": "a"} | fields).num_sequences == 2**20


def test_a_prompt_of_token_ids_has_its_exact_length() -> None:
    assert read_prompt({"prompt": ids(777)}).num_tokens == 777


def test_four_bytes_of_text_are_estimated_as_a_token() -> None:
    assert read_prompt({"prompt": "abcd" * 100}).num_tokens == 100


def test_text_that_is_not_ascii_counts_by_its_bytes() -> None:
    assert read_prompt({"prompt": "你好世界" * 100}).num_tokens == 300


def test_a_long_text_that_is_not_ascii_is_estimated_by_its_beginning() -> None:
    assert read_prompt({"prompt": "你好世界" * 100_000}).num_tokens == 300_000


@pytest.mark.parametrize("prompt", [["ab" * 100, "cd" * 100], [ids(60), ids(40)]])
def test_the_prompts_of_a_batch_are_summed(prompt: object) -> None:
    assert read_prompt({"prompt": prompt}).num_tokens == 100


def test_all_messages_of_a_chat_count() -> None:
    assert chat("a" * 4000, "b" * 4000).num_tokens == pytest.approx(2000, rel=0.01)


def test_tools_and_instructions_count_as_they_become_part_of_the_prompt() -> None:
    body = {"instructions": "a" * 4000, "tools": [{"description": "b" * 4000}], "input": "hello"}

    assert read_prompt(body).num_tokens == pytest.approx(2000, rel=0.01)


def test_an_image_counts_the_same_however_long_its_data_is() -> None:
    short, long = (
        chat([{"type": "image_url", "image_url": {"url": f"data:{'A' * num_bytes}"}}])
        for num_bytes in (100, 1_000_000)
    )

    assert short.num_tokens == long.num_tokens > 1000


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": None}, {"prompt": []}])
def test_a_prompt_that_says_nothing_still_counts_as_a_token(body: dict[str, Any]) -> None:
    assert read_prompt(body).num_tokens == 1


def test_fields_that_are_no_part_of_the_prompt_do_not_count() -> None:
    body = {"prompt": "abcd", "stop": "x" * 4000, "user": "y" * 4000}

    assert read_prompt(body).num_tokens == 1


@pytest.mark.parametrize(
    ("body", "num_sequences"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ids(5)}, 1),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": [[1], [2]], "n": 2}, 4),
        ({"messages": [], "n": 5}, 5),
        ({"prompt": "a", "n": 0}, 1),
        ({"prompt": "a", "n": "many"}, 1),
        ({"prompt": []}, 1),
    ],
)
def test_the_sequences_of_a_request_are_its_prompts_times_its_choices(
    body: dict[str, Any], num_sequences: int
) -> None:
    assert read_prompt(body).num_sequences == num_sequences


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_every_json_body_has_a_prompt_of_at_least_one_token(body: dict[str, Any]) -> None:
    prompt = read_prompt(body, session=session_of({}, body))

    assert prompt.num_tokens >= 1
    assert prompt.num_sequences >= 1


def test_of_a_prompt_of_very_many_parts_only_the_first_ones_count() -> None:
    assert 5000 < chat(*["abcd"] * 100_000).num_tokens < 20_000


@pytest.mark.parametrize("char", ["\ud800", "é\udfff"])
def test_lone_surrogates_are_read(char: str) -> None:
    assert read_prompt({"prompt": char * 4000, "model": char}, session=char).prefix


def test_a_body_nested_deeper_than_the_stack_is_read() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]

    assert read_prompt({"messages": nested}).num_tokens == 1


@pytest.mark.parametrize("bad", [1.5, "a", None, 2**40, -(2**40)])
def test_token_ids_that_are_none_have_no_digests(bad: object) -> None:
    assert read_prompt({"prompt": [*ids(2 * SHORTEST), bad]}).prefix == ()


# Beginnings


def test_a_prompt_shares_all_digested_tokens_with_itself() -> None:
    prompt = read_prompt({"prompt": ids(1000)})

    assert shared(prompt, prompt) == max(tokens for tokens in DIGEST_TOKENS if tokens <= 1000)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_what_two_prompts_share_is_never_overrated_and_underrated_by_one_step_at_most(
    num_shared: int, num_own: int
) -> None:
    start = ids(num_shared)
    one = read_prompt({"prompt": [*start, 10_000, *ids(num_own, start=20_000)]})
    other = read_prompt({"prompt": [*start, 10_001, *ids(num_own, start=20_000)]})

    step = max(SHORTEST, num_shared // 8)
    assert num_shared - step <= shared(one, other) <= num_shared


def test_of_a_very_long_prompt_only_the_beginning_has_digests() -> None:
    prompt = read_prompt({"prompt": "abcd" * 200_000})

    assert prompt.num_tokens == 200_000
    assert shared(prompt, prompt) == DIGEST_TOKENS[-1]


def test_the_next_turn_of_a_chat_begins_with_the_last_one() -> None:
    first = chat(LONG)
    second = chat(LONG, "an answer", "the next question")

    assert shared(first, second) == shared(first, first) > 4000


def test_chats_with_different_system_prompts_share_nothing() -> None:
    assert shared(chat("You are A", LONG), chat("You are B", LONG)) == 0


@pytest.mark.parametrize("field", ["model", "cache_salt", "chat_template"])
def test_prompts_whose_kv_cache_differs_share_nothing(field: str) -> None:
    assert shared(chat(LONG, **{field: "a"}), chat(LONG, **{field: "b"})) == 0


def test_fields_that_do_not_change_the_prompt_do_not_matter() -> None:
    one, other = chat(LONG, temperature=0.0, max_tokens=5), chat(LONG, stream=True)

    assert shared(one, other) == shared(one, one)


def test_different_images_share_nothing_after_them() -> None:
    one, other = (
        chat([{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": LONG}])
        for name in ("http://a", "http://b")
    )

    assert shared(one, other) == 0


def test_a_batch_of_prompts_has_no_beginning() -> None:
    assert read_prompt({"prompt": [LONG, LONG]}).prefix == ()


# Sessions


@pytest.mark.parametrize(
    ("headers", "body", "session"),
    [
        ({}, {}, None),
        ({"x-session-id": "h"}, {"session_id": "s"}, "h"),
        ({}, {"session_id": "s", "prompt_cache_key": "k", "user": "u"}, "s"),
        ({}, {"prompt_cache_key": "k", "user": "u"}, "k"),
        ({}, {"user": "u"}, "u"),
        ({"x-session-id": ""}, {"session_id": 7, "prompt_cache_key": None, "user": "u"}, "u"),
        ({}, {"user": ["u"]}, None),
    ],
)
def test_a_session_is_named_by_the_header_or_by_the_body(
    headers: dict[str, str], body: dict[str, Any], session: str | None
) -> None:
    assert session_of(CIMultiDict(headers), body) == session


def test_a_session_gives_credit_for_its_last_prompt_but_says_nothing_of_the_cache() -> None:
    index = AffinityIndex()
    index.note(read_prompt({"prompt": ids(100)}, session="s"), "a")

    matches = index.matches(read_prompt({"prompt": ids(150, start=7)}, session="s"))

    assert (matches.cached, matches.credit) == ({}, {"a": 100})


def test_a_session_gives_no_more_credit_than_the_prompt_has_tokens() -> None:
    index = AffinityIndex()
    index.note(read_prompt({"prompt": ids(100)}, session="s"), "a")

    assert index.matches(read_prompt({"prompt": ids(30)}, session="s")).credit == {"a": 30}


def test_another_session_gets_no_credit() -> None:
    index = AffinityIndex()
    index.note(read_prompt({"prompt": "a"}, session="s"), "a")

    assert index.matches(read_prompt({"prompt": "a"}, session="t")) == NO_MATCHES


def test_credit_is_the_greater_one_of_prompt_and_session() -> None:
    index = AffinityIndex()
    index.note(read_prompt({"prompt": ids(SHORTEST)}, session="s"), "a")

    matches = index.matches(read_prompt({"prompt": ids(SHORTEST)}, session="t"))

    assert matches.cached == matches.credit == {"a": SHORTEST}


# Memory


def test_each_instance_is_credited_with_what_it_has_seen_itself() -> None:
    index = AffinityIndex()
    index.note(read_prompt({"prompt": ids(SHORTEST)}), "a")
    index.note(read_prompt({"prompt": ids(2 * SHORTEST)}), "b")

    matches = index.matches(read_prompt({"prompt": ids(3 * SHORTEST)}))

    assert matches.cached == {"a": SHORTEST, "b": 2 * SHORTEST}


def test_an_instance_that_is_forgotten_has_seen_nothing() -> None:
    index = AffinityIndex()
    prompt = read_prompt({"prompt": ids(SHORTEST)}, session="s")
    index.note(prompt, "a")
    index.note(prompt, "b")

    index.forget("a")
    index.forget("never seen")

    assert list(index.matches(prompt).credit) == ["b"]


def test_the_prompts_that_were_not_used_for_longest_are_forgotten() -> None:
    index = AffinityIndex(max_entries=2)
    old, used, new = (read_prompt({"prompt": ids(SHORTEST, start=start)}) for start in (0, 1, 2))
    for prompt in (used, old, used, new):
        index.note(prompt, "a")

    assert [bool(index.matches(prompt).cached) for prompt in (old, used, new)] == [
        False,
        True,
        True,
    ]


def test_of_a_prompt_that_is_forgotten_in_part_the_beginning_stays() -> None:
    index = AffinityIndex(max_entries=2)
    prompt = read_prompt({"prompt": ids(3 * SHORTEST)})

    index.note(prompt, "a")

    assert index.matches(prompt).cached == {"a": 2 * SHORTEST}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), min_size=1))
def test_the_last_prompt_is_known_as_far_as_there_is_room(
    prompts: list[tuple[int, int, bool]],
) -> None:
    index = AffinityIndex(max_entries=5)
    for start, length, has_session in prompts:
        body = {"prompt": ids(length * SHORTEST, start=start)}
        prompt = read_prompt(body, session="s" if has_session else None)

        index.note(prompt, "a")

        assert index.matches(prompt).cached["a"] == min(length, 5) * SHORTEST
