"""Takes the picture of the dashboard that the documentation shows.

    python tools/dashboard_picture.py docs/images/dashboard.png
    python tools/dashboard_picture.py FILE --instances 64 --width 390 --dark --seconds 20

The router is the real one, in a process of its own. The instances are stand-ins that
answer as instances of a small model might, with made-up times and loads. Needs Chromium
and the test tools.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

import aiohttp  # noqa: E402
from aiohttp import web  # noqa: E402
from PIL import Image  # noqa: E402
from prometheus_client import CollectorRegistry, Histogram, generate_latest  # noqa: E402

from tests.browser import chromium  # noqa: E402
from tests.ports import free_ports  # noqa: E402

MODEL = "Qwen/Qwen2.5-7B-Instruct"
REQUESTS_PER_S = 12.0
MAX_OPEN = 200
_FETCH_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)  # seconds
_DICE = random.Random(4)


@dataclass
class StandIn:
    """An instance that computes nothing."""

    is_prefill: bool
    num_running: int = 0
    url: str = ""

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Listen until the stack ends."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        self._base = _DICE.uniform(0.15, 0.8)
        self._registry = CollectorRegistry()
        name = "vllm_pd:kv_fetch_seconds"
        self._fetches = Histogram(name, name, registry=self._registry, buckets=_FETCH_BUCKETS)

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _request: web.Request) -> web.Response:
        usage = min(1.0, self._base + 0.02 * self.num_running + _DICE.uniform(0, 0.03))
        values = {
            "num_requests_running": self.num_running,
            "num_requests_waiting": max(0, self.num_running - 8),
            "kv_cache_usage_perc": usage,
        }
        labels = f'{{engine="0",model_name="{MODEL}"}}'
        lines = [f"vllm:{name}{labels} {value}" for name, value in values.items()]
        fetches = generate_latest(self._registry).decode()
        return web.Response(text="\n".join(["# metrics", *lines, fetches]))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.num_running += 1
        try:
            return await (self._prefill() if self.is_prefill else self._decode(request, body))
        finally:
            self.num_running -= 1

    async def _prefill(self) -> web.Response:
        await asyncio.sleep(_DICE.lognormvariate(-2.6, 0.5))
        num_tokens = _DICE.randrange(300, 4000)
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [1],
            "remote_engine_id": "e",
            "remote_host": "127.0.0.1",
            "remote_port": 9,
            "remote_num_tokens": num_tokens,
            "remote_prompt_digest": "d",
        }
        details = {"cached_tokens": num_tokens // 4}
        usage = {"prompt_tokens": num_tokens, "prompt_tokens_details": details}
        return web.json_response({"choices": [], "usage": usage, "kv_transfer_params": params})

    async def _decode(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        queue_s, fetch_s = _DICE.lognormvariate(-6.5, 0.8), _DICE.lognormvariate(-5, 0.4)
        await asyncio.sleep(queue_s + fetch_s + 0.02)
        self._fetches.observe(fetch_s)
        if not body.get("stream"):
            await asyncio.sleep(0.4)
            told = {"outcome": "ok", "total_s": fetch_s, "engine_queue_s": queue_s}
            return web.json_response({"choices": [], "kv_transfer_params": {"timeline": told}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        with contextlib.suppress(ConnectionResetError):  # the router gave up
            await response.prepare(request)
            for _ in range(_DICE.randrange(8, 60)):
                await response.write(b'data: {"choices": [{"delta": {"content": " word"}}]}\n\n')
                await asyncio.sleep(_DICE.lognormvariate(-3.6, 0.15))
            await response.write(b"data: [DONE]\n\n")
        return response


@contextlib.asynccontextmanager
async def router_before(instances: list[StandIn]) -> AsyncIterator[str]:
    """Run the router in a process of its own, and return its URL."""
    (port,) = free_ports(1)
    argv = ["-m", "vllm_pd.cli", "router", "--port", str(port)]
    for one in instances:
        argv += ["--prefill" if one.is_prefill else "--decode", one.url]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, cwd=REPO, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.get(f"{url}/ready") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.1)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def send_requests(url: str) -> None:
    """Send requests at random moments, until cancelled."""
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        limit = asyncio.Semaphore(MAX_OPEN)
        while True:
            await asyncio.sleep(_DICE.expovariate(REQUESTS_PER_S))
            await limit.acquire()
            task = tasks.create_task(_send(session, f"{url}/v1/chat/completions"))
            task.add_done_callback(lambda _: limit.release())


async def _send(session: aiohttp.ClientSession, url: str) -> None:
    message = {"role": "user", "content": "word " * 500}
    body: dict[str, Any] = {"model": MODEL, "messages": [message]}
    fate = _DICE.random()
    if fate < 0.03:
        body["n"] = 2
    with contextlib.suppress(aiohttp.ClientError):
        async with session.post(url, json=body | {"stream": fate < 0.85}) as response:
            await response.read()


async def take(options: argparse.Namespace, profile: Path) -> bytes:
    """Let the service work for a while, and return the picture."""
    program = chromium.find()
    if program is None:
        sys.exit("error: no chromium here: apt-get install chromium")
    instances = [StandIn(index < options.instances // 2) for index in range(options.instances)]
    async with contextlib.AsyncExitStack() as stack:
        for one in instances:
            await one.start(stack)
        gone = contextlib.AsyncExitStack()
        if options.instances > 2:  # one of them dies soon
            extra = StandIn(is_prefill=False)
            await extra.start(gone)
            instances.append(extra)
        url = await stack.enter_async_context(router_before(instances))
        load = asyncio.create_task(send_requests(url))
        await asyncio.sleep(options.seconds / 2)
        await gone.aclose()
        await asyncio.sleep(options.seconds / 2)
        page = await stack.enter_async_context(chromium.opened(program, profile))
        await page.resize(options.width, dark=options.dark)
        await page.open(f"{url}/dashboard")
        await page.wait_until("!document.getElementById('main').hidden")
        picture = await page.picture()
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        if page.problems:
            sys.exit(f"error: the page has problems: {page.problems}")
    return picture


def _write(png: bytes, file: Path) -> None:
    """Write a picture with few colours, as it goes into the repository."""
    with Image.open(io.BytesIO(png)) as picture:
        small = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3)
        small.save(file, optimize=True)


def main() -> None:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="PNG to write")
    parser.add_argument("--instances", type=int, default=8, help="how many there are [8]")
    parser.add_argument("--width", type=int, default=1280, help="of the window in pixels [1280]")
    parser.add_argument("--seconds", type=float, default=150.0, help="how long they work [150]")
    parser.add_argument("--dark", action="store_true", help="as for who prefers dark colours")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dashboard-", ignore_cleanup_errors=True) as profile:
        _write(asyncio.run(take(options, Path(profile))), options.file)


if __name__ == "__main__":
    main()
