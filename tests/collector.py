"""An OTLP/HTTP collector on loopback, and the trees that its spans make."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

OK, ERROR = 0, 2
"""Status codes of spans: unset, which is good, and error."""

INTERNAL, SERVER, CLIENT = 1, 2, 3


@dataclass(frozen=True)
class Seen:
    """A span as it came over the wire."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    status: int
    message: str
    attributes: dict[str, Any]
    events: list[str]
    began_ns: int
    ended_ns: int


@dataclass
class Collector:
    """Keeps what it is sent."""

    spans: list[Seen] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._server = TestServer(app)
        await self._server.start_server()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._server.close()

    @property
    def endpoint(self) -> str:
        return str(self._server.make_url("/v1/traces"))

    def root(self) -> Seen:
        """Return the only span of the router's own that is no part of another of them."""
        ids = {span.span_id for span in self.spans}
        (root,) = (span for span in self.spans if span.parent_id not in ids)
        return root

    def children(self, parent: Seen) -> list[Seen]:
        """Return the parts of a span, in the order in which they began."""
        parts = [span for span in self.spans if span.parent_id == parent.span_id]
        return sorted(parts, key=lambda span: span.began_ns)

    async def _take(self, request: web.Request) -> web.Response:
        raw = await request.read()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        message = ExportTraceServiceRequest.FromString(raw)
        for resource_spans in message.resource_spans:
            self.resources.append(_plain(resource_spans.resource.attributes))
            for scope_spans in resource_spans.scope_spans:
                self.spans += [_seen(span) for span in scope_spans.spans]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )


def _seen(span: Any) -> Seen:
    return Seen(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        span.kind,
        span.status.code,
        span.status.message,
        _plain(span.attributes),
        [event.name for event in span.events],
        span.start_time_unix_nano,
        span.end_time_unix_nano,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
