"""The router's web application: routes, resources, errors, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import random
import resource
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from vllm_pd.config import Role, RouterConfig
from vllm_pd.errors import ConfigError
from vllm_pd.router import heap, policy
from vllm_pd.router.activity import Timed
from vllm_pd.router.admin import Admin, AdminKey
from vllm_pd.router.admission import Stage
from vllm_pd.router.affinity import AffinityIndex
from vllm_pd.router.api_keys import Access
from vllm_pd.router.body_budget import BodyBudget
from vllm_pd.router.dashboard import Dashboard, Sources
from vllm_pd.router.describe import ControlLink
from vllm_pd.router.handovers import HandoverWatch
from vllm_pd.router.health import HealthLimits
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.instances_file import InstancesFile
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.newcomers import Newcomers
from vllm_pd.router.observe import observe, open_access_log
from vllm_pd.router.probes import Probes
from vllm_pd.router.proxy import Backend, Proxy
from vllm_pd.router.record import Record
from vllm_pd.router.replies import error_response
from vllm_pd.router.site import Site
from vllm_pd.router.spans import Tracer, open_tracer
from vllm_pd.router.stored import CANCEL_ROUTE, GET_ROUTE
from vllm_pd.router.tls import client_tls, server_tls
from vllm_pd.router.upstream import Upstream
from vllm_pd.router.workers import changes
from vllm_pd.router.workers.shared import Shared
from vllm_pd.router.workers.sockets import listen_error

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ACCESS = web.AppKey("access", Access)
CONFIG = web.AppKey("config", RouterConfig)
METRICS = web.AppKey("metrics", Metrics)
NEWCOMERS = web.AppKey("newcomers", Newcomers)
POOL = web.AppKey("pool", InstancePool)
PROXY = web.AppKey("proxy", Proxy)
RNG = web.AppKey("rng", random.Random)
STAGES = web.AppKey("stages", dict[Role, Stage])
SHARED = web.AppKey("shared", Shared)
"""Only in an app that is one of several workers."""

_BACKLOG = 2048
"""Connections that may wait to be accepted; aiohttp's default is less than clients in a burst."""

_GC_THRESHOLDS = (50_000, 20, 100)

SHUTDOWN_TIMEOUT_S = 10.0
"""Longest wait for open requests when the router is told to stop."""


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
    app.cleanup_ctx.append(_resources)
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


def run(config: RouterConfig) -> int:
    """Serve until SIGINT or SIGTERM; a second signal does not wait for open requests.

    Returns:
        The process's exit code.

    Raises:
        ConfigError: the address or a file cannot be used, a role has no instance, or
            an instance's address is none.
    """
    check_instances(config)
    with prepared() as runner:
        runner.run(run_until_signal(functools.partial(serve, config)))
    return 0


@contextlib.contextmanager
def prepared() -> Iterator[asyncio.Runner]:
    """Make this process fit to serve; gives what runs the event loop."""
    _allow_many_connections()
    _collect_garbage_rarely()
    heap.return_large_blocks()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        yield runner


async def serve(
    config: RouterConfig,
    stop: asyncio.Event,
    *,
    shared: Shared | None = None,
    sockets: Sequence[socket.socket] = (),
) -> None:
    """Serve until ``stop`` is set, then finish the open requests.

    Args:
        config: of the router.
        stop: ends it.
        shared: what it shares with the other workers; None: it is the only process.
        sockets: to listen on; without any the router listens where ``config`` says.

    Raises:
        ConfigError: the address or a file cannot be used.
    """
    app = create_app(config, shared=shared)
    tls = server_tls(config)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    assert runner.server is not None
    watching = asyncio.create_task(
        app[NEWCOMERS].watch(runner.server, timeout_s=config.client_timeout_s)
    )
    renewal = None if tls is None else asyncio.create_task(tls.watch())
    try:
        await _listen(runner, config, sockets, None if tls is None else tls.context)
        if shared is not None:
            shared.ready()
        await stop.wait()
    finally:
        watching.cancel()
        if renewal is not None:
            renewal.cancel()
        await runner.cleanup()


async def _listen(
    runner: web.AppRunner,
    config: RouterConfig,
    sockets: Sequence[socket.socket],
    tls: ssl.SSLContext | None,
) -> None:
    places: Sequence[socket.socket | tuple[str, int]] = sockets or [(config.host, config.port)]
    limit_s = config.client_timeout_s
    for where in places:
        site = Site(runner, where, backlog=_BACKLOG, tls=tls, handshake_timeout_s=limit_s)
        try:
            await site.start()
        except OSError as exc:
            raise listen_error(config.host, config.port, exc) from exc
        logger.info("router listens on %s", site.name)


async def run_until_signal(serving: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run until SIGINT or SIGTERM sets the event; the next one has its default effect."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop_once() -> None:
        stop.set()
        for number in signals:  # the next one has its default effect
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, stop_once)
    await serving(stop)


def _allow_many_connections() -> None:
    """Lift the limit of descriptors, of which a stream takes two, as far as is allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _collect_garbage_rarely() -> None:
    """Spare what lives as long as the process, and look at the rest less often.

    With thousands of streams, a full collection at Python's default pace stops all of
    them for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def check_instances(config: RouterConfig) -> None:
    """Check that there is, or may come, somebody to send requests to.

    Raises:
        ConfigError: there is not.
    """
    if config.instances_file is not None or config.admin_key_file is not None:
        return  # they may come later
    given = {
        Role.PREFILL: bool(config.prefill_urls),
        Role.DECODE: bool(config.decode_urls),
    }
    for role, is_given in given.items():
        if not is_given and not any(spec.role.serves(role) for spec in config.instances):
            raise ConfigError(f"no {role.value} instance given", hint=f"set {role.value}_urls")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # not on every platform
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _resources(app: web.Application) -> AsyncIterator[None]:
    config, shared = app[CONFIG], app.get(SHARED)
    async with contextlib.AsyncExitStack() as stack:
        await open_access_log(app, config, app[METRICS], stack)
        tracer = _tracer(config, stack)
        tls = client_tls(config)
        probes = await stack.enter_async_context(
            Probes(connect_timeout_s=config.connect_timeout_s, tls=tls)
        )
        upstream = await stack.enter_async_context(Upstream(config, tls))
        note = functools.partial(app[METRICS].activity.time_all, Timed.KV_HANDOVER)
        handovers = HandoverWatch(probes.metrics_text, note)
        control = ControlLink(config.cluster_key_file)
        stack.callback(control.close)
        pool = InstancePool(
            config.prefill_urls,
            config.decode_urls,
            probe=probes.is_healthy,
            health_interval_s=config.health_interval_s,
            scrape=handovers.scrape,
            control=control,
            limits=_limits(config),
            row_of=None if shared is None else functools.partial(shared.row, "instance"),
        )
        for spec in config.instances:
            pool.add(spec)
        index = AffinityIndex(gossip=shared)
        pool.subscribe(lambda instance: index.forget(instance.base_url))
        pool.subscribe(lambda instance: handovers.forget(instance.base_url))
        stages = _stages(config, shared)
        backend = Backend(
            *(pool, upstream, control, index, stages, app[ACCESS], app[RNG]),
            held=_held(config, app[METRICS], shared),
        )
        app[POOL] = pool
        app[STAGES] = stages
        app[PROXY] = Proxy(backend, app[METRICS], config, tracer)
        file = None
        if config.instances_file is not None:
            tell = None if shared is None else shared.tell_file
            file = InstancesFile(Path(config.instances_file), pool, tell=tell)
        await pool.start()
        stack.push_async_callback(pool.stop)
        if shared is not None:
            await shared.join(pool, app[METRICS], stages, file)
            stack.push_async_callback(shared.leave)
        followed = [app[ACCESS].watch(), _follow_capacity(config, pool, stages)]
        if file is not None:
            followed.append(file.watch(config.health_interval_s))
        tasks = [asyncio.create_task(task) for task in followed]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _tracer(config: RouterConfig, stack: contextlib.AsyncExitStack) -> Tracer | None:
    if config.otlp_traces_endpoint is None:
        return None
    tracer = open_tracer(config.otlp_traces_endpoint)
    stack.push_async_callback(tracer.close)
    return tracer


def _held(config: RouterConfig, metrics: Metrics, shared: Shared | None) -> BodyBudget:
    row = None if shared is None else shared.row("held", "bodies")
    held = BodyBudget(config.max_held_len, row=row)
    metrics.add(held)
    return held


def _stages(config: RouterConfig, shared: Shared | None) -> dict[Role, Stage]:
    return {
        role: Stage(
            role.value,
            capacity=_capacity(config, role, 1),
            max_queue=config.max_queue,
            queue_timeout_s=config.queue_timeout_s,
            siblings=None if shared is None else shared.siblings(role),
        )
        for role in Role
    }


async def _follow_capacity(
    config: RouterConfig, pool: InstancePool, stages: Mapping[Role, Stage]
) -> None:
    """Let as many requests through as the instances that are there can take."""
    while True:
        for role, stage in stages.items():
            # Without any instance requests are refused and not queued.
            stage.resize(_capacity(config, role, max(1, pool.num_accepting(role))))
        await asyncio.sleep(config.health_interval_s)


def _capacity(config: RouterConfig, role: Role, num_instances: int) -> int:
    is_prefill = role is Role.PREFILL
    each = config.prefill_max_concurrent if is_prefill else config.decode_max_concurrent
    return each * num_instances


def _limits(config: RouterConfig) -> HealthLimits:
    return HealthLimits(
        config.health_failures,
        config.health_successes,
        config.breaker_failures,
        config.breaker_backoff_s,
        config.breaker_max_backoff_s,
    )


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
