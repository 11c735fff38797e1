"""Which HTTP headers cross the router, in both directions."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from multidict import CIMultiDict

REQUEST_ID = "X-Request-Id"
"""Names the request on both legs and in the answer to the client."""

PD_PATH = "X-VLLM-PD-Path"
"""Tells the client how its request was served: one of the ``PATH_*`` values."""

PRIORITY = "X-Priority"
"""Orders a request in the router's queues, over the body's ``priority``."""

PATH_DISAGGREGATED = "disaggregated"
PATH_DECODE_ONLY = "decode-only"

MAX_REQUEST_ID_LEN = 128

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# The body is parsed and written anew (aiohttp has undone any compression of it).
_NOT_TO_INSTANCE = _HOP_BY_HOP | {
    "accept-encoding",
    "content-encoding",
    "content-length",
    "expect",
    "host",
    "x-data-parallel-rank",  # picks an engine: not for clients
    REQUEST_ID.lower(),
}
_NOT_TO_CLIENT = _HOP_BY_HOP | {
    "content-length",
    "date",
    "server",
    PD_PATH.lower(),
    REQUEST_ID.lower(),
}


def choose_request_id(headers: Mapping[str, str]) -> str:
    """Return the client's request id if it can be used as one, else a new one."""
    given = headers.get(REQUEST_ID, "")
    if 0 < len(given) <= MAX_REQUEST_ID_LEN and given.isascii() and given.isprintable():
        return given
    return str(uuid.uuid4())


def to_instance(headers: Mapping[str, str], request_id: str) -> CIMultiDict[str]:
    """Return the headers of a leg, made from the client's, ``Authorization`` included."""
    kept = _without(headers, _NOT_TO_INSTANCE)
    kept["Accept-Encoding"] = "identity"  # the bytes are passed on as they come
    kept[REQUEST_ID] = request_id
    return kept


def to_client(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers of the answer, made from an instance's."""
    return _without(headers, _NOT_TO_CLIENT)


def _without(headers: Mapping[str, str], names: frozenset[str]) -> CIMultiDict[str]:
    # A Connection header names further headers that are meant for one hop only.
    if named := headers.get("Connection"):
        names = names.union(name.strip().lower() for name in named.split(","))
    return CIMultiDict([item for item in headers.items() if item[0].lower() not in names])
