"""One client request, and what stays the same on all of its legs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from aiohttp import StreamReader, web

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.router import body as bodies
from vllm_pd.router import headers as http_headers
from vllm_pd.router.affinity import Matches, Prompt
from vllm_pd.router.api_keys import Client
from vllm_pd.router.attempts import Attempts
from vllm_pd.router.body_budget import Hold
from vllm_pd.router.headers import PD_PATH
from vllm_pd.router.instance import describe
from vllm_pd.router.metrics import Outcome
from vllm_pd.router.record import Record
from vllm_pd.router.timeline import asking

if TYPE_CHECKING:
    from multidict import CIMultiDict


@dataclass(frozen=True, slots=True)
class Call:
    """What stays the same on every leg of one client request.

    Attributes:
        request: the client's request.
        request_id: names it on every leg.
        headers: headers of every leg.
        outcome: how it goes, for the metrics.
        client: whose request it is.
        record: what others will know of it.
        hold: what its body takes of the memory for bodies.
        attempts: those that broke at an instance, on all legs.
    """

    request: web.Request
    request_id: str
    headers: CIMultiDict[str]
    outcome: Outcome
    client: Client
    record: Record
    hold: Hold
    attempts: Attempts = field(default_factory=Attempts)

    @classmethod
    def begin(cls, request: web.Request, outcome: Outcome, client: Client, hold: Hold) -> Self:
        """Make the headers of a request's legs, and take note of whose it is."""
        record = Record.of(request)
        record.api_key = client.name or None
        leg_headers = http_headers.to_instance(request.headers, record.request_id)
        return cls(request, record.request_id, leg_headers, outcome, client, record, hold)

    @property
    def path(self) -> str:
        """Path of the endpoint, the same on router and instances."""
        return self.request.path

    @property
    def target(self) -> str:
        """Path and query of the endpoint, likewise."""
        query = self.request.rel_url.raw_query_string
        return f"{self.path}?{query}" if query else self.path

    def mark(self, headers: CIMultiDict[str]) -> CIMultiDict[str]:
        """Add what the router tells of itself to the headers of an answer, but for its id."""
        if self.outcome.path != "none":
            headers[PD_PATH] = self.outcome.path
        return headers

    async def read(self, max_body_len: int) -> bytes:
        """Return the body that the client sent; to be called once.

        Not by ``request.read()``, which keeps a copy: a connection holds its last request
        until the next one comes, so an idle one would hold as much memory as that had.

        Raises:
            web.HTTPRequestEntityTooLarge: it is longer than ``max_body_len`` bytes.
            RemoteProtocolError: it is damaged.
            OverloadedError: there is no memory for it.
        """
        length = self.request.content_length
        if length is not None:
            _check_len(length, max_body_len)
            self.hold.expect(length)
        content = self.request.content
        try:
            if content.is_eof():  # most often all of it came with the headers
                body = content.read_nowait()
                _check_len(len(body), max_body_len)
                self.hold.grow(len(body))
            else:
                body = await _read(content, max_body_len, self.hold)
        except web.RequestPayloadError as exc:
            raise RemoteProtocolError(f"the request body is damaged: {describe(exc)}") from exc
        self.record.request_len = len(body)
        return body


async def _read(content: StreamReader, max_body_len: int, hold: Hold) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    async for part in content.iter_any():
        parts.append(part)
        num_bytes += len(part)
        _check_len(num_bytes, max_body_len)
        hold.grow(len(part))
    return b"".join(parts)


def _check_len(body_len: int, max_body_len: int) -> None:
    if body_len > max_body_len:
        raise web.HTTPRequestEntityTooLarge(max_body_len, body_len)


@dataclass(frozen=True, slots=True)
class Job:
    """A body that makes an instance generate.

    Attributes:
        body: the client's, parsed.
        members: the same with values as they came, for the legs.
        prompt: what it asks for.
        matches: what the instances have seen of it.
        priority: the lower, the earlier.
    """

    body: dict[str, Any]
    members: dict[str, Any]
    prompt: Prompt
    matches: Matches
    priority: int

    def leg(self, kv_params: dict[str, Any] | None) -> bytes:
        """Return the body of the decode leg."""
        return bodies.dump(bodies.decode_body(self.members, asking(kv_params, self.body)))

    def forget(self) -> None:
        """Free the body: an instance has begun to answer, so no other one gets it."""
        self.body.clear()
        self.members.clear()
