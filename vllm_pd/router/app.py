"""The router's web application: routes, resources, errors, start and stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from http import HTTPStatus

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST
from yarl import URL

from vllm_pd.config import Role, RouterConfig
from vllm_pd.errors import ConfigError
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.proxy import Proxy
from vllm_pd.router.replies import error_response
from vllm_pd.router.upstream import Upstream

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONFIG = web.AppKey("config", RouterConfig)
METRICS = web.AppKey("metrics", Metrics)
POOL = web.AppKey("pool", InstancePool)
PROXY = web.AppKey("proxy", Proxy)

SHUTDOWN_TIMEOUT_S = 10.0
"""Longest wait for open requests when the router is told to stop."""


def create_app(config: RouterConfig) -> web.Application:
    """Return the application; its resources live from its startup to its cleanup.

    Serve it with ``handler_cancellation=True``: a client's disconnect must end the
    request on the instances.
    """
    app = web.Application(
        middlewares=[_errors_like_vllm],
        # aiohttp has changed its mind about whether the limit itself is too much.
        client_max_size=config.max_body_len + 1,
    )
    app[CONFIG] = config
    app[METRICS] = Metrics()
    app.cleanup_ctx.append(_resources)
    app.add_routes(
        [
            web.post("/v1/completions", _generate),
            web.post("/v1/chat/completions", _generate),
            web.get("/v1/models", _models, allow_head=False),
            web.get("/health", _health, allow_head=False),
            web.get("/ready", _ready, allow_head=False),
            web.get("/metrics", _metrics, allow_head=False),
        ]
    )
    return app


def run(config: RouterConfig) -> int:
    """Serve until SIGINT or SIGTERM; a second signal does not wait for open requests.

    Returns:
        The process's exit code.

    Raises:
        ConfigError: the address cannot be used, a role has no instance, or an
            instance's address is none.
    """
    _check_instances(Role.PREFILL, config.prefill_urls)
    _check_instances(Role.DECODE, config.decode_urls)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run_until_signal(config))
    return 0


async def serve(config: RouterConfig, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set, then finish the open requests.

    Raises:
        ConfigError: the address cannot be used.
    """
    runner = web.AppRunner(
        create_app(config),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port)
        try:
            await site.start()
        except OSError as exc:
            raise _listen_error(config, exc) from exc
        logger.info("router listens on %s", site.name)
        await stop.wait()
    finally:
        await runner.cleanup()


async def _run_until_signal(config: RouterConfig) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop_once() -> None:
        stop.set()
        for number in signals:  # the next one has its default effect
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, stop_once)
    await serve(config, stop)


def _check_instances(role: Role, urls: Collection[str]) -> None:
    if not urls:
        raise ConfigError(f"no {role.value} instance given", hint=f"set {role.value}_urls")
    for url in urls:
        try:
            host = URL(url).host
        except ValueError as exc:
            raise ConfigError(f"{role.value} instance address {url!r}: {exc}") from exc
        if not host:
            raise ConfigError(f"{role.value} instance address {url!r} has no host")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # not on every platform
    except ImportError:
        return None
    return uvloop.new_event_loop


def _listen_error(config: RouterConfig, exc: OSError) -> ConfigError:
    if exc.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {config.port} on {config.host} is already in use",
            hint="stop what uses it, or choose another port",
        )
    return ConfigError(f"cannot listen on {config.host}, port {config.port}: {exc.strerror}")


async def _resources(app: web.Application) -> AsyncIterator[None]:
    config = app[CONFIG]
    async with Upstream(config) as upstream:
        pool = InstancePool(
            config.prefill_urls,
            config.decode_urls,
            probe=upstream.is_healthy,
            health_interval_s=config.health_interval_s,
        )
        app[POOL] = pool
        app[PROXY] = Proxy(pool, upstream, app[METRICS], max_body_len=config.max_body_len)
        await pool.start()
        try:
            yield
        finally:
            await pool.stop()


@web.middleware
async def _errors_like_vllm(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        allow = exc.headers.get("Allow")
        # vLLM leaves these to FastAPI, which words them so.
        return web.json_response(
            {"detail": HTTPStatus(exc.status).phrase},
            status=exc.status,
            headers={"Allow": allow} if allow else None,
        )
    except ConnectionResetError:
        raise  # the client has left; there is nobody to tell
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return error_response(500, "Internal Server Error")


async def _generate(request: web.Request) -> web.StreamResponse:
    return await request.app[PROXY].generate(request)


async def _models(request: web.Request) -> web.StreamResponse:
    return await request.app[PROXY].models(request)


async def _health(_request: web.Request) -> web.Response:
    return web.Response()


async def _ready(request: web.Request) -> web.Response:
    pool = request.app[POOL]
    ready = all(pool.has_healthy(role) for role in Role)
    instances = [
        {"role": one.role.value, "url": one.base_url, "healthy": one.healthy} for one in pool
    ]
    return web.json_response({"ready": ready, "instances": instances}, status=200 if ready else 503)


async def _metrics(request: web.Request) -> web.Response:
    text = request.app[METRICS].render(request.app[POOL])
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})
