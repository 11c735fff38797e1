"""Which path a request takes and which instance serves it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_pd.config import Role


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as the policy sees it at one moment.

    Attributes:
        role: what the router uses it for.
        base_url: address, also its name.
        healthy: whether it answered when last asked.
        in_flight: requests that the router has open there.
    """

    role: Role
    base_url: str
    healthy: bool
    in_flight: int


class Decision(NamedTuple):
    """Whether to prefill elsewhere.

    Attributes:
        disaggregate: send the request prefill-first.
        reason: why not, as a metric label; ``""`` if it is disaggregated.
    """

    disaggregate: bool
    reason: str


def should_disaggregate(body: Mapping[str, Any]) -> Decision:
    """Decide whether a prefill leg serves this request identically.

    If not, the decode instance serves it alone: correct, but prefilled there.
    """
    for reason, applies in _DECODE_ONLY.items():
        if applies(body):
            return Decision(disaggregate=False, reason=reason)
    return Decision(disaggregate=True, reason="")


def pick_round_robin(
    snapshot: Sequence[InstanceView], *, turn: int, tried: Collection[str] = ()
) -> InstanceView | None:
    """Return the healthy instance whose turn it is.

    Args:
        snapshot: the instances of one role, in a stable order.
        turn: number of picks so far.
        tried: addresses of instances that already failed this request.
    """
    usable = [view for view in snapshot if view.healthy and view.base_url not in tried]
    return usable[turn % len(usable)] if usable else None


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


# What the fields that the prefill leg drops or overrides look like when nothing is
# wrong with them. The prefill instance never sees the client's value, so a value
# that vLLM may refuse must reach the decode instance before any work is done.
_USUAL: dict[str, Callable[[Any], bool]] = {
    "max_tokens": lambda value: value is None or _is_int(value, at_least=1),
    "max_completion_tokens": lambda value: value is None or _is_int(value, at_least=1),
    "min_tokens": lambda value: _is_int(value, at_least=0),
    "stream": _is_flag,
    "stream_options": lambda value: value is None or isinstance(value, dict),
    "echo": _is_flag,
    "return_token_ids": _is_flag,
    "logprobs": lambda value: _is_flag(value) or _is_int(value, at_least=-1),
    "top_logprobs": lambda value: value is None or _is_int(value, at_least=-1),
    "logprob_token_ids": lambda value: value is None or isinstance(value, list),
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
    "truncation": _truncates_by_budget,
}
