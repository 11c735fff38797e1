"""What a decode instance's answer says of the prefill, put right. Pure.

A decode instance has fetched the prompt's KV cache, and may count what it fetched as
cached. What the client's prompt found in a prefix cache, only the prefill instance
knows. vLLM 0.32 hands ``cached_tokens`` on by itself, in the KV transfer params, but
not what the prompt added to the cache; 0.23 hands nothing on.

Answers and events are changed as bytes, where they are wrong: all the rest of an
answer stays as vLLM wrote it, and nothing large is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vllm_pd.router.body import KV_PARAMS

PromptDetails = Mapping[str, int]
"""Counts of prompt tokens by vLLM's names, as the prefill instance gave them."""

_KV_PARAMS_KEY = f'"{KV_PARAMS}"'.encode()
_DETAILS_SIGN = b't_tokens_details"'  # of "prompt" and "input", not of "completion"

SIGNS = (_DETAILS_SIGN, _KV_PARAMS_KEY)
"""One of them is in whatever may have to be repaired."""

# Completions and chat have the one, responses the other. In JSON text, quotes mark
# these as keys: inside a string they would be escaped.
_DETAILS = re.compile(rb'"(?:prompt|input)_tokens_details"\s*:\s*(\{(?:[^{}]++|\{[^{}]*+\})*+\})')
_COUNT = re.compile(rb'"(\w+)"(\s*:\s*)(\d+)')
_COLON = re.compile(r"\s*:\s*")
_decoder = json.JSONDecoder()


def prompt_details_of(reply: bytes) -> PromptDetails:
    """Return the counts in a prefill instance's answer; none if it does not give them.

    vLLM gives them for responses, and for the other endpoints if it was started with
    ``--enable-prompt-tokens-details``.
    """
    found = _DETAILS.search(reply, max(0, reply.rfind(b'"usage"')))
    if found is None:
        return {}
    return {count[1].decode(): int(count[3]) for count in _COUNT.finditer(found[1])}


def repaired(data: bytes, details: PromptDetails) -> bytes:
    """Return an answer, or one event of it, as a colocated instance would give it.

    Counts of the prompt become those of the prefill instance where both have them,
    and KV transfer params become null: they name hosts, and are not for clients.

    Args:
        data: JSON, or an event with JSON in it, of the decode instance.
        details: counts of the prefill instance; empty if there was none.
    """
    if details and _DETAILS_SIGN in data:
        start = max(0, data.rfind(b'"usage"'))  # what responses repeat comes before
        repaired_end = _DETAILS.sub(lambda found: _with_counts(found, details), data[start:])
        data = data[:start] + repaired_end
    if _KV_PARAMS_KEY in data:
        data = _without_kv_params(data)
    return data


def kv_params_in(answer: bytes) -> dict[str, Any] | None:
    """Return the KV transfer params of a whole answer, None if it has none.

    What is not in ASCII there comes out wrong.
    """
    found = _find_kv_params(answer) if _KV_PARAMS_KEY in answer else None
    return None if found is None else found[2]


def _with_counts(found: re.Match[bytes], details: PromptDetails) -> bytes:
    def right(count: re.Match[bytes]) -> bytes:
        value = details.get(count[1].decode())
        return count[0] if value is None else b'"%b"%b%d' % (count[1], count[2], value)

    return _COUNT.sub(right, found[0])


def _without_kv_params(data: bytes) -> bytes:
    if (found := _find_kv_params(data)) is None:
        return data
    start, end, _ = found
    return data[:start] + b"null" + data[end:]


def _find_kv_params(data: bytes) -> tuple[int, int, dict[str, Any]] | None:
    """Return where the params are, from their brace to behind it, and what they are."""
    # The last, since a client's tools, which responses echo, may use the name, too.
    start = data.rfind(_KV_PARAMS_KEY) + len(_KV_PARAMS_KEY)
    text = data[start:].decode("latin-1")  # one character for each byte
    colon = _COLON.match(text)
    if colon is None or not text.startswith("{", colon.end()):
        return None
    try:
        params, end = _decoder.raw_decode(text, colon.end())
    except (ValueError, RecursionError):
        return None  # what is no JSON cannot be read by the client, either
    return start + colon.end(), start + end, params
