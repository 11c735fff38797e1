from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from vllm_pd.config import RouterConfig, from_mapping
from vllm_pd.errors import ConfigError
from vllm_pd.router.affinity import NO_MATCHES, Matches
from vllm_pd.router.loads import Load, Scrape, Work
from vllm_pd.router.policy import (
    Decision,
    InstanceView,
    Pair,
    are_compatible,
    choose_decode,
    choose_pair,
    may_decode_early,
    may_prefill_locally,
    should_disaggregate,
    tokens_to_prefill,
    weigh,
)

IDLE = Scrape(Load(0, 0, 0.0), num_own=0)
FULL = Scrape(Load(0, 0, 0.99), num_own=0)

JSON = st.recursive(
    st.sampled_from([None, False, True, -1, 0, 1, 5, 2**70, 1.5, math.inf, "", "a", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *("prompt", "messages", "input", "max_tokens", "max_completion_tokens", "max_output_tokens"),
    *("min_tokens", "stream", "stream_options", "echo", "return_token_ids", "logprobs", "n"),
    *("top_logprobs", "logprob_token_ids", "prompt_logprobs", "best_of", "use_beam_search"),
    *("prompt_embeds", "truncate_prompt_tokens", "previous_response_id", "background"),
]

WORK = st.builds(Work, *(st.integers(0, 20_000) for _ in range(2)), st.integers(0, 50))
SCRAPES = st.none() | st.builds(
    Scrape,
    st.builds(Load, st.integers(0, 50), st.integers(0, 50), st.floats(0, 1)),
    st.integers(0, 50),
)


def instances(name: str, *, max_size: int = 6) -> st.SearchStrategy[list[InstanceView]]:
    anyone = st.builds(
        InstanceView,
        base_url=st.sampled_from([f"{name}{number}" for number in range(max_size)] + ["both"]),
        healthy=st.booleans(),
        accepting=st.booleans(),
        fingerprint=st.none() | st.sampled_from(["x", "y"]),
        outstanding=WORK,
        scrape=SCRAPES,
    )
    return st.lists(anyone, max_size=max_size, unique_by=lambda view: view.base_url)


PREFILL = instances("p")
DECODE = instances("d")
URLS = st.sampled_from([f"{kind}{number}" for kind in "pd" for number in range(6)] + ["both"])
TOKENS = st.dictionaries(URLS, st.integers(1, 50_000))
MATCHES = st.builds(Matches, TOKENS, TOKENS)
TRIED = st.sets(URLS)
SEEDS = st.integers(0, 1000).map(random.Random)


def views(*urls: str, down: tuple[str, ...] = ()) -> list[InstanceView]:
    return [InstanceView(url, url not in down) for url in urls]


def view(url: str, *, prefill_tokens: int = 0, kv_tokens: int = 0, **fields: Any) -> InstanceView:
    num_sequences = fields.pop("num_sequences", 0)
    work = Work(prefill_tokens, kv_tokens, num_sequences)
    return InstanceView(url, True, outstanding=work, **fields)


def foreign(num_sequences: int) -> Scrape:
    return Scrape(Load(num_sequences, 0, 0.0), num_own=0)


def pair(
    prefill: Sequence[InstanceView], decode: Sequence[InstanceView], **options: Any
) -> tuple[str, str] | None:
    found = choose_pair(prefill, decode, rng=random.Random(1), **options)
    return found and (found.prefill.base_url, found.decode.base_url)


def decoder(decode: Sequence[InstanceView], **options: Any) -> str | None:
    found = choose_decode(decode, rng=random.Random(1), **options)
    return found.base_url if found else None


def choose_prefill(prefill: Sequence[InstanceView], *, matches: Matches) -> InstanceView | None:
    found = choose_pair(prefill, [view("spare")], rng=random.Random(1), matches=matches)
    return found and found.prefill


def credit(**tokens: int) -> Matches:
    return Matches({}, tokens)


# Can it be disaggregated?


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a"},
        {"prompt": [1, 2, 3]},
        {"prompt": ["only one"]},
        {"prompt": [[1, 2]]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{}, {"type": "function"}]},
        {"prompt": "a", "max_tokens": None, "n": None, "stream": None, "logprobs": None},
        {"prompt": "a", "max_tokens": 5, "min_tokens": 5, "n": 1, "best_of": 1},
        {"messages": [], "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 3},
        {"input": "a", "max_output_tokens": 5, "previous_response_id": None, "background": False},
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
        ({"input": "a", "previous_response_id": "resp_1"}, "stored_response"),
        ({"input": "a", "background": True}, "stored_response"),
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
        {"max_output_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": None},
        {"min_tokens": 3, "max_tokens": 2},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"stream_options": 7, "stream": True},
        {"echo": "yes"},
        {"store": "yes"},
        {"stream_options": {"include_usage": 5}, "stream": True},
        {"return_token_ids": 5},
    ],
)
def test_values_that_vllm_may_refuse_reach_the_decode_instance_unprefilled(
    field: dict[str, Any],
) -> None:
    assert should_disaggregate({"prompt": "a", **field}) == (False, "unusual_value")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_every_json_body_gets_a_decision(body: dict[str, Any]) -> None:
    decision = should_disaggregate(body)

    assert decision.disaggregate == (decision.reason == "")


# Is it better disaggregated?


DEFAULT = RouterConfig()
SHORT = RouterConfig(min_prefill_tokens=100)
BUSY = RouterConfig(local_prefill_cost=2.0)


@pytest.mark.parametrize(
    "options",
    [{"min_prefill_tokens": -1}, {"max_local_prefill_tokens": -1}, {"local_prefill_cost": 0}],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        from_mapping(RouterConfig, options, source="here")


@given(WORK, WORK, SCRAPES, st.integers(1, 100_000), MATCHES)
def test_by_default_everything_is_disaggregated(
    there: Work, here: Work, scrape: Scrape | None, num_tokens: int, matches: Matches
) -> None:
    found = Pair(
        replace(view("p0"), outstanding=there, scrape=scrape), replace(view("d0"), outstanding=here)
    )

    assert weigh(found, num_tokens, matches, DEFAULT) == (True, "")


@pytest.mark.parametrize(("num_tokens", "reason"), [(99, "short_prompt"), (100, "")])
def test_a_short_prompt_is_prefilled_where_it_is_decoded(num_tokens: int, reason: str) -> None:
    decision = weigh(Pair(view("p"), view("d")), num_tokens, NO_MATCHES, SHORT)

    assert decision == Decision(reason == "", reason)


def test_a_long_prompt_that_the_decode_instance_has_cached_is_short() -> None:
    found = Pair(view("p"), view("d"))

    assert weigh(found, 5000, Matches({"d": 4950}, {}), SHORT).reason == "short_prompt"


def test_a_prefill_instance_has_its_backlog_and_what_it_has_not_cached_to_compute() -> None:
    found = Pair(view("p", prefill_tokens=500), view("d"))

    assert tokens_to_prefill(found, 3500, NO_MATCHES) == 4000
    assert tokens_to_prefill(found, 3500, Matches({"p": 3000}, {})) == 1000


def test_no_decode_leg_is_early_where_blocks_are_scarce() -> None:
    scarce = Scrape(Load(0, 0, 0.5), num_own=0)

    assert not may_decode_early(view("d", scrape=scarce))
    assert may_decode_early(view("d"))


def test_a_session_alone_does_not_make_a_prompt_short() -> None:
    assert weigh(Pair(view("p"), view("d")), 5000, credit(d=4950), SHORT).disaggregate


def test_a_short_prompt_is_disaggregated_if_the_decode_instance_prefills_enough_already() -> None:
    found = Pair(view("p"), view("d", prefill_tokens=DEFAULT.max_local_prefill_tokens))

    assert weigh(found, 10, NO_MATCHES, SHORT).disaggregate


@pytest.mark.parametrize(("queue", "reason"), [(1000, ""), (1001, "prefill_busy")])
def test_a_prompt_is_prefilled_locally_if_the_queue_costs_more(queue: int, reason: str) -> None:
    found = Pair(view("p", prefill_tokens=queue), view("d"))

    assert weigh(found, 1000, NO_MATCHES, BUSY).reason == reason


def test_requests_of_others_count_in_the_queue() -> None:
    found = Pair(view("p", scrape=foreign(5)), view("d"))

    assert weigh(found, 1000, NO_MATCHES, BUSY).reason == "prefill_busy"


def test_what_the_decode_instance_prefills_already_counts_against_it() -> None:
    found = Pair(view("p", prefill_tokens=1500), view("d", prefill_tokens=500))

    assert weigh(found, 1000, NO_MATCHES, BUSY).disaggregate


def test_what_the_prefill_instance_has_cached_speaks_for_it() -> None:
    found = Pair(view("p", prefill_tokens=1500), view("d"))

    assert weigh(found, 1000, Matches({"p": 900}, {}), BUSY).disaggregate


def test_a_prompt_that_is_too_long_waits_for_a_busy_prefill_instance() -> None:
    found = Pair(view("p", prefill_tokens=10**9), view("d"))

    assert weigh(found, BUSY.max_local_prefill_tokens + 1, NO_MATCHES, BUSY).disaggregate


@given(WORK, WORK, st.integers(1, 20_000), MATCHES, st.integers(0, 10**6))
def test_a_longer_queue_never_brings_a_request_back_to_the_prefill_instance(
    there: Work, here: Work, num_tokens: int, matches: Matches, more: int
) -> None:
    found = Pair(replace(view("p0"), outstanding=there), replace(view("d0"), outstanding=here))
    busier = found._replace(prefill=replace(view("p0"), outstanding=there + Work(more)))

    if not weigh(found, num_tokens, matches, BUSY).disaggregate:
        assert not weigh(busier, num_tokens, matches, BUSY).disaggregate


@pytest.mark.parametrize(("num_tokens", "may"), [(8192, True), (8193, False)])
def test_the_length_of_a_local_prefill_is_limited(num_tokens: int, may: bool) -> None:
    assert may_prefill_locally(view("d"), num_tokens, NO_MATCHES, DEFAULT) is may


def test_local_prefills_at_the_same_time_share_the_limit() -> None:
    assert not may_prefill_locally(view("d", prefill_tokens=5000), 5000, NO_MATCHES, DEFAULT)


def test_cached_tokens_do_not_count_in_the_limit() -> None:
    assert may_prefill_locally(view("d"), 9000, Matches({"d": 1000}, {}), DEFAULT)


# Which instances?


@pytest.mark.parametrize(
    ("one", "other", "compatible"),
    [("x", "x", True), ("x", "y", False), ("x", None, True), (None, None, True)],
)
def test_only_known_fingerprints_that_differ_keep_instances_apart(
    one: str | None, other: str | None, compatible: bool
) -> None:
    assert are_compatible(one, other) is are_compatible(other, one) is compatible


@given(PREFILL, DECODE, MATCHES, TRIED, SEEDS)
def test_a_pair_is_usable_and_compatible_and_there_is_one_if_there_can_be(
    prefill: list[InstanceView],
    decode: list[InstanceView],
    matches: Matches,
    tried: set[str],
    rng: random.Random,
) -> None:
    possible = [
        (p.base_url, d.base_url)
        for p in prefill
        for d in decode
        if p.base_url != d.base_url
        and p.healthy
        and p.accepting
        and d.healthy
        and d.accepting
        and not {p.base_url, d.base_url} & tried
        and (p.fingerprint is None or d.fingerprint is None or p.fingerprint == d.fingerprint)
    ]

    found = choose_pair(prefill, decode, rng=rng, matches=matches, tried=tried)

    if found is None:
        assert not possible
    else:
        assert (found.prefill.base_url, found.decode.base_url) in possible


@given(DECODE, st.none() | st.sampled_from(["x", "y"]), MATCHES, TRIED, SEEDS)
def test_a_decode_instance_is_usable_and_compatible_with_the_producer(
    decode: list[InstanceView],
    fingerprint: str | None,
    matches: Matches,
    tried: set[str],
    rng: random.Random,
) -> None:
    producer = view("both", fingerprint=fingerprint)
    possible = [
        d.base_url
        for d in decode
        if d.healthy
        and d.accepting
        and d.base_url not in {"both", *tried}
        and (fingerprint is None or d.fingerprint in {None, fingerprint})
    ]

    found = choose_decode(decode, rng=rng, producer=producer, matches=matches, tried=tried)

    if found is None:
        assert not possible
    else:
        assert found.base_url in possible


def test_without_a_producer_every_usable_decode_instance_will_do() -> None:
    assert decoder([view("d", fingerprint="x")]) == "d"


@pytest.mark.parametrize("size", [1, 2, 15])
def test_in_a_small_pool_the_one_idle_instance_is_chosen_wherever_it_is(size: int) -> None:
    for idle in range(size):
        decode = [view(f"d{number}", kv_tokens=int(number != idle)) for number in range(size)]

        assert decoder(decode) == f"d{idle}"


@pytest.mark.parametrize("size", [2, 5, 15, 16, 40])
def test_equals_are_all_chosen(size: int) -> None:
    prefill = [view(f"p{number}") for number in range(size)]
    rng = random.Random(3)

    chosen = {choose_pair(prefill, [view("d")], rng=rng) for _ in range(size * 20)}

    assert {found.prefill.base_url for found in chosen if found} == {p.base_url for p in prefill}


def test_the_prefill_instance_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    prefill = [view("p0", prefill_tokens=900), view("p1", prefill_tokens=800)]

    assert pair(prefill, [view("d")]) == ("p1", "d")


def test_what_a_prefill_instance_holds_for_others_is_no_work() -> None:
    prefill = [view("p0", kv_tokens=10**6), view("p1", prefill_tokens=1)]

    assert pair(prefill, [view("d")]) == ("p0", "d")


@pytest.mark.parametrize(
    "busier",
    [
        view("d0", kv_tokens=10_001),
        view("d0", kv_tokens=9000, num_sequences=2),
        view("d0", kv_tokens=9000, scrape=foreign(2)),
        view("d0", kv_tokens=9000, prefill_tokens=1001),
        view("d0", scrape=FULL),
    ],
    ids=["tokens", "sequences", "foreign", "local prefill", "full"],
)
def test_the_decode_instance_with_the_least_work_is_chosen(busier: InstanceView) -> None:
    assert decoder([busier, view("d1", kv_tokens=10_000, scrape=IDLE)]) == "d1"


def test_a_full_instance_is_chosen_if_all_are_full() -> None:
    decode = [view("d0", scrape=FULL, kv_tokens=1), view("d1", scrape=FULL)]

    assert pair([view("p", scrape=FULL)], decode) == ("p", "d1")


def test_a_prefill_instance_whose_partners_are_full_is_avoided() -> None:
    prefill = [view("p0", fingerprint="x"), view("p1", fingerprint="y", prefill_tokens=5000)]
    decode = [view("d0", fingerprint="x", scrape=FULL), view("d1", fingerprint="y")]

    assert pair(prefill, decode) == ("p1", "d1")


def test_an_instance_is_not_paired_with_itself() -> None:
    assert pair([view("both")], [view("both")]) is None


def test_two_instances_for_either_role_are_paired_with_each_other() -> None:
    neutral = [view("a", prefill_tokens=10), view("b")]

    assert pair(neutral, neutral) == ("b", "a")


@pytest.mark.parametrize(("queue", "chosen"), [(999, "p0"), (1001, "p1")])
def test_a_cached_prefix_wins_as_long_as_it_saves_more_than_the_queue_costs(
    queue: int, chosen: str
) -> None:
    prefill = [view("p0", prefill_tokens=queue), view("p1")]

    assert pair(prefill, [view("d")], matches=credit(p0=1000)) == (chosen, "d")


@pytest.mark.parametrize(("load", "chosen"), [(999, "d0"), (1001, "d1")])
def test_a_session_stays_on_its_decode_instance_as_long_as_that_saves_more_than_it_costs(
    load: int, chosen: str
) -> None:
    decode = [view("d0", kv_tokens=load), view("d1")]

    assert decoder(decode, matches=credit(d0=1000)) == chosen


def test_the_longest_cached_prefix_wins_between_equals() -> None:
    prefill = [view("p0"), view("p1"), view("p2")]

    assert pair(prefill, [view("d")], matches=credit(p0=256, p1=512)) == ("p1", "d")


def test_in_a_large_pool_the_instance_that_knows_the_prompt_is_always_looked_at() -> None:
    prefill = [view(f"p{number}") for number in range(100)]

    for seed in range(20):
        found = choose_pair(
            prefill, [view("d")], rng=random.Random(seed), matches=credit(p77=256, p5=100)
        )
        assert found is not None
        assert found.prefill.base_url == "p77"


def test_in_a_large_pool_not_everybody_runs_to_the_one_idle_instance() -> None:
    decode = [view(f"d{number}", kv_tokens=1000) for number in range(40)] + [view("idle")]
    rng = random.Random(5)

    chosen = [choose_decode(decode, rng=rng) for _ in range(100)]

    assert 0 < sum(found is not None and found.base_url == "idle" for found in chosen) < 20


def test_in_a_large_pool_a_full_instance_is_not_drawn() -> None:
    decode = [view(f"d{number}", scrape=FULL) for number in range(40)] + [view("idle")]

    assert decoder(decode) == "idle"


@given(
    st.lists(st.tuples(WORK, SCRAPES), min_size=2, max_size=6),
    st.dictionaries(st.sampled_from("012345"), st.integers(1, 50_000)),
    st.integers(1, 10_000),
)
def test_an_instance_that_was_not_chosen_is_not_chosen_when_it_gets_busier(
    loads: list[tuple[Work, Scrape | None]], credits: dict[str, int], more: int
) -> None:
    group = [
        replace(view(str(place)), outstanding=work, scrape=scrape)
        for place, (work, scrape) in enumerate(loads)
    ]
    choices: list[Callable[[list[InstanceView]], InstanceView | None]] = [
        lambda views: choose_decode(views, rng=random.Random(1), matches=Matches({}, credits)),
        lambda views: choose_prefill(views, matches=Matches({}, credits)),
    ]
    for choose in choices:
        chosen = choose(group)
        for place, other in enumerate(group):
            if other != chosen:
                busier = replace(other, outstanding=other.outstanding + Work(more))
                assert choose([*group[:place], busier, *group[place + 1 :]]) != busier
