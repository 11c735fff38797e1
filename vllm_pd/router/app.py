"""The router's web application: routes, handlers, errors."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from vllm_pd.config import Role, RouterConfig
from vllm_pd.router import policy
from vllm_pd.router.admin import Admin, AdminKey
from vllm_pd.router.api_keys import Access
from vllm_pd.router.dashboard import Dashboard, Sources
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.newcomers import Newcomers
from vllm_pd.router.observe import observe
from vllm_pd.router.record import Record
from vllm_pd.router.replies import error_response
from vllm_pd.router.resources import (
    ACCESS,
    CONFIG,
    METRICS,
    NEWCOMERS,
    POOL,
    PROXY,
    RNG,
    SHARED,
    STAGES,
    resources,
)
from vllm_pd.router.stored import CANCEL_ROUTE, GET_ROUTE
from vllm_pd.router.workers import changes
from vllm_pd.router.workers.shared import Shared

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(
    config: RouterConfig, *, rng: random.Random | None = None, shared: Shared | None = None
) -> web.Application:
    """Return the application; its resources live from its startup to its cleanup.

    Serve it with ``handler_cancellation=True``: a client's disconnect must end the
    request on the instances.

    Args:
        config: of the router.
        rng: decides between instances that are equal.
        shared: what it shares with the other workers; None: it is the only process.

    Raises:
        ConfigError: a key file cannot be used.
    """
    app = web.Application(
        # aiohttp has changed its mind about whether the limit itself is too much.
        client_max_size=config.max_body_len + 1,
    )
    observe(app, config)
    app.middlewares.append(_errors_like_vllm)
    app[CONFIG] = config
    app[RNG] = rng or random.Random()
    app[METRICS] = Metrics()
    if shared is not None:
        app[SHARED] = shared
    app[ACCESS] = Access.from_config(
        config, None if shared is None else functools.partial(shared.row, "client")
    )
    app[NEWCOMERS] = Newcomers()
    app.cleanup_ctx.append(resources)
    app.add_routes(
        [
            web.post("/v1/completions", _generate),
            web.post("/v1/chat/completions", _generate),
            web.post("/v1/responses", _generate),
            web.get(GET_ROUTE, _stored, allow_head=False),
            web.post(CANCEL_ROUTE, _stored),
            web.post("/v1/embeddings", _forward),
            web.post("/tokenize", _forward),
            web.post("/detokenize", _forward),
            web.get("/v1/models", _forward, allow_head=False),
            web.get("/health", _health, allow_head=False),
            web.get("/ready", _ready, allow_head=False),
            web.get("/metrics", _metrics, allow_head=False),
        ]
    )
    app.add_routes(Dashboard(_dashboard_sources).routes())
    if config.admin_key_file is not None:
        key = AdminKey.read(Path(config.admin_key_file))
        app.add_routes(Admin(key, lambda request: request.app[POOL], _make_change).routes())
    return app


@web.middleware
async def _errors_like_vllm(request: web.Request, handler: Handler) -> web.StreamResponse:
    request.app[NEWCOMERS].note(request)
    try:
        return await handler(request)
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        Record.of(request).error = exc.reason
        allow = exc.headers.get("Allow")
        # vLLM leaves these to FastAPI, which words them so.
        return web.json_response(
            {"detail": HTTPStatus(exc.status).phrase},
            status=exc.status,
            headers={"Allow": allow} if allow else None,
        )
    except ConnectionResetError:
        # The client has left, there is nobody to tell. Of anything but a cancellation
        # aiohttp would log a traceback.
        raise asyncio.CancelledError from None
    except Exception:
        record = Record.of(request)
        record.error = "the router failed; its log has a traceback"
        logger.exception("%s %s failed (%s)", request.method, request.path, record.request_id)
        if record.is_answered:  # a second answer would be read as a part of the first
            if request.transport is not None:
                request.transport.abort()
            raise asyncio.CancelledError from None
        return error_response(500, "Internal Server Error")


async def _generate(request: web.Request) -> web.StreamResponse:
    return await request.app[PROXY].generate(request)


async def _forward(request: web.Request) -> web.StreamResponse:
    return await request.app[PROXY].forward(request)


async def _stored(request: web.Request) -> web.StreamResponse:
    return await request.app[PROXY].stored(request)


async def _health(_request: web.Request) -> web.Response:
    return web.Response()


async def _ready(request: web.Request) -> web.Response:
    pool = request.app[POOL]
    ready = policy.has_pair(pool.snapshot(Role.PREFILL), pool.snapshot(Role.DECODE))
    instances = [
        {"role": one.role.value, "url": one.base_url, "healthy": pool.is_accepting(one)}
        for one in pool
    ]
    return web.json_response({"ready": ready, "instances": instances}, status=200 if ready else 503)


def _dashboard_sources(request: web.Request) -> Sources:
    app = request.app
    stages = app[STAGES]
    return Sources(app[POOL], app[METRICS], stages, app[CONFIG].workers, app.get(SHARED))


async def _make_change(request: web.Request, change: changes.Change) -> None:
    shared = request.app.get(SHARED)
    if shared is None:
        changes.make(change, request.app[POOL])
    else:
        await shared.make(change)


async def _metrics(request: web.Request) -> web.Response:
    shared = request.app.get(SHARED)
    if shared is None:
        text = request.app[METRICS].render(request.app[POOL])
    else:
        text = await shared.page()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})
