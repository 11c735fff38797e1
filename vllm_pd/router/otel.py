"""Traces by OpenTelemetry; the only module that imports it, and only if it is asked for.

A request's trace, with what vLLM adds to it if it runs with ``--otlp-traces-endpoint``::

    POST /v1/chat/completions           router, SERVER, child of the client's traceparent
    ├── queue decode                    wait for a slot of the decode stage
    ├── queue prefill                   wait for a slot of the prefill stage
    ├── prefill                         one attempt on a prefill instance, CLIENT
    │   └── llm_request                 vLLM's
    └── decode                          one attempt on a decode instance, CLIENT
        └── llm_request                 vLLM's

vLLM 0.32 reads ``traceparent`` and ``tracestate`` of each request
(``vllm/tracing/utils.py``), and takes them as the parent of its span ``llm_request``
(``vllm/v1/engine/output_processor.py``, ``do_tracing``).

Everything else is OpenTelemetry's own: its environment variables choose the protocol,
headers, sampling and the size of batches. A thread of its SDK sends the spans; if the
collector is slow the SDK drops spans, and never holds a request up.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from multidict import CIMultiDict
from opentelemetry import trace
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_PROTOCOL,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
)
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vllm_pd import __version__
from vllm_pd.errors import ConfigError
from vllm_pd.router.background import finish
from vllm_pd.router.instance import describe
from vllm_pd.router.spans import Attributes, Span, Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

_NAME = "vllm-pd-router"
_CLOSE_TIMEOUT_S = 5.0
_W3C = TraceContextTextMapPropagator()


class OtelSpan(Span):
    """A span of OpenTelemetry."""

    __slots__ = ("_ended", "_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._ended = False

    @property
    def trace_id(self) -> str | None:
        """Return the trace's name, as in ``traceparent``."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def child(self, name: str, attributes: Attributes, *, is_leg: bool = False) -> Span:
        """Begin a part of it."""
        kind = trace.SpanKind.CLIENT if is_leg else trace.SpanKind.INTERNAL
        context = trace.set_span_in_context(self._span)
        return OtelSpan(
            self._tracer, self._tracer.start_span(name, context, kind, attributes=attributes)
        )

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return them with this span in place of what the client sent."""
        named = CIMultiDict(headers)
        for name in _W3C.fields:
            named.popall(name, None)
        _W3C.inject(named, trace.set_span_in_context(self._span))
        return named

    def note(self, attributes: Attributes) -> None:
        """Add attributes."""
        if not self._ended:
            self._span.set_attributes({name: _text(value) for name, value in attributes.items()})

    def answered(self, status: int) -> None:
        """Take note that an instance has begun to answer."""
        self._span.add_event("answer begins")
        self._span.set_attribute("http.response.status_code", status)
        if status >= 400:
            self.fail(str(status))

    def fail(self, error: BaseException | str) -> None:
        """Take note of a failure."""
        if self._ended:
            return
        if isinstance(error, asyncio.CancelledError):
            self._span.set_attribute("vllm_pd.cancelled", True)  # noqa: FBT003 - their interface
            return
        if isinstance(error, str):
            kind, description = "_OTHER", error
        else:
            kind, description = type(error).__name__, describe(error)
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.StatusCode.ERROR, description)

    def end(self) -> None:
        """End it; idempotent."""
        if not self._ended:
            self._ended = True
            self._span.end()


class OtelTracer(Tracer):
    """Sends spans to a collector, by a provider of its own."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("vllm_pd.router", __version__)

    @classmethod
    def open(cls, endpoint: str) -> Self:
        """Begin to send to a collector, in the protocol that the environment names.

        Raises:
            ConfigError: that protocol is unknown, or its package is missing.
        """
        # Else it waits at exit for a collector that is not there.
        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
        return cls(provider)

    def begin(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
        """Begin a request's span; without a good ``traceparent`` in a trace of its own."""
        span = self._tracer.start_span(
            name, _W3C.extract(headers), trace.SpanKind.SERVER, attributes=attributes
        )
        return OtelSpan(self._tracer, span)

    async def close(self) -> None:
        """Send what is left, within a few seconds."""
        if not await finish(self._provider.shutdown, timeout_s=_CLOSE_TIMEOUT_S, name="traces"):
            logger.warning("the last spans are lost: their collector does not take them")


def _resource() -> Resource:
    """Return who sends the spans; ``OTEL_SERVICE_NAME`` and the like have the last word."""
    named = Resource.create({SERVICE_NAME: _NAME})
    return named.merge(OTELResourceDetector().detect())


def _exporter(endpoint: str) -> SpanExporter:
    # vLLM 0.32 decides so, too (vllm/tracing/otel.py): one environment fits both.
    protocol = (
        os.environ.get(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL)
        or os.environ.get(OTEL_EXPORTER_OTLP_PROTOCOL)
        or "grpc"
    )
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

        return http.OTLPSpanExporter(endpoint=endpoint)
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

        return grpc.OTLPSpanExporter(endpoint=endpoint, insecure=True)  # but for https://
    raise ConfigError(
        f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: {protocol!r} is not supported",
        hint='use "grpc" or "http/protobuf"',
    )


def _text(value: str | float) -> str | float:
    """Return a value that can be exported: clients may send lone surrogates, which are no text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
