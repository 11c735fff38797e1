"""What clients ask and null backends answer, as bytes. Pure.

Sizes are those of a short chat with vLLM, and the answers have the fields that a
router has to look at.
"""

from __future__ import annotations

import json
from typing import Any

PATH = "/v1/chat/completions"
MODEL_NAME = "m"
NUM_CHUNKS = 64
PACED = "paced"
"""Field of a request that asks for chunks at a steady rate, each with its time."""

PROMPT_LEN = 1024

_CHAT = {"id": "chatcmpl-0", "created": 1_760_000_000, "model": MODEL_NAME}
_KV_PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "4b6f5f9e-engine",
    "remote_request_id": "chatcmpl-0-1234abcd",
    "remote_block_ids": [list(range(100, 116))],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "remote_num_tokens": 256,
    "tp_size": 1,
}


def request_body(**fields: Any) -> bytes:
    """Return a chat request; ``fields`` are added to it."""
    prompt = "word " * (PROMPT_LEN // 5)
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": NUM_CHUNKS,
        "temperature": 0.0,
    }
    return json.dumps(body | fields).encode()


def request(body: bytes, host: str = "127.0.0.1") -> bytes:
    """Return a whole HTTP request with a JSON body."""
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def prefill_leg() -> bytes:
    """Return the body of a prefill leg, for who asks both backends without a router."""
    return request_body(max_tokens=1, stream=False, kv_transfer_params={"do_remote_decode": True})


def decode_leg(**fields: Any) -> bytes:
    """Return the body of a decode leg; ``fields`` are added to it."""
    return request_body(**fields, kv_transfer_params=_KV_PARAMS)


def response(body: bytes, status: str = "200 OK") -> bytes:
    """Return a whole HTTP answer with a JSON body."""
    head = (
        f"HTTP/1.1 {status}\r\nserver: null\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def prefill_answer() -> bytes:
    """Return what a prefill instance answers."""
    return response(json.dumps(_answer() | {"kv_transfer_params": _KV_PARAMS}).encode())


def decode_answer() -> bytes:
    """Return what a decode instance answers when it does not stream."""
    return response(json.dumps(_answer() | {"kv_transfer_params": None}).encode())


def stream_head(more: bytes = b"") -> bytes:
    """Return the head of a streamed answer, with ``more`` lines, each with its end."""
    return (
        b"HTTP/1.1 200 OK\r\nserver: null\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"transfer-encoding: chunked\r\n" + more + b"\r\n"
    )


def stream_chunks() -> list[bytes]:
    """Return the chunks of a streamed answer: one token each, then the end."""
    delta = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
    event = json.dumps(_CHAT | {"object": "chat.completion.chunk", "choices": [delta]})
    return [chunk(f"data: {event}\n\n".encode())] * NUM_CHUNKS + [stream_end()]


def stream_end() -> bytes:
    """Return the last event of a stream, and the end of its chunked body."""
    return chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return data as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _answer() -> dict[str, Any]:
    message = {"role": "assistant", "content": "word " * NUM_CHUNKS}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    usage = {"prompt_tokens": 256, "completion_tokens": 64, "total_tokens": 320}
    return {**_CHAT, "object": "chat.completion", "choices": [choice], "usage": usage}
