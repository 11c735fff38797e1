"""Around every request: its id, its record, its line in the access log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from aiohttp import web

from vllm_pd.config import RouterConfig
from vllm_pd.router.access_log import AccessLog, access_line
from vllm_pd.router.headers import REQUEST_ID
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.record import Record

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ACCESS_LOG = web.AppKey("access_log", AccessLog)


def observe(app: web.Application, config: RouterConfig) -> None:
    """Name every request of an app and its answer, and have it recorded if there is a log.

    To be called before any other middleware is added: it has to see all answers.
    """
    if config.access_log is not None:
        app.middlewares.append(_recorded)
    app.on_response_prepare.append(_name)


async def open_access_log(
    app: web.Application, config: RouterConfig, metrics: Metrics, stack: AsyncExitStack
) -> None:
    """Begin to write the access log, if there is to be one, until the stack is closed.

    Raises:
        ConfigError: it cannot be written.
    """
    if config.access_log is not None:
        log = AccessLog(config.access_log, lost=metrics.access_log_lost.inc)
        app[_ACCESS_LOG] = await stack.enter_async_context(log)


@web.middleware
async def _recorded(request: web.Request, handler: Handler) -> web.StreamResponse:
    record = Record.of(request)
    log = request.app[_ACCESS_LOG]
    record.wanted = True
    response: web.StreamResponse | None = None
    try:
        response = await handler(request)
        return response
    finally:
        log.add(access_line(request, record, response))


async def _name(request: web.Request, response: web.StreamResponse) -> None:
    # Of one that aiohttp refuses before any middleware, this is the beginning.
    record = Record.of(request)
    record.is_answered = True
    response.headers[REQUEST_ID] = record.request_id
