from __future__ import annotations

import uuid

import pytest
from multidict import CIMultiDict

from vllm_pd.router import headers


def test_a_usable_request_id_of_the_client_is_kept() -> None:
    assert headers.choose_request_id(CIMultiDict({"x-request-id": "my id-7"})) == "my id-7"


@pytest.mark.parametrize("given", ["", "x" * 129, "a\nb", "\u00e4"])
def test_an_unusable_request_id_is_replaced(given: str) -> None:
    chosen = headers.choose_request_id(CIMultiDict({"X-Request-Id": given}))

    assert str(uuid.UUID(chosen)) == chosen


def test_the_clients_key_and_trace_reach_the_instances() -> None:
    client = CIMultiDict({"Authorization": "Bearer k", "traceparent": "00-1"})

    leg = headers.to_instance(client, "id")

    assert leg == CIMultiDict(
        {
            "Authorization": "Bearer k",
            "traceparent": "00-1",
            "Accept-Encoding": "identity",
            "X-Request-Id": "id",
        }
    )


def test_headers_of_the_clients_connection_stay_there() -> None:
    client = CIMultiDict(
        {
            "Host": "router",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "1",
            "Content-Length": "3",
            "Content-Encoding": "gzip",
            "Transfer-Encoding": "chunked",
            "Accept-Encoding": "br",
            "Expect": "100-continue",
        }
    )

    leg = headers.to_instance(client, "id")

    assert leg == CIMultiDict({"Accept-Encoding": "identity", "X-Request-Id": "id"})


def test_an_instances_content_headers_reach_the_client() -> None:
    instance = CIMultiDict(
        {
            "Content-Type": "text/event-stream",
            "Content-Length": "3",
            "Server": "uvicorn",
            "Transfer-Encoding": "chunked",
            "X-Custom": "1",
        }
    )

    assert headers.to_client(instance) == CIMultiDict(
        {"Content-Type": "text/event-stream", "X-Custom": "1"}
    )
