"""vLLM's own routes for stored responses behind a router; its API server without an engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from tests.ports import free_ports
from tests.unit.router.fakes import Client, start_client
from tests.unit.router.workers.deployment import until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]


def background_response(response_id: str) -> Any:
    """Return what vLLM stores when a response is to be made in the background."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse

    request = ResponsesRequest.model_validate(
        {"request_id": response_id, "model": "m", "input": "hi", "background": True}
    )
    return ResponsesResponse.from_request(
        request,
        SamplingParams(max_tokens=4),
        model_name="m",
        created_time=0,
        output=[],
        status="queued",
        usage=None,
    )


@asynccontextmanager
async def vllm_server(*response_ids: str) -> AsyncIterator[str]:
    """Serve vLLM's routes from a store; gives the base URL."""
    import uvicorn
    from fastapi import FastAPI
    from vllm.entrypoints.openai.responses.api_router import attach_router
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    serving = object.__new__(OpenAIServingResponses)  # what needs no engine
    serving.response_store = {one: background_response(one) for one in response_ids}
    serving.response_store_lock = asyncio.Lock()
    serving.background_tasks = {}
    serving.event_store = {one: (deque(), asyncio.Event()) for one in response_ids}
    app = FastAPI()
    attach_router(app)
    app.get("/health")(lambda: None)
    app.state.openai_serving_responses = serving
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


@pytest.fixture
async def router() -> AsyncIterator[Client]:
    """A router in front of three instances; the last one has stored a response."""
    async with AsyncExitStack() as stack:
        stores: tuple[tuple[str, ...], ...] = ((), (), ("resp_1",))
        urls = [await stack.enter_async_context(vllm_server(*ids)) for ids in stores]
        router = await start_client(
            [], [], prefill_urls=tuple(urls[:1]), decode_urls=tuple(urls[1:])
        )
        stack.push_async_callback(router.close)
        yield router


async def test_a_stored_response_is_fetched_and_cancelled(router: Client) -> None:
    async with router.get("/v1/responses/resp_1") as response:
        assert (await response.json())["status"] == "queued"
    async with router.post("/v1/responses/resp_1/cancel") as response:
        assert (await response.json())["status"] == "cancelled"
    async with router.get("/v1/responses/resp_1") as response:
        assert (await response.json())["status"] == "cancelled"


async def test_vllm_words_what_is_wrong(router: Client) -> None:
    async with router.get("/v1/responses/resp_2") as response:
        assert response.status == 404
        error = (await response.json())["error"]
        assert error["message"] == "Response with id 'resp_2' not found."
        assert error["param"] == "response_id"
