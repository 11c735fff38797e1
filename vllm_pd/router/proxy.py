"""One client request: whose it is, what it asks for, its place in the queue.

Life of a generate request:

1. whose it is; read and parse the body; what is no JSON object goes to a decode
   instance as it is, so that vLLM words the error
2. a slot of the decode stage, and while it is prefilled one of the prefill stage
3. ``Generation``: prefill leg, decode leg, answer

What goes wrong on the way is worded here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from vllm_pd.config import Role, RouterConfig
from vllm_pd.errors import NoInstanceError, OverloadedError, RemoteProtocolError
from vllm_pd.router import body as bodies
from vllm_pd.router.admission import priority_of
from vllm_pd.router.affinity import read_prompt, session_of
from vllm_pd.router.api_keys import Access, unauthorized_response
from vllm_pd.router.call import Call, Job
from vllm_pd.router.decode import error_answer
from vllm_pd.router.generation import Backend, Generation
from vllm_pd.router.loads import Work
from vllm_pd.router.metrics import Metrics, Outcome
from vllm_pd.router.queues import Queues
from vllm_pd.router.record import Record
from vllm_pd.router.spans import Tracer


class Proxy:
    """Serves the OpenAI endpoints from the instances of a pool.

    Args:
        backend: the instances.
        access: the clients' keys.
        queues: where requests wait for them.
        metrics: take note of requests.
        config: of the router.
        tracer: traces requests; None: nobody wants that.
    """

    def __init__(  # all that it cannot do by itself is given to it
        self,
        backend: Backend,
        access: Access,
        queues: Queues,
        metrics: Metrics,
        config: RouterConfig,
        tracer: Tracer | None,
    ) -> None:
        self._pool = backend.pool
        self._index = backend.index
        self._access = access
        self._queues = queues
        self._held = backend.held
        self._generation = Generation(backend, queues, metrics, config)
        self._metrics = metrics
        self._tracer = tracer
        self._config = config

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Serve a completion, chat completion or response, prefill-first."""
        return await self._answer(request, self._generate)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Serve anything else from a decode instance."""
        return await self._answer(request, self._forward)

    async def stored(self, request: web.Request) -> web.StreamResponse:
        """Serve a request for a response from the instance that has stored it."""
        resource = request.match_info.route.resource
        assert resource is not None
        return await self._answer(
            request, self._generation.ask_for_stored, route=resource.canonical
        )

    async def _answer(
        self,
        request: web.Request,
        serve: Callable[[Call], Awaitable[web.StreamResponse]],
        *,
        route: str | None = None,
    ) -> web.StreamResponse:
        record = Record.of(request)
        route = route or request.path
        if self._tracer is not None:
            record.begin(self._tracer, request, route)
        try:
            with self._metrics.request(route) as outcome:
                record.outcome = outcome
                return await self._answer_client(request, record, outcome, serve)
        finally:
            record.end()

    async def _answer_client(
        self,
        request: web.Request,
        record: Record,
        outcome: Outcome,
        serve: Callable[[Call], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        client = self._access.client_of(request.headers)
        if client is None:
            outcome.code, record.error = 401, "no API key, or an unknown one"
            return unauthorized_response()
        call = Call.begin(request, outcome, client, self._held.hold())
        self._access.authorize(call.headers)
        try:
            with client.request():
                return await serve(call)
        except web.HTTPRequestEntityTooLarge:
            limit = self._config.max_body_len
            return error_answer(call, 413, f"The request body is longer than {limit} bytes.")
        except RemoteProtocolError as exc:
            return error_answer(call, 400, str(exc))
        except OverloadedError as exc:
            headers = {"Retry-After": str(exc.retry_after_s)}
            return error_answer(call, 429, str(exc), headers)
        except NoInstanceError as exc:
            return error_answer(call, 503, str(exc))
        finally:
            call.hold.release()

    async def _forward(self, call: Call) -> web.StreamResponse:
        raw = await self._read(call) if call.request.body_exists else None
        body = bodies.parse(raw) if raw else None
        leg = raw if raw is None or body is None else bodies.dump(bodies.verbatim(raw, body))
        self._check_decode()  # before it waits in a queue
        async with self._queues.slot(Role.DECODE, call, 0):
            return await self._generation.decode(call, leg, Work(num_sequences=1))

    async def _generate(self, call: Call) -> web.StreamResponse:
        raw = await self._read(call)
        body = bodies.parse(raw)
        self._check_decode()  # before a prefill is wasted
        if body is None:
            async with self._queues.slot(Role.DECODE, call, 0):
                self._generation.note_decode_only(call, "invalid_body")
                return await self._generation.decode(call, raw, Work(num_sequences=1))
        job = self._job(call, raw, body)
        del raw, body  # the job has all of it, until it forgets
        async with self._queues.slot(Role.DECODE, call, job.priority):
            return await self._generation.serve(call, job)

    async def _read(self, call: Call) -> bytes:
        if call.request.content.is_eof():  # all of it came with the headers
            return await call.read(self._config.max_body_len)
        try:
            async with asyncio.timeout(self._config.client_timeout_s):
                return await call.read(self._config.max_body_len)
        except TimeoutError:
            call.outcome.code = 408
            raise web.HTTPRequestTimeout from None

    def _job(self, call: Call, raw: bytes, body: dict[str, object]) -> Job:
        headers = call.request.headers
        asked = body.get("priority")
        priority = call.client.priority(priority_of(headers, asked))
        members = bodies.verbatim(raw, body)
        if type(asked) is int and (allowed := call.client.priority(asked)) != asked:
            members = {**members, "priority": allowed}  # the engines have queues, too
        call.record.note_model(body.get("model"))
        prompt = read_prompt(body, session=session_of(headers, body))
        matches = self._index.matches(prompt)
        return Job(body, members, prompt, matches, priority)

    def _check_decode(self) -> None:
        """Check that there is somebody to answer.

        Raises:
            NoInstanceError: there is not.
        """
        if not self._pool.has_healthy(Role.DECODE):
            raise NoInstanceError("No decode instance is available.")
