from __future__ import annotations

from typing import Any

import pytest

from vllm_pd.config import Role
from vllm_pd.router.policy import (
    InstanceView,
    pick_round_robin,
    should_disaggregate,
)


def views(*urls: str, down: tuple[str, ...] = ()) -> list[InstanceView]:
    return [InstanceView(Role.PREFILL, url, url not in down, 0) for url in urls]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a"},
        {"prompt": [1, 2, 3]},
        {"prompt": ["only one"]},
        {"prompt": [[1, 2]]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
        {"prompt": "a", "max_tokens": None, "n": None, "stream": None, "logprobs": None},
        {"prompt": "a", "max_tokens": 5, "min_tokens": 5, "n": 1, "best_of": 1},
        {"messages": [], "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 3},
        {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": "a", "echo": False, "use_beam_search": False, "truncate_prompt_tokens": 4},
    ],
)
def test_a_request_for_one_output_of_one_prompt_is_disaggregated(body: dict[str, Any]) -> None:
    assert should_disaggregate(body) == (True, "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": ["a", "b"]}, "several_prompts"),
        ({"prompt": [[1], [2]]}, "several_prompts"),
        ({"prompt": "a", "n": 2}, "several_choices"),
        ({"prompt": "a", "n": 0}, "several_choices"),
        ({"prompt": "a", "best_of": 2}, "several_choices"),
        ({"prompt": "a", "use_beam_search": True}, "beam_search"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "a", "truncate_prompt_tokens": -1}, "truncation"),
    ],
)
def test_what_a_prefill_leg_cannot_serve_identically_stays_on_the_decode_instance(
    body: dict[str, Any], reason: str
) -> None:
    assert should_disaggregate(body) == (False, reason)


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": "5"},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_completion_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": None},
        {"min_tokens": 3, "max_tokens": 2},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"stream_options": 7, "stream": True},
        {"echo": "yes"},
        {"logprobs": "many"},
        {"top_logprobs": 1.5},
        {"logprob_token_ids": 5},
        {"return_token_ids": 5},
    ],
)
def test_values_that_vllm_may_refuse_reach_the_decode_instance_unprefilled(
    field: dict[str, Any],
) -> None:
    assert should_disaggregate({"prompt": "a", **field}) == (False, "unusual_value")


def test_round_robin_gives_every_instance_the_same_share() -> None:
    snapshot = views("a", "b", "c")

    picked = [pick_round_robin(snapshot, turn=turn) for turn in range(6)]

    assert [view.base_url for view in picked if view] == ["a", "b", "c", "a", "b", "c"]


def test_the_share_of_an_unhealthy_instance_is_spread_over_the_others() -> None:
    snapshot = views("a", "b", "c", down=("b",))

    picked = [pick_round_robin(snapshot, turn=turn) for turn in range(4)]

    assert [view.base_url for view in picked if view] == ["a", "c", "a", "c"]


def test_an_instance_that_failed_the_request_is_not_picked_again() -> None:
    view = pick_round_robin(views("a", "b"), turn=0, tried={"a"})

    assert view is not None
    assert view.base_url == "b"


def test_nothing_is_picked_when_every_instance_was_tried_or_is_down() -> None:
    assert pick_round_robin(views("a", "b", down=("b",)), turn=0, tried={"a"}) is None
