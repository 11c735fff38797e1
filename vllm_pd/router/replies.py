"""Answers that the router gives by itself, in the error shape of vLLM's API server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import web

SSE_CONTENT_TYPE = "text/event-stream"


def error_body(status: int, message: str) -> bytes:
    """Return the JSON that vLLM 0.32 sends with an error status."""
    error = {
        "message": message,
        "type": HTTPStatus(status).phrase,
        "param": None,
        "code": status,
    }
    return json.dumps({"error": error}).encode()


def error_response(
    status: int, message: str, *, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return an error answer; ``headers`` are added to it."""
    return web.Response(
        status=status,
        body=error_body(status, message),
        content_type="application/json",
        headers=headers,
    )


def error_event(status: int, message: str) -> bytes:
    """Return an error as one event of a stream whose status has already been sent.

    It starts with an empty line, because the stream may have broken inside an
    event: what is left of that one must not swallow this one.
    """
    return b"\n\ndata: " + error_body(status, message) + b"\n\n"
