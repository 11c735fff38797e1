from __future__ import annotations

import json
import math

import pytest

from vllm_pd.bench.workload import (
    CHUNK_LEN,
    SHAPES,
    Workload,
    cap_lengths,
    ideal_hit_rate,
    make_workload,
    shape_of,
    to_timed_trace,
)
from vllm_pd.errors import ConfigError


def made(name: str, *, count: int = 2000, rate: float = 4.0, seed: int = 1) -> Workload:
    return make_workload(name, shape_of(name), count=count, rate=rate, seed=seed)


def prompt_lens(workload: Workload) -> list[int]:
    return sorted(request.prompt_len for request in workload.requests)


def output_lens(workload: Workload) -> list[int]:
    return sorted(request.output_len for request in workload.requests)


@pytest.mark.parametrize("name", SHAPES)
def test_workload_is_the_same_for_the_same_seed_only(name: str) -> None:
    assert made(name, count=50) == made(name, count=50)
    assert made(name, count=50) != made(name, count=50, seed=2)


@pytest.mark.parametrize("name", SHAPES)
def test_every_prompt_has_just_the_chunks_that_it_needs(name: str) -> None:
    for request in made(name, count=200).requests:
        assert len(request.chunk_ids) == -(-request.prompt_len // CHUNK_LEN)
        assert request.output_len >= 1


def test_another_rate_asks_the_same_sooner() -> None:
    slow, fast = made("sharegpt", rate=1.0), made("sharegpt", rate=4.0)
    assert [r.chunk_ids for r in slow.requests] == [r.chunk_ids for r in fast.requests]
    assert slow.span_s == pytest.approx(4 * fast.span_s)


@pytest.mark.parametrize(
    ("name", "prompt_mean", "prompt_median", "output_mean"),
    [
        ("sharegpt", 235, 122, 214),
        ("azure-conversation", 1155, 1020, 211),
        ("azure-code", 2048, 1469, 28),
        ("mooncake-conversation", 12035, 6909, 343),
        ("mooncake-toolagent", 8596, 6500, 182),
    ],
)
def test_lengths_are_those_of_the_trace(
    name: str, prompt_mean: float, prompt_median: float, output_mean: float
) -> None:
    workload = made(name, count=20_000)
    prompts = prompt_lens(workload)
    assert sum(prompts) / len(prompts) == pytest.approx(prompt_mean, rel=0.12)
    assert prompts[len(prompts) // 2] == pytest.approx(prompt_median, rel=0.08)
    assert sum(output_lens(workload)) / 20_000 == pytest.approx(output_mean, rel=0.15)


def test_another_salt_asks_others_of_the_same_lengths_at_the_same_times() -> None:
    shape = shape_of("prefix-reuse")
    one, other = (
        make_workload("prefix-reuse", shape, count=50, rate=1.0, seed=1, salt=salt)
        for salt in ("a", "b")
    )
    assert prompt_lens(one) == prompt_lens(other)
    assert [r.arrival_s for r in one.requests] == [r.arrival_s for r in other.requests]
    ids = [{chunk for r in made.requests for chunk in r.chunk_ids} for made in (one, other)]
    assert not ids[0] & ids[1]
    assert ideal_hit_rate(one) == ideal_hit_rate(other)


def test_prompts_share_nothing_unless_told_to() -> None:
    assert ideal_hit_rate(made("azure-code")) == 0.0


@pytest.mark.parametrize(
    ("name", "rate"),
    [("mooncake-conversation", 0.37), ("mooncake-toolagent", 0.65), ("prefix-reuse", 0.75)],
)
def test_prompts_share_what_a_perfect_cache_would_find_in_the_trace(name: str, rate: float) -> None:
    assert ideal_hit_rate(made(name)) == pytest.approx(rate, abs=0.05)


def test_different_seeds_have_no_prefix_in_common() -> None:
    one, two = made("prefix-reuse", seed=1), made("prefix-reuse", seed=2)
    ids = [{chunk for r in w.requests for chunk in r.chunk_ids} for w in (one, two)]
    assert not ids[0] & ids[1]


def test_lengths_can_be_cut_to_what_a_model_takes() -> None:
    workload = cap_lengths(made("mooncake-conversation"), 4096)
    assert max(r.prompt_len + r.output_len for r in workload.requests) == 4096
    assert all(len(r.chunk_ids) == -(-r.prompt_len // CHUNK_LEN) for r in workload.requests)


def test_timed_trace_has_a_line_for_each_request_in_seconds() -> None:
    workload = made("balanced", count=3)
    lines = [json.loads(line) for line in to_timed_trace(workload).splitlines()]
    assert [line["input_length"] for line in lines] == [512] * 3
    assert [line["output_length"] for line in lines] == [64] * 3
    assert [line["timestamp"] for line in lines] == pytest.approx(
        [r.arrival_s for r in workload.requests], abs=1e-6
    )
    assert len(lines[0]["hash_ids"]) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"count": 0}, "none to measure"), ({"rate": 0.0}, "rate 0"), ({"seed": -1}, "seed")],
)
def test_workload_refuses_what_cannot_be_measured(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made("balanced", **changed)  # type: ignore[arg-type]


def test_unknown_workload_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="sharegpt"):
        shape_of("chat")


def test_all_at_once_is_a_workload_too() -> None:
    assert made("balanced", count=5, rate=math.inf).span_s == 0.0
