"""One client request: key, queue, prefill leg, decode leg, answer.

Life of a generate request:

1. whose it is; read and parse the body; what is no JSON object goes to a decode
   instance as it is, so that vLLM words the error
2. a slot of the decode stage, and while it is prefilled one of the prefill stage
3. ``policy``: disaggregate or not, and the pair of instances; if not, continue at 6
   without params
4. prefill leg, on another prefill instance if one fails. Where it is known which engine
   will have the KV cache, the decode leg is sent at the same time and waits there
5. a refusal of the prefill instance (4xx) is the answer, but for what it says of the
   body: the decode instance words that for the body the client sent. Without params,
   the decode instance prefills itself, if it has room
6. decode leg, on another decode instance as long as the client got nothing
7. bytes to the client as they come, usage repaired

The client's disconnect cancels the handler at whatever it waits for; every answer
that is not complete is closed then, and vLLM aborts the request. A prefill that nobody
will fetch is released.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType

from aiohttp import web

from vllm_pd.config import Role, RouterConfig
from vllm_pd.errors import NoInstanceError, OverloadedError, RemoteProtocolError
from vllm_pd.router import body as bodies
from vllm_pd.router import policy
from vllm_pd.router.admission import Stage, priority_of
from vllm_pd.router.affinity import NO_MATCHES, AffinityIndex, read_prompt, session_of
from vllm_pd.router.api_keys import Access, unauthorized_response
from vllm_pd.router.body_budget import BodyBudget
from vllm_pd.router.call import Call, Job
from vllm_pd.router.decode import DecodeLegs, Opened, error_answer, failure_of, plain_answer
from vllm_pd.router.describe import ControlLink
from vllm_pd.router.headers import PATH_DECODE_ONLY, PATH_DISAGGREGATED
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.loads import Work
from vllm_pd.router.metrics import Metrics, Outcome
from vllm_pd.router.policy import InstanceView, Pair
from vllm_pd.router.prefill import (
    Failed,
    NotPrefilled,
    Prefilled,
    PrefillLegs,
    Refused,
    early_params,
    is_as_expected,
)
from vllm_pd.router.record import Record
from vllm_pd.router.spans import Tracer
from vllm_pd.router.stored import StoredResponses
from vllm_pd.router.upstream import UPSTREAM_ERRORS, Answer, Upstream, is_idle_timeout
from vllm_pd.router.usage import PromptDetails

logger = logging.getLogger(__name__)

_NO_DETAILS: PromptDetails = {}


@dataclass(frozen=True, slots=True)
class Backend:
    """What a proxy works with.

    Attributes:
        pool: the instances.
        upstream: HTTP to them.
        control: their control endpoints.
        index: what they have seen.
        stages: who may use them, by role.
        access: the clients' keys.
        rng: decides between instances that are equal.
        held: memory for the bodies of requests.
    """

    pool: InstancePool
    upstream: Upstream
    control: ControlLink
    index: AffinityIndex
    stages: Mapping[Role, Stage]
    access: Access
    rng: random.Random
    held: BodyBudget


class Proxy:
    """Serves the OpenAI endpoints from the instances of a pool."""

    def __init__(
        self, backend: Backend, metrics: Metrics, config: RouterConfig, tracer: Tracer | None
    ) -> None:
        self._pool = backend.pool
        self._control = backend.control
        self._index = backend.index
        self._stages = backend.stages
        self._access = backend.access
        self._prefill_legs = PrefillLegs(backend.pool, backend.upstream)
        self._decode_legs = DecodeLegs(
            backend.pool, backend.upstream, metrics, client_timeout_s=config.client_timeout_s
        )
        self._stored = StoredResponses(backend.pool, backend.upstream)
        self._metrics = metrics
        self._tracer = tracer
        self._config = config
        self._rng = backend.rng
        self._held = backend.held

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
        return await self._answer(request, self._ask_for_stored, route=resource.canonical)

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
        async with self._slot(Role.DECODE, call, 0):
            return await self._decode(call, leg, Work(num_sequences=1))

    async def _ask_for_stored(self, call: Call) -> web.StreamResponse:
        instance = await self._stored.speaker(call)
        # Without a slot: it is no work for an engine, and a cancellation even saves some.
        return await self._decode(call, None, Work(), only=instance)

    async def _generate(self, call: Call) -> web.StreamResponse:
        raw = await self._read(call)
        body = bodies.parse(raw)
        self._check_decode()  # before a prefill is wasted
        if body is None:
            async with self._slot(Role.DECODE, call, 0):
                self._note_decode_only(call, "invalid_body")
                return await self._decode(call, raw, Work(num_sequences=1))
        job = self._job(call, raw, body)
        del raw, body  # the job has all of it, until it forgets
        async with self._slot(Role.DECODE, call, job.priority):
            return await self._serve(call, job)

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

    async def _serve(self, call: Call, job: Job) -> web.StreamResponse:
        decision = policy.should_disaggregate(job.body)
        if not decision.disaggregate:
            return await self._decode_alone(call, job, decision.reason)
        pair = self._choose_pair(job, tried=set())
        if pair is None:
            return await self._fall_back(call, job, "no_prefill_instance")
        decision = policy.weigh(pair, job.prompt.num_tokens, job.matches, self._config)
        if not decision.disaggregate:
            return await self._decode_only(call, job, decision.reason, pair.decode)
        early = _Early()
        try:
            async with self._slot(
                Role.PREFILL, call, job.priority, job.prompt.num_tokens
            ) as has_waited:
                result = await self._prefill(call, job, early, None if has_waited else pair)
            return await self._finish(call, job, result, early)
        finally:
            early.cancel()

    async def _prefill(
        self, call: Call, job: Job, early: _Early, first: Pair | None
    ) -> Prefilled | NotPrefilled | Refused:
        """Have the prompt prefilled, by another instance if one fails.

        Args:
            call: the client's request.
            job: its body.
            early: the decode leg, should it be sent already.
            first: the instances for the first attempt; None if the choice of before the
                queue is too old.
        """
        tried: set[str] = set()
        busy: Answer | None = None
        while (choice := first or self._choose_pair(job, tried=tried)) is not None:
            first = None
            instance = self._pool.at(choice.prefill)
            if tried:
                self._metrics.note_prefill_retry()
            tried.add(instance.base_url)
            # A new id for each attempt: the instance that failed may still hold blocks.
            transfer_id = secrets.token_hex(16)
            to_prefill = policy.tokens_to_prefill(choice, job.prompt.num_tokens, job.matches)
            if len(tried) == 1 and policy.may_decode_early(choice):
                self._open_early(call, job, choice, transfer_id, early, to_prefill)
            self._index.note(job.prompt, instance.base_url)
            began = time.monotonic()
            try:
                result = await self._prefill_legs.run(instance, call, job, transfer_id=transfer_id)
            except asyncio.CancelledError:  # the client left, perhaps just when it was over
                self._release(instance, transfer_id)
                raise
            if isinstance(result, Prefilled):
                call.record.prefill_s = time.monotonic() - began
                instance.forecast.note(to_prefill, call.record.prefill_s)
                self._metrics.note_prefill(call.record.prefill_s)
                self._metrics.note_prompt(result.details, result.kv_params)
            if not isinstance(result, Failed):
                return result
            early.cancel()  # it waits for this attempt
            busy = result.busy or busy
        if busy is not None:
            return Refused(busy)
        return NotPrefilled("prefill_failed" if tried else "no_prefill_instance")

    def _open_early(
        self,
        call: Call,
        job: Job,
        pair: Pair,
        transfer_id: str,
        early: _Early,
        to_prefill: int,
    ) -> None:
        """Send the decode leg soon, to wait at the decode instance for the KV cache."""
        lead_s = self._config.early_decode_s
        prefill = self._pool.at(pair.prefill)
        pause_s = prefill.forecast.pause_s(to_prefill, lead_s) if lead_s else None
        params = early_params(prefill, transfer_id)
        if pause_s is None or params is None:
            return
        instance = self._pool.at(pair.decode)

        def send() -> Awaitable[Opened]:
            self._index.note(job.prompt, instance.base_url)
            return self._decode_legs.open(
                instance, call, job.leg(params), _work(job), is_early=True
            )

        early.start(params, pause_s, send)

    async def _finish(
        self,
        call: Call,
        job: Job,
        result: Prefilled | NotPrefilled | Refused,
        early: _Early,
    ) -> web.StreamResponse:
        """Answer the client once the prefill leg is over."""
        if isinstance(result, Refused):
            call.outcome.path = PATH_DISAGGREGATED
            return plain_answer(call, result.answer, result.answer.first)
        if isinstance(result, NotPrefilled):
            early.cancel()  # it would wait for nothing
            if result.reason == "invalid_request":
                return await self._decode_only(call, job, result.reason)
            return await self._fall_back(call, job, result.reason)
        call.outcome.path = PATH_DISAGGREGATED
        try:
            began = time.monotonic()
            opened = await early.take(result)
            if opened is not None and opened.answer.status >= 500:
                opened.close()  # perhaps another one does better
            elif opened is not None:
                self._metrics.early_decodes.inc()
                if opened.answer.streamed:
                    self._metrics.note_decode_start(time.monotonic() - began)
                self._note_refusal(opened, result)
                with opened:
                    self._metrics.note_first_bytes(call.outcome, streamed=opened.answer.streamed)
                    _let_go(call, job)
                    return await self._decode_legs.relay(call, opened, result.details)
            return await self._decode(
                call, job.leg(result.kv_params), _work(job), job=job, prefilled=result
            )
        except asyncio.CancelledError:
            self._release(result.instance, str(result.kv_params.get("transfer_id")))
            raise

    async def _decode_alone(self, call: Call, job: Job, reason: str) -> web.StreamResponse:
        """Have one instance do all, because only that is right."""
        owner = await self._stored.owner_of_previous(call, job.body)
        if owner is None:
            return await self._decode_only(call, job, reason)
        self._note_decode_only(call, reason)
        return await self._decode(call, job.leg(None), _work(job), job=job, only=owner)

    async def _decode_only(
        self, call: Call, job: Job, reason: str, view: InstanceView | None = None
    ) -> web.StreamResponse:
        """Have a decode instance prefill by itself, ``view`` if there is no other reason."""
        self._note_decode_only(call, reason)
        return await self._decode(call, job.leg(None), _work(job), job=job, first=view)

    async def _fall_back(self, call: Call, job: Job, reason: str) -> web.StreamResponse:
        """Do so for want of a prefill instance, within limits: all streams there suffer.

        Raises:
            NoInstanceError: the limits are reached.
        """
        logger.warning("%s is prefilled by the decode instance: %s", call.request_id, reason)
        view = self._choose_decode(job, None, set())
        limits = self._config
        if view is not None and not policy.may_prefill_locally(
            view, job.prompt.num_tokens, job.matches, limits
        ):
            raise NoInstanceError(
                "No prefill instance is available, and the decode instances have no room to "
                "prefill the prompt."
            )
        return await self._decode_only(call, job, reason, view)

    async def _decode(  # noqa: PLR0913  # what to send, and who may answer
        self,
        call: Call,
        leg: bytes | None,
        work: Work,
        *,
        job: Job | None = None,
        prefilled: Prefilled | None = None,
        first: InstanceView | None = None,
        only: Instance | None = None,
    ) -> web.StreamResponse:
        """Send the decode leg and relay its answer; another instance is tried if one fails.

        Unless ``only`` one can do it.
        """
        details = prefilled.details if prefilled else _NO_DETAILS
        producer = prefilled.instance if prefilled else None
        tried: set[str] = set()
        if only is not None:
            first = only.view(Role.DECODE, 0.0)
            tried = {one.base_url for one in self._pool}
        # Not the exception: it would keep this frame, and with it the body, from being freed.
        failure: tuple[int, str] | None = None
        while (view := first or self._choose_decode(job, producer, tried)) is not None:
            first = None
            instance = self._pool.at(view)
            tried.add(instance.base_url)
            if job is not None:
                self._index.note(job.prompt, instance.base_url)
            try:
                opened = await self._decode_legs.open(
                    instance,
                    call,
                    leg,
                    work,
                    local_tokens=_uncached(job, instance) if job and not prefilled else 0,
                )
            except UPSTREAM_ERRORS as exc:
                failure = failure_of(exc)
                if is_idle_timeout(exc):
                    break  # the client has waited long enough
                continue
            with opened:
                # Perhaps its engine is dead. One more is tried, and no further one: the request
                # may be what engines cannot stand.
                is_first = opened.answer.status >= 500 and len(tried) == 1
                if is_first and self._choose_decode(job, producer, tried) is not None:
                    continue
                self._note_refusal(opened, prefilled)
                self._metrics.note_first_bytes(call.outcome, streamed=opened.answer.streamed)
                del leg
                _let_go(call, job)
                return await self._decode_legs.relay(call, opened, details)
        if prefilled is not None:
            self._release(prefilled.instance, str(prefilled.kv_params.get("transfer_id")))
        if failure is None:
            raise NoInstanceError("No decode instance is available.")
        return error_answer(call, *failure)

    def _slot(self, role: Role, call: Call, priority: int, num_tokens: int = 1) -> _Slot:
        held = self._stages[role].slot(call.client.name, priority=priority, cost=num_tokens)
        return _Slot(role, call.record, self._metrics, held)

    def _choose_pair(self, job: Job, *, tried: set[str]) -> Pair | None:
        return policy.choose_pair(
            self._pool.snapshot(Role.PREFILL),
            self._pool.snapshot(Role.DECODE),
            rng=self._rng,
            matches=job.matches,
            tried=tried,
        )

    def _choose_decode(
        self, job: Job | None, producer: Instance | None, tried: set[str]
    ) -> InstanceView | None:
        views = self._pool.snapshot(Role.DECODE)
        matches = job.matches if job else NO_MATCHES
        by = None if producer is None else producer.view(0.0)
        return policy.choose_decode(views, rng=self._rng, producer=by, matches=matches, tried=tried)

    def _check_decode(self) -> None:
        """Check that there is somebody to answer.

        Raises:
            NoInstanceError: there is not.
        """
        if not self._pool.has_healthy(Role.DECODE):
            raise NoInstanceError("No decode instance is available.")

    def _note_refusal(self, opened: Opened, prefilled: Prefilled | None) -> None:
        """Release the prefill of a request that the decode instance has not even begun."""
        if prefilled is not None and opened.answer.status >= 400:
            self._release(prefilled.instance, str(prefilled.kv_params.get("transfer_id")))

    def _release(self, instance: Instance, transfer_id: str) -> None:
        """Give the blocks of a prefill back that nobody will fetch; best effort."""
        if instance.control is not None:
            self._control.release(instance.control, transfer_id)

    def _note_decode_only(self, call: Call, reason: str) -> None:
        call.outcome.path = PATH_DECODE_ONLY
        self._metrics.note_decode_only(reason)


class _Slot:
    """Waits for a slot of a stage and holds it for the time of the context.

    Its value there is whether it had to wait.
    """

    __slots__ = ("_held", "_metrics", "_record", "_role")

    def __init__(
        self, role: Role, record: Record, metrics: Metrics, held: AbstractAsyncContextManager[float]
    ) -> None:
        self._role = role
        self._record = record
        self._metrics = metrics
        self._held = held

    async def __aenter__(self) -> bool:
        with self._record.queue(self._role):
            waited_s = await self._held.__aenter__()
        self._record.waited(waited_s)
        self._metrics.note_queue(self._role, waited_s)
        return waited_s > 0

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._held.__aexit__(kind, exc, traceback)


class _Early:
    """A decode leg that is sent before its prefill has ended."""

    def __init__(self) -> None:
        self._params: Mapping[str, object] = {}
        self._task: asyncio.Task[Opened] | None = None
        self._is_sent = False

    def start(
        self, params: Mapping[str, object], pause_s: float, send: Callable[[], Awaitable[Opened]]
    ) -> None:
        """Send it after that pause, if nobody has asked for it until then."""
        self._params = params
        self._task = asyncio.create_task(self._run(pause_s, send))

    async def _run(self, pause_s: float, send: Callable[[], Awaitable[Opened]]) -> Opened:
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        self._is_sent = True
        return await send()

    async def take(self, prefilled: Prefilled) -> Opened | None:
        """Return its answer, if it waited for this prefill and none of the two failed."""
        if self._task is None:
            return None
        if not self._is_sent or not is_as_expected(prefilled, self._params):
            self.cancel()
            return None
        task = self._task
        try:
            opened = await asyncio.shield(task)
        except UPSTREAM_ERRORS:
            self._task = None
            return None
        self._task = None
        return opened

    def cancel(self) -> None:
        """Give it up, if nobody has taken it; never waits."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.add_done_callback(_close_unwanted)


def _close_unwanted(task: asyncio.Task[Opened]) -> None:
    """End an answer that came although its leg was given up."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _let_go(call: Call, job: Job | None) -> None:
    """Free a body that no other instance will get, as one has begun to answer."""
    if job is not None:
        job.forget()
        call.hold.release()


def _uncached(job: Job, instance: Instance) -> int:
    return max(0, job.prompt.num_tokens - job.matches.cached.get(instance.base_url, 0))


def _work(job: Job) -> Work:
    return Work(kv_tokens=job.prompt.num_tokens, num_sequences=job.prompt.num_sequences)
