"""What serves an app's requests: made when it starts, ended when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from aiohttp import web

from vllm_pd.config import Role, RouterConfig
from vllm_pd.router.activity import Timed
from vllm_pd.router.admission import Stage
from vllm_pd.router.affinity import AffinityIndex
from vllm_pd.router.api_keys import Access
from vllm_pd.router.body_budget import BodyBudget
from vllm_pd.router.describe import ControlLink
from vllm_pd.router.generation import Backend
from vllm_pd.router.handovers import HandoverWatch
from vllm_pd.router.health import HealthLimits
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.instances_file import InstancesFile
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.newcomers import Newcomers
from vllm_pd.router.observe import open_access_log
from vllm_pd.router.probes import Probes
from vllm_pd.router.proxy import Proxy
from vllm_pd.router.queues import Queues
from vllm_pd.router.spans import Tracer, open_tracer
from vllm_pd.router.tls import client_tls
from vllm_pd.router.upstream import Upstream
from vllm_pd.router.workers.shared import Shared

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


async def resources(app: web.Application) -> AsyncIterator[None]:
    """Make what serves requests, for as long as the app runs; one of its ``cleanup_ctx``.

    Raises:
        ConfigError: an address is none, or a file cannot be used.
    """
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
        pool = _pool(config, shared, probes, handovers, control)
        index = AffinityIndex(gossip=shared)
        pool.subscribe(lambda instance: index.forget(instance.base_url))
        pool.subscribe(lambda instance: handovers.forget(instance.base_url))
        stages = _stages(config, shared)
        held = _held(config, app[METRICS], shared)
        backend = Backend(pool, upstream, control, index, app[RNG], held)
        app[POOL] = pool
        app[STAGES] = stages
        app[PROXY] = Proxy(
            backend, app[ACCESS], Queues(stages, app[METRICS]), app[METRICS], config, tracer
        )
        file = _file(config, pool, shared)
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


def _pool(
    config: RouterConfig,
    shared: Shared | None,
    probes: Probes,
    handovers: HandoverWatch,
    control: ControlLink,
) -> InstancePool:
    pool = InstancePool(
        config.prefill_urls,
        config.decode_urls,
        probe=probes.is_healthy,
        health_interval_s=config.health_interval_s,
        scrape=handovers.scrape,
        control=control,
        limits=HealthLimits.of(config),
        row_of=None if shared is None else functools.partial(shared.row, "instance"),
    )
    for spec in config.instances:
        pool.add(spec)
    return pool


def _file(config: RouterConfig, pool: InstancePool, shared: Shared | None) -> InstancesFile | None:
    if config.instances_file is None:
        return None
    tell = None if shared is None else shared.tell_file
    return InstancesFile(Path(config.instances_file), pool, tell=tell)


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
