"""The JSON bodies of the two legs, made from the client's. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_pd.errors import RemoteProtocolError

Body = Mapping[str, Any]

KV_PARAMS = "kv_transfer_params"

# Fields that the prefill leg does without: they shape the output, which is thrown
# away, or contradict the ones that are overridden. Every one of them is still
# checked by the decode instance, and ``policy`` keeps odd values off this leg.
#
# Everything else stays, also what looks useless for one token (``tools``,
# ``tool_choice``, ``response_format``, ``documents``): chat templates may write it
# into the prompt, and both legs must see the same prompt.
_NOT_FOR_PREFILL = frozenset(
    {
        "best_of",
        "echo",
        "logprob_token_ids",
        "logprobs",
        "min_tokens",
        "prompt_logprobs",
        "return_token_ids",
        "stream_options",
        "top_logprobs",
    }
)


def parse(raw: bytes) -> dict[str, Any] | None:
    """Return the client's body without KV transfer params, or None if it is no JSON object.

    The parser is the one that vLLM's API server uses, so that both read the same:
    a body that is refused here is refused there.

    Clients must not name transfers: the params make an instance connect to a host
    of the sender's choice.

    Raises:
        RemoteProtocolError: the JSON is nested too deeply to be read. Whether
            the instance could read it is unknown, so it must not be passed on.
    """
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    except RecursionError as exc:
        raise RemoteProtocolError("the JSON body is nested too deeply") from exc
    if not isinstance(body, dict):
        return None
    body.pop(KV_PARAMS, None)
    extra = body.get("vllm_xargs")
    if isinstance(extra, dict):  # the engine takes the params from there, too
        extra.pop(KV_PARAMS, None)
    return body


def prefill_body(body: Body, transfer_id: str) -> dict[str, Any]:
    """Return the body that makes an instance prefill and keep the KV cache."""
    leg = {name: value for name, value in body.items() if name not in _NOT_FOR_PREFILL}
    leg["max_tokens"] = 1
    if "max_completion_tokens" in body:
        leg["max_completion_tokens"] = 1
    leg["n"] = 1
    leg["stream"] = False  # a streamed answer does not carry the params
    leg[KV_PARAMS] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
        "transfer_id": transfer_id,
    }
    return leg


def decode_body(body: Body, kv_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the client's body plus the prefill instance's params, unchanged."""
    leg = dict(body)
    if kv_params is not None:
        leg[KV_PARAMS] = kv_params
    return leg


def kv_params_of(reply: bytes) -> dict[str, Any] | None:
    """Return the params in a prefill instance's answer, or None if it has none."""
    try:
        answer = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    params = answer.get(KV_PARAMS) if isinstance(answer, dict) else None
    return params if isinstance(params, dict) and params else None


def dump(body: Body) -> bytes:
    """Return a body as JSON that ``json.loads`` reads back equal."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(body, separators=(",", ":")).encode()
