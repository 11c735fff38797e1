"""Traces: what a request's path through the router tells of itself, and to whom.

Without ``otlp_traces_endpoint`` nobody listens: the spans do nothing, OpenTelemetry is
not imported, and a client's ``traceparent`` goes on to the instances as it came. With it,
see ``router.otel``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

from vllm_pd.errors import ConfigError

Attributes = Mapping[str, str | int | float | bool]


class Span(ABC):
    """A stretch of a request's time; the end of its ``with`` block ends it.

    An exception that leaves the block is its failure. A span ends once, at the first
    ``end``; what is noted later is lost. For use in the event loop's thread.
    """

    @abstractmethod
    def child(self, name: str, attributes: Attributes, *, is_leg: bool = False) -> Span:
        """Begin a part of it; ``is_leg``: it is a request to an instance."""

    @abstractmethod
    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers of a leg, so that the instance's spans become parts of this."""

    @abstractmethod
    def note(self, attributes: Attributes) -> None:
        """Add attributes."""

    @abstractmethod
    def answered(self, status: int) -> None:
        """Take note that an instance has begun to answer; from 400 on that is a failure."""

    @abstractmethod
    def fail(self, error: BaseException | str) -> None:
        """Take note of a failure; a cancellation is none."""

    @abstractmethod
    def end(self) -> None:
        """End it; idempotent."""

    @property
    @abstractmethod
    def trace_id(self) -> str | None:
        """The trace's name in hexadecimal digits; None: there is no trace."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        if exc is not None:
            self.fail(exc)
        self.end()


class NoSpan(Span):
    """What is not recorded."""

    trace_id = None

    def child(self, name: str, attributes: Attributes, *, is_leg: bool = False) -> Span:  # noqa: ARG002
        """Return this."""
        return self

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return them as they are, with what the client sent."""
        return headers

    def note(self, attributes: Attributes) -> None:
        """Do nothing."""

    def answered(self, status: int) -> None:
        """Do nothing."""

    def fail(self, error: BaseException | str) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


NO_SPAN = NoSpan()


class Tracer(ABC):
    """Begins the spans of requests."""

    @abstractmethod
    def begin(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
        """Begin a request's span, as a part of what the client's headers name."""

    @abstractmethod
    async def close(self) -> None:
        """Send what is left, within a few seconds."""


def open_tracer(endpoint: str) -> Tracer:
    """Return what traces requests to a collector.

    Raises:
        ConfigError: OpenTelemetry is not installed, or cannot be used so.
    """
    try:
        from vllm_pd.router.otel import OtelTracer  # an optional dependency

        return OtelTracer.open(endpoint)
    except ImportError as exc:
        raise ConfigError(
            f"otlp_traces_endpoint needs OpenTelemetry, and {exc.name} is missing",
            hint="pip install 'vllm-pd[otel]', or leave otlp_traces_endpoint out",
        ) from exc
