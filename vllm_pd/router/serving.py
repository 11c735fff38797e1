"""The router as a process: what it listens on, and when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence

from aiohttp import web

from vllm_pd.config import Role, RouterConfig
from vllm_pd.errors import ConfigError
from vllm_pd.router import heap
from vllm_pd.router.app import create_app
from vllm_pd.router.resources import NEWCOMERS
from vllm_pd.router.site import Site
from vllm_pd.router.tls import server_tls
from vllm_pd.router.workers.shared import Shared
from vllm_pd.router.workers.sockets import listen_error

logger = logging.getLogger(__name__)

_BACKLOG = 2048
"""Connections that may wait to be accepted; aiohttp's default is less than clients in a burst."""

_GC_THRESHOLDS = (50_000, 20, 100)

SHUTDOWN_TIMEOUT_S = 10.0
"""Longest wait for open requests when the router is told to stop."""


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
