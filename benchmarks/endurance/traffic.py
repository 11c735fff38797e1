"""What clients ask and instances answer in a soak, and whether it is right. Pure.

Every answer names the request that it belongs to, and every prompt has a checksum: a
router that mixes answers up, cuts them or damages a body is found out.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from typing import Any

PATH = "/v1/completions"
SHAPE = "shape"
"""Field of a request that says how the answer is to look; the router does not know it."""

SENDER = "X-Soak-Sender"
"""Header of a streamed answer: the name of the instance process that it comes from."""

DONE = b"data: [DONE]"

_PROMPT_MARK = b'"prompt":"'
_REST_LEN = 4096  # more than all fields behind the prompt take


@dataclass(frozen=True, slots=True)
class Shape:
    """How an answer looks.

    Attributes:
        num_chunks: tokens; of a stream, its events.
        interval_s: between two of them.
        chunk_len: bytes of the text of each.
    """

    num_chunks: int
    interval_s: float = 0.0
    chunk_len: int = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """What an instance reads of a leg.

    Attributes:
        is_intact: the prompt has the checksum that the client gave it.
        is_prefill: the leg is to leave its KV cache to another instance.
        prefilled_for: the request whose KV cache it is to fetch; None: it prefills itself.
        stream: the answer is to be streamed.
        shape: of the answer.
    """

    is_intact: bool
    is_prefill: bool
    prefilled_for: str | None
    stream: bool
    shape: Shape


def request_body(prompt: str, shape: Shape, *, stream: bool) -> bytes:
    """Return what a client sends."""
    body = {
        "model": "m",
        "prompt": prompt,
        "user": _checksum(prompt.encode()),
        "stream": stream,
        "max_tokens": shape.num_chunks,
        SHAPE: [shape.num_chunks, shape.interval_s, shape.chunk_len],
    }
    return json.dumps(body, separators=(",", ":")).encode()


def read_leg(body: bytes) -> Asked:
    """Read a leg, without parsing a prompt of many megabytes.

    Raises:
        ValueError: it is none.
    """
    start = body.index(_PROMPT_MARK) + len(_PROMPT_MARK)
    end = body.index(b'"', start)
    if len(body) - end > _REST_LEN:
        raise ValueError("too much behind the prompt")
    rest: dict[str, Any] = json.loads(b'{"prompt":"' + body[end:])
    params: dict[str, Any] = rest.get("kv_transfer_params") or {}
    return Asked(
        is_intact=rest["user"] == _checksum(body[start:end]),
        is_prefill=bool(params.get("do_remote_decode")),
        prefilled_for=params.get("remote_request_id"),
        stream=rest["stream"],
        shape=Shape(*rest[SHAPE]),
    )


def prefill_answer(request_id: str, engine_id: str) -> bytes:
    """Return what a prefill instance answers."""
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_block_ids": [1, 2, 3],
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
    }
    return json.dumps({"choices": [{"text": "x"}], "kv_transfer_params": params}).encode()


def whole_answer(request_id: str, shape: Shape) -> bytes:
    """Return an answer that is not streamed."""
    text = "".join(_text(request_id, i, shape) for i in range(shape.num_chunks))
    return json.dumps({"choices": [{"index": 0, "text": text}]}).encode()


def event(request_id: str, index: int, shape: Shape) -> bytes:
    """Return one event of a streamed answer."""
    choice = {"index": 0, "text": _text(request_id, index, shape), "finish_reason": None}
    return b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode()


def is_right(answer: bytes, request_id: str, shape: Shape) -> bool:
    """Return whether a whole answer is that of the request."""
    return answer == whole_answer(request_id, shape)


def check_stream(answer: bytes, request_id: str, shape: Shape) -> int | None:
    """Return how many events came before an error event ended the stream; None: all.

    Raises:
        ValueError: the stream is wrong, or ends in neither of the two ways.
    """
    events = re.split(rb"\n\n+", answer.lstrip(b"\n"))
    if events.pop():
        raise ValueError("half an event at the end")
    for index, found in enumerate(events):
        if found == DONE and index == shape.num_chunks == len(events) - 1:
            return None
        if found.startswith(b'data: {"error"') and index == len(events) - 1:
            return index
        if index >= shape.num_chunks or found + b"\n\n" != event(request_id, index, shape):
            raise ValueError(f"event {index} is {found[:60]!r}")
    raise ValueError(f"the stream ends after {len(events)} events")


def _text(request_id: str, index: int, shape: Shape) -> str:
    return f"{request_id}:{index} ".ljust(shape.chunk_len, "x")


def _checksum(prompt: bytes) -> str:
    return f"{zlib.crc32(prompt):08x}"
