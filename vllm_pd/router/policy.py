"""Which path a request takes and which instances serve it. Pure.

Costs are in prompt tokens to compute, or in what weighs as much. A prompt that an
instance has seen is cheaper there by the tokens it need not compute, so affinity
is part of the cost: it wins as long as it saves more than the queue there costs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from vllm_pd.config import RouterConfig
from vllm_pd.router.affinity import NO_MATCHES, Matches
from vllm_pd.router.loads import Scrape, Work

_SEQUENCE_TOKENS = 512
"""What a sequence weighs beside its prompt: its share of every step, its output to come."""

_FULL_KV_USAGE = 0.95
"""From here on vLLM lets requests wait for blocks, or preempts others."""

_SPARE_KV_USAGE = 0.5
"""Up to here blocks may be taken at a decode instance before they are needed."""

_TWO_CHOICES_FROM = 16
"""Pool size from which two instances are drawn and the better one is taken.

All processes of a router, and all routers, see the same scrapes: in a large pool
they would all send to the one instance that looked idle."""

_NOTHING = Work()


class InstanceView(msgspec.Struct, frozen=True):  # some are made for each request
    """One instance as the policy sees it at one moment.

    Attributes:
        base_url: address, also its name.
        healthy: whether it answered when last asked.
        accepting: whether it takes new requests: it is not draining, and its circuit
            breaker lets them pass.
        fingerprint: names what its KV cache is compatible with; None if unknown.
        outstanding: what this router has open there.
        scrape: the last reading of its metrics, or None.
    """

    base_url: str
    healthy: bool
    accepting: bool = True
    fingerprint: str | None = None
    outstanding: Work = _NOTHING
    scrape: Scrape | None = None

    @property
    def num_foreign(self) -> int:
        """Sequences there that this router does not know."""
        return self.scrape.num_foreign if self.scrape else 0

    @property
    def is_full(self) -> bool:
        """Whether its KV cache was as good as full at the last scrape."""
        return self.scrape is not None and self.scrape.load.kv_usage >= _FULL_KV_USAGE


class Pair(NamedTuple):
    """Two instances that can exchange KV cache."""

    prefill: InstanceView
    decode: InstanceView


class Decision(NamedTuple):
    """Whether to prefill elsewhere.

    Attributes:
        disaggregate: send the request prefill-first.
        reason: why not, as a metric label; ``""`` if it is disaggregated.
    """

    disaggregate: bool
    reason: str


_DISAGGREGATE = Decision(disaggregate=True, reason="")


def should_disaggregate(body: Mapping[str, Any]) -> Decision:
    """Decide whether a prefill leg serves this request identically.

    If not, the decode instance serves it alone: correct, but prefilled there.
    """
    for reason, applies in _DECODE_ONLY.items():
        if applies(body):
            return Decision(disaggregate=False, reason=reason)
    return _DISAGGREGATE


def weigh(pair: Pair, num_tokens: int, matches: Matches, config: RouterConfig) -> Decision:
    """Decide whether a request that can be disaggregated should be.

    Not if its prompt is short, or mostly cached where it is decoded, and not if that
    instance computes it much sooner than the prefill instance with its queue. In
    any case only if the decode instance has little else to prefill.

    Args:
        pair: the instances that would serve it.
        num_tokens: length of its prompt.
        matches: what instances have seen of it.
        config: the limits.
    """
    if not may_prefill_locally(pair.decode, num_tokens, matches, config):
        return _DISAGGREGATE
    here = uncached(pair.decode, num_tokens, matches)
    if here < config.min_prefill_tokens:
        return Decision(disaggregate=False, reason="short_prompt")
    if config.local_prefill_cost is not None:
        there = uncached(pair.prefill, num_tokens, matches)
        local = pair.decode.outstanding.prefill_tokens + here
        if _backlog(pair.prefill) + there > config.local_prefill_cost * local:
            return Decision(disaggregate=False, reason="prefill_busy")
    return _DISAGGREGATE


def may_prefill_locally(
    decode: InstanceView, num_tokens: int, matches: Matches, config: RouterConfig
) -> bool:
    """Return whether a decode instance has room to prefill a request by itself.

    Every stream that it serves waits for that, so what it has to prefill at one time
    is limited, and with it the length of one prompt.
    """
    here = uncached(decode, num_tokens, matches)
    return decode.outstanding.prefill_tokens + here <= config.max_local_prefill_tokens


def has_pair(prefill: Sequence[InstanceView], decode: Sequence[InstanceView]) -> bool:
    """Return whether a request could be disaggregated now."""
    producers = [view for view in prefill if _is_usable(view, ())]
    consumers = [view for view in decode if _is_usable(view, ())]
    return any(_is_pair(one, other) for one in producers for other in consumers)


def may_decode_early(decode: InstanceView) -> bool:
    """Return whether a decode leg may be sent there while its prefill still runs.

    It takes blocks at the decode instance for that time, so they must not be scarce.
    """
    scrape = decode.scrape
    return scrape is None or scrape.load.kv_usage < _SPARE_KV_USAGE


def tokens_to_prefill(pair: Pair, num_tokens: int, matches: Matches) -> int:
    """Return what the prefill instance has to compute until it has done this prompt."""
    return _backlog(pair.prefill) + uncached(pair.prefill, num_tokens, matches)


def choose_pair(
    prefill: Sequence[InstanceView],
    decode: Sequence[InstanceView],
    *,
    rng: random.Random,
    matches: Matches = NO_MATCHES,
    tried: Collection[str] = (),
) -> Pair | None:
    """Return the instances that a request goes to, or None if no pair is left.

    Args:
        prefill: the instances that may prefill.
        decode: the instances that may decode; the same one may be in both.
        rng: decides between equals, and draws from large pools.
        matches: what instances have seen of the prompt.
        tried: addresses of instances that already failed this request.
    """
    producers = [view for view in prefill if _is_usable(view, tried)]
    consumers = [view for view in decode if _is_usable(view, tried)]
    with_room = [view for view in consumers if not view.is_full]
    for candidates in (with_room, consumers):
        paired = [view for view in producers if any(_is_pair(view, d) for d in candidates)]
        if (best := _choose(paired, _backlog, matches, rng)) is not None:
            partners = [view for view in candidates if _is_pair(best, view)]
            if (partner := _choose(partners, _decode_cost, matches, rng)) is not None:
                return Pair(best, partner)
    return None


def choose_decode(
    decode: Sequence[InstanceView],
    *,
    rng: random.Random,
    producer: InstanceView | None = None,
    matches: Matches = NO_MATCHES,
    tried: Collection[str] = (),
) -> InstanceView | None:
    """Return the instance that decodes, or None if none is left.

    Args:
        decode: the instances that may decode.
        rng: decides between equals, and draws from large pools.
        producer: the instance that holds the prompt's KV cache; None if none does.
        matches: what instances have seen of the prompt.
        tried: addresses of instances that already failed this request.
    """
    usable = [view for view in decode if _is_usable(view, tried)]
    if producer is not None:
        usable = [view for view in usable if _is_pair(producer, view)]
    return _choose(usable, _decode_cost, matches, rng)


def are_compatible(one: str | None, other: str | None) -> bool:
    """Return whether two fingerprints allow an exchange; what is unknown (None) may do."""
    return one is None or other is None or one == other


def _is_usable(view: InstanceView, tried: Collection[str]) -> bool:
    return view.healthy and view.accepting and view.base_url not in tried


def _is_pair(producer: InstanceView, consumer: InstanceView) -> bool:
    # An instance has nothing to hand over to itself.
    return producer.base_url != consumer.base_url and are_compatible(
        producer.fingerprint, consumer.fingerprint
    )


def _choose(
    candidates: Sequence[InstanceView],
    cost: Callable[[InstanceView], int],
    matches: Matches,
    rng: random.Random,
) -> InstanceView | None:
    """Return the cheapest candidate; a full one only if all are."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    credit = matches.credit
    candidates = [view for view in candidates if not view.is_full] or candidates
    if len(candidates) >= _TWO_CHOICES_FROM:
        candidates = [*rng.sample(candidates, 2), *_best_known(candidates, credit, rng)]
    costs = [cost(view) - credit.get(view.base_url, 0) for view in candidates]
    lowest = min(costs)
    best = [view for view, its_cost in zip(candidates, costs, strict=True) if its_cost == lowest]
    return best[0] if len(best) == 1 else rng.choice(best)


def _best_known(
    candidates: Sequence[InstanceView], credit: Mapping[str, int], rng: random.Random
) -> list[InstanceView]:
    """Return one of those who have seen most of the prompt, if any has seen something."""
    known = [view for view in candidates if view.base_url in credit]
    most = max((credit[view.base_url] for view in known), default=0)
    best = [view for view in known if credit[view.base_url] == most]
    return [rng.choice(best)] if best else []


def _backlog(view: InstanceView) -> int:
    """Return what comes before a new prompt, in tokens to prefill."""
    return view.outstanding.prefill_tokens + _SEQUENCE_TOKENS * view.num_foreign


def _decode_cost(view: InstanceView) -> int:
    num_sequences = view.outstanding.num_sequences + view.num_foreign
    tokens = view.outstanding.kv_tokens + view.outstanding.prefill_tokens
    return tokens + _SEQUENCE_TOKENS * num_sequences


def uncached(view: InstanceView, num_tokens: int, matches: Matches) -> int:
    """Return how many tokens of a prompt an instance has to compute."""
    return max(0, num_tokens - matches.cached.get(view.base_url, 0))


def _is_int(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_several(value: object) -> bool:
    return value is not None and value != 1


def _is_batch(body: Mapping[str, Any]) -> bool:
    prompt = body.get("prompt")
    # A list of integers is one prompt, given as token ids.
    return isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], (str, list))


def _truncates_by_budget(body: Mapping[str, Any]) -> bool:
    # -1 truncates to what the model's limit leaves, which depends on max_tokens:
    # the legs would see different prompts.
    tokens = body.get("truncate_prompt_tokens")
    return tokens is not None and not _is_int(tokens, at_least=0)


def _truncates_input(body: Mapping[str, Any]) -> bool:
    # Of responses. Also null does: the room for the prompt depends on max_output_tokens.
    return bool(body.get("truncation", "disabled") != "disabled")


def _has_server_tools(body: Mapping[str, Any]) -> bool:
    # vLLM calls them by itself and generates anew: several prompts, one transfer.
    tools = body.get("tools")
    return isinstance(tools, list) and any(
        not isinstance(tool, dict) or tool.get("type", "function") not in ("function", "custom")
        for tool in tools
    )


# What the fields that the prefill leg drops or overrides look like when nothing is
# wrong with them. The prefill instance never sees the client's value, so a value
# that vLLM may refuse must reach the decode instance before any work is done.
_USUAL: dict[str, Callable[[Any], bool]] = {
    "max_tokens": lambda value: value is None or _is_int(value, at_least=1),
    "max_completion_tokens": lambda value: value is None or _is_int(value, at_least=1),
    "max_output_tokens": lambda value: value is None or _is_int(value, at_least=1),
    "min_tokens": lambda value: _is_int(value, at_least=0),
    "store": _is_flag,
    "stream": _is_flag,
    "stream_options": lambda value: (
        value is None or (isinstance(value, dict) and all(map(_is_flag, value.values())))
    ),
    "echo": _is_flag,
    "return_token_ids": _is_flag,
}


def _is_unusual(body: Mapping[str, Any]) -> bool:
    if any(name in body and not usual(body[name]) for name, usual in _USUAL.items()):
        return True
    if body.get("stream_options") and not body.get("stream"):
        return True
    limits = [body.get("max_tokens"), body.get("max_completion_tokens")]
    return any(limit is not None and body.get("min_tokens", 0) > limit for limit in limits)


# First match wins. ``unusual`` leads: the others may rely on the types it checked.
_DECODE_ONLY: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "unusual_value": _is_unusual,
    # Needs the logits of the prompt, which only a local prefill has.
    "echo": lambda body: bool(body.get("echo")),
    "prompt_logprobs": lambda body: body.get("prompt_logprobs") is not None,
    # One transfer is one prompt; vLLM makes several engine requests of these.
    "several_prompts": _is_batch,
    "several_choices": lambda body: _is_several(body.get("n")) or _is_several(body.get("best_of")),
    "beam_search": lambda body: bool(body.get("use_beam_search")),
    "prompt_embeds": lambda body: body.get("prompt_embeds") is not None,
    "truncation": lambda body: _truncates_by_budget(body) or _truncates_input(body),
    "server_tools": _has_server_tools,
    # The earlier answers, and those that are fetched later, are in the memory of one
    # instance.
    "stored_response": lambda body: (
        body.get("previous_response_id") is not None or bool(body.get("background"))
    ),
}
