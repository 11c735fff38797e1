"""What is known of one request: for the access log, and as the spans of its trace."""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from yarl import URL

from vllm_pd.config import Role
from vllm_pd.router.headers import choose_request_id
from vllm_pd.router.metrics import Outcome
from vllm_pd.router.spans import NO_SPAN, Attributes, Span, Tracer

_USAGE_KEY = b'"usage"'
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_COUNT = re.compile(
    rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens|cached_tokens)"\s*:\s*(\d+)'
)
_USAGE_LEN = 1024
"""Bytes after its key that hold it."""

_NUM_TAIL = 8
"""Of a stream, as many of its last parts are; its usage is in the last event but one."""

_MAX_MODEL_LEN = 256

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}
"""OpenTelemetry's names of what the endpoints do."""


@dataclass(slots=True)
class Record:
    """One request, filled in while it is served. Durations are in seconds.

    Attributes:
        request_id: names it everywhere.
        began: when it came, on the monotonic clock.
        wanted: whether somebody wants to know what costs time to find out.
        span: its span.
        outcome: how it went, if it was for an instance.
        api_key: name of the client's API key.
        model: as the client named it.
        num_prefills: attempts on prefill instances.
        num_decodes: attempts on decode instances.
        prefill: the last prefill instance.
        decode: the last decode instance.
        queue_s: waits for slots, all together.
        prefill_s: the prefill leg that succeeded.
        first_bytes_s: from the arrival to an instance's first bytes.
        request_len: bytes of the body.
        response_len: bytes of the answer's body that were given to the client's connection.
        tail: the last parts of the answer, if the record is wanted.
        prefill_reply: the prefill instance's answer, likewise.
        prompt_tokens: as vLLM counted them; None: it did not say.
        cached_tokens: likewise, of these.
        completion_tokens: likewise.
        error: what went wrong, in words of the router; None: nothing.
        is_answered: whether the headers of the answer are on their way to the client.
    """

    request_id: str
    began: float = field(default_factory=time.monotonic)
    wanted: bool = False
    span: Span = NO_SPAN
    outcome: Outcome | None = None
    api_key: str | None = None
    model: str | None = None
    num_prefills: int = 0
    num_decodes: int = 0
    prefill: str | None = None
    decode: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    first_bytes_s: float | None = None
    request_len: int = 0
    response_len: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    is_answered: bool = False
    tail: deque[bytes] | None = None
    prefill_reply: bytes | None = None

    @classmethod
    def of(cls, request: web.Request) -> Record:
        """Return the record of a request; begins it the first time."""
        record: Record | None = request.get(_KEY)
        if record is None:
            record = request[_KEY] = cls(choose_request_id(request.headers))
        return record

    @property
    def num_retries(self) -> int:
        """Legs that were sent again."""
        return max(self.num_prefills - 1, 0) + max(self.num_decodes - 1, 0)

    def begin(self, tracer: Tracer, request: web.Request, route: str) -> None:
        """Begin the request's span, named after its route."""
        attributes: dict[str, str | int | float | bool] = {
            "http.request.method": request.method,
            "http.route": route,
            "url.path": request.path,
            "url.scheme": request.scheme,
            "client.address": request.remote or "",
            "gen_ai.request.id": self.request_id,
        }
        if operation := _OPERATIONS.get(route):
            attributes["gen_ai.operation.name"] = operation
        self.span = tracer.begin(f"{request.method} {route}", request.headers, attributes)
        self.wanted = True

    def queue(self, role: Role) -> Span:
        """Begin the wait for a slot of a stage."""
        if self.span is NO_SPAN:
            return NO_SPAN
        return self.span.child(f"queue {role.value}", {"vllm_pd.stage": role.value})

    def waited(self, wait_s: float) -> None:
        """Take note of how long such a wait was."""
        self.queue_s = (self.queue_s or 0.0) + wait_s

    def leg(self, role: Role, base_url: str, *, method: str = "POST", path: str) -> Span:
        """Begin an attempt on an instance."""
        if role is Role.PREFILL:
            num_before, self.prefill = self.num_prefills, base_url
            self.num_prefills += 1
        else:
            num_before, self.decode = self.num_decodes, base_url
            self.num_decodes += 1
        if self.span is NO_SPAN:
            return NO_SPAN
        url = URL(base_url)
        return self.span.child(
            role.value,
            {
                "http.request.method": method,
                "http.request.resend_count": num_before,
                "server.address": url.host or "",
                "server.port": url.port or 0,
                "url.path": path,
            },
            is_leg=True,
        )

    def note_first_bytes(self) -> None:
        """Take note that an instance has begun to answer."""
        self.first_bytes_s = time.monotonic() - self.began

    def note_prompt(self, reply: bytes) -> None:
        """Take a prefill instance's answer, for its counts should no other have them."""
        if self.wanted:
            self.prefill_reply = reply

    def passed(self, data: bytes) -> None:
        """Take note of a part of the answer that was passed on to the client."""
        self.response_len += len(data)
        if self.wanted:
            if self.tail is None:
                self.tail = deque(maxlen=_NUM_TAIL)
            self.tail.append(data)

    def note_model(self, name: object) -> None:
        """Take note of the model that the client asks for."""
        if isinstance(name, str):
            self.model = name[:_MAX_MODEL_LEN]

    def end(self) -> None:
        """The answer has ended: read what its end says, and end the span."""
        if self.tail is not None:
            self._note_usage(b"".join(self.tail), is_prefill=False)
        if self.prompt_tokens is None and self.prefill_reply is not None:
            self._note_usage(self.prefill_reply, is_prefill=True)
        if self.span is not NO_SPAN:
            self._end_span()

    def _note_usage(self, data: bytes, *, is_prefill: bool) -> None:
        start = _usage_in(data)
        if start < 0:
            return
        counts = {
            found[1]: int(found[2]) for found in _COUNT.finditer(data, start, start + _USAGE_LEN)
        }
        self.prompt_tokens = _first(counts, b"prompt_tokens", b"input_tokens", self.prompt_tokens)
        self.cached_tokens = _first(counts, b"cached_tokens", b"", self.cached_tokens)
        if not is_prefill:
            self.completion_tokens = _first(counts, b"completion_tokens", b"output_tokens", None)

    def _end_span(self) -> None:
        """End the request's span, with what is known now."""
        code = self.outcome.code if self.outcome else 500
        found: dict[str, str | int | float | None] = {
            "http.response.status_code": code,
            "vllm_pd.path": self.outcome.path if self.outcome else None,
            "vllm_pd.retries": self.num_retries,
            "vllm_pd.api_key": self.api_key,
            "gen_ai.request.model": self.model,
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": self.cached_tokens,
            "gen_ai.usage.output_tokens": self.completion_tokens,
            "gen_ai.latency.time_in_queue": self.queue_s,
            "vllm_pd.first_bytes_s": self.first_bytes_s,
        }
        attributes: Attributes = {name: one for name, one in found.items() if one is not None}
        self.span.note(attributes)
        if code >= 500:  # for a server, what a client does wrong is no error
            self.span.fail(self.error or str(code))
        self.span.end()


def _usage_in(data: bytes) -> int:
    """Return where the last usage of an answer begins, or -1; it may be a word of the text, too."""
    end = len(data)
    while (start := data.rfind(_USAGE_KEY, 0, end)) >= 0:
        if _USAGE.match(data, start):
            return start
        end = start
    return -1


def _first(counts: dict[bytes, int], name: bytes, other: bytes, old: int | None) -> int | None:
    return counts.get(name, counts.get(other, old))


# Newer ones warn of a key that is text, older ones have no other.
_KEY: Any = web.RequestKey("record", Record) if hasattr(web, "RequestKey") else "vllm_pd_record"
