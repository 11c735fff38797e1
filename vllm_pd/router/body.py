"""The JSON bodies of the two legs, made from the client's. Pure.

The client's values are written into both legs as the client wrote them, not serialised
again: bodies of many megabytes are mostly one prompt, or one image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from vllm_pd.errors import RemoteProtocolError

Body = Mapping[str, Any]

KV_PARAMS = "kv_transfer_params"
_EC_PARAMS = "ec_transfer_params"  # of encoder caches, likewise

RESPONSES = "/v1/responses"
"""Path of the endpoint with limits and answers of its own."""

_EXTRA = "vllm_xargs"

_NAME_LEN = 64  # of the longest member name that is remembered with its JSON
_PLAIN = (int, bool, type(None))  # values that are remembered likewise

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
        "min_tokens",
        "prompt_logprobs",
        "return_token_ids",
        "stream_options",
    }
)

_members: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(
    dict[str, msgspec.Raw]
)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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
    extra = body.get(_EXTRA)
    for name in (KV_PARAMS, _EC_PARAMS):
        body.pop(name, None)
        if isinstance(extra, dict):  # the engine takes the params from there, too
            extra.pop(name, None)
    return body


def verbatim(raw: bytes, body: dict[str, Any]) -> dict[str, Any]:
    """Return a parsed body with its values as the client wrote them, for ``dump``.

    Args:
        raw: what ``body`` was parsed from.
        body: the result of ``parse``; what it has dropped stays dropped.
    """
    try:
        members = _members.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return body  # Python's parser takes more than JSON: NaN, UTF-16, lone surrogates
    if _EXTRA in body:  # params may have been taken out of it
        return {name: body[name] if name == _EXTRA else members[name] for name in body}
    return {name: members[name] for name in body}


def prefill_body(body: Body, transfer_id: str, *, path: str) -> dict[str, Any]:
    """Return the body that makes an instance prefill and keep the KV cache."""
    leg = {name: value for name, value in body.items() if name not in _NOT_FOR_PREFILL}
    if path == RESPONSES:
        leg["max_output_tokens"] = 1
        leg["store"] = False
    else:
        leg["max_tokens"] = 1
        if "max_completion_tokens" in body:
            leg["max_completion_tokens"] = 1
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
        text = _members.decode(reply).get(KV_PARAMS)
        params = None if text is None else msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return params if isinstance(params, dict) and params else None


def dump(body: Body) -> bytes:
    """Return a body as JSON that ``json.loads`` reads back equal."""
    parts: list[Any] = []
    for name, value in body.items():
        if isinstance(value, msgspec.Raw):
            text: Any = value
        elif name == KV_PARAMS:
            # Never the client's, so it is nothing that only Python's encoder, which takes ten
            # times as long, could write.
            text = msgspec.json.encode(value)
        else:
            text = _dump_plain(value) if type(value) in _PLAIN else _dump(value)
        parts += [b",", _dump_plain(name) if len(name) <= _NAME_LEN else _dump(name), b":", text]
    return b"".join([b"{", *parts[1:], b"}"])


@lru_cache(maxsize=512, typed=True)
def _dump_plain(value: str | int | None) -> bytes:
    return _dump(value)


def _dump(value: object) -> bytes:
    text = _encode(value)
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(value, separators=(",", ":")).encode()
