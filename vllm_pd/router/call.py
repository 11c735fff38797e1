"""One client request, and what stays the same on all of its legs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web
from multidict import CIMultiDict

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.router import body as bodies
from vllm_pd.router import headers as http_headers
from vllm_pd.router.affinity import Matches, Prompt
from vllm_pd.router.api_keys import Client
from vllm_pd.router.headers import PD_PATH, REQUEST_ID
from vllm_pd.router.instance import describe
from vllm_pd.router.metrics import Outcome


@dataclass(frozen=True, slots=True)
class Call:
    """What stays the same on every leg of one client request.

    Attributes:
        request: the client's request.
        request_id: names it on every leg.
        headers: headers of every leg.
        outcome: how it goes, for the metrics.
        client: whose request it is.
    """

    request: web.Request
    request_id: str
    headers: CIMultiDict[str]
    outcome: Outcome
    client: Client

    @classmethod
    def begin(cls, request: web.Request, outcome: Outcome, client: Client) -> Self:
        """Name a request and make the headers of its legs."""
        request_id = http_headers.choose_request_id(request.headers)
        leg_headers = http_headers.to_instance(request.headers, request_id)
        return cls(request, request_id, leg_headers, outcome, client)

    @property
    def path(self) -> str:
        """Path of the endpoint, the same on router and instances."""
        return self.request.path

    def answer_headers(self) -> CIMultiDict[str]:
        """Return the headers that the router adds to every answer."""
        added = CIMultiDict({REQUEST_ID: self.request_id})
        if self.outcome.path != "none":
            added[PD_PATH] = self.outcome.path
        return added

    async def read(self, max_body_len: int) -> bytes:
        """Return the body that the client sent.

        Raises:
            web.HTTPRequestEntityTooLarge: it is longer than ``max_body_len`` bytes.
            RemoteProtocolError: it is damaged.
        """
        length = self.request.content_length
        if length is not None and length > max_body_len:
            raise web.HTTPRequestEntityTooLarge(max_body_len, length)
        try:
            raw = await self.request.read()
        except web.RequestPayloadError as exc:
            raise RemoteProtocolError(f"the request body is damaged: {describe(exc)}") from exc
        if len(raw) > max_body_len:
            raise web.HTTPRequestEntityTooLarge(max_body_len, len(raw))
        return raw


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

    body: bodies.Body
    members: bodies.Body
    prompt: Prompt
    matches: Matches
    priority: int

    def leg(self, kv_params: dict[str, Any] | None) -> bytes:
        """Return the body of the decode leg."""
        return bodies.dump(bodies.decode_body(self.members, kv_params))
