"""A server with the OpenAI API that is as slow and as unreliable as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

TOKENIZER = Path(__file__).resolve().parents[3] / "vllm_pd/demo/data"


@dataclass
class Behaviour:
    """How the server behaves.

    Attributes:
        first_s: seconds to the first token.
        gap_s: seconds between tokens.
        is_serial: serve one request after the other.
        lose_every: drop every so manyth request; 0: none.
        cut_every: end the stream of every so manyth cleanly after half of its tokens.
        err_every: end it there with an error event, as vLLM does.
        on_prompt: called with the number of each prompt.
    """

    first_s: float = 0.01
    gap_s: float = 0.002
    is_serial: bool = False
    lose_every: int = 0
    cut_every: int = 0
    err_every: int = 0
    on_prompt: Callable[[int], object] = int
    prompts: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """Run the server in a thread; yield its base URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = web.AppRunner(_app(behaviour))

    async def start() -> str:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _app(behaviour: Behaviour) -> web.Application:
    turn = asyncio.Lock()

    async def models(_request: web.Request) -> web.Response:
        entry = {"id": "m", "root": str(TOKENIZER), "max_model_len": 4096}
        return web.json_response({"object": "list", "data": [entry]})

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        behaviour.prompts.append(body["prompt"])
        number = len(behaviour.prompts)
        behaviour.on_prompt(number)
        async with turn if behaviour.is_serial else contextlib.nullcontext():
            return await _stream(request, body, behaviour, number)

    async def health(_request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    return app


async def _stream(
    request: web.Request, body: dict[str, Any], behaviour: Behaviour, request_number: int
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await asyncio.sleep(behaviour.first_s)
    is_lost, is_cut, has_error = (
        bool(every) and request_number % every == 0
        for every in (behaviour.lose_every, behaviour.cut_every, behaviour.err_every)
    )
    if is_lost and request.transport is not None:
        request.transport.abort()
        return response
    for number in range(body["max_tokens"]):
        if number:
            await asyncio.sleep(behaviour.gap_s)
        if number == body["max_tokens"] // 2 and has_error:
            await _send(response, {"error": {"message": "engine\ndied", "code": 500}})
            await response.write(b"data: [DONE]\n\n")
            return response
        if number == body["max_tokens"] // 2 and is_cut:
            return response
        await _send(response, {"choices": [{"index": 0, "text": "x"}]})
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    await _send(response, {"choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
