"""One client request: prefill leg, KV transfer params, decode leg, answer.

Life of a generate request:

1. read and parse the body; what is no JSON object goes to a decode instance as it
   is, so that vLLM words the error
2. ``policy.should_disaggregate``; if not, continue at 5 without params
3. prefill leg, on another prefill instance if one fails
4. its refusal (4xx) is the answer, but for what it says of the body: the decode
   instance words that for the body the client sent. Without params, the decode leg
   prefills itself
5. decode leg, on another decode instance as long as the client got nothing
6. bytes to the client as they come

The client's disconnect cancels the handler at whatever it waits for; every answer
that is not complete is closed then, and vLLM aborts the request.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web
from multidict import CIMultiDict

from vllm_pd.config import Role
from vllm_pd.errors import NoInstanceError, RemoteProtocolError
from vllm_pd.router import body as bodies
from vllm_pd.router import headers as http_headers
from vllm_pd.router import policy
from vllm_pd.router.headers import PATH_DECODE_ONLY, PATH_DISAGGREGATED, PD_PATH, REQUEST_ID
from vllm_pd.router.instances import Instance, InstancePool, describe
from vllm_pd.router.metrics import Metrics, Outcome
from vllm_pd.router.replies import error_event, error_response
from vllm_pd.router.upstream import UPSTREAM_ERRORS, Answer, Upstream, is_idle_timeout

logger = logging.getLogger(__name__)

_INVALID_REQUEST = (400, 422)
"""Refusals of the body itself; the prefill leg's differs from the client's."""

_INCOMPLETE = "The output is incomplete."


@dataclass(frozen=True, slots=True)
class Call:
    """What stays the same on every leg of one client request.

    Attributes:
        request: the client's request.
        request_id: names it on every leg.
        headers: headers of every leg.
        outcome: how it goes, for the metrics.
    """

    request: web.Request
    request_id: str
    headers: CIMultiDict[str]
    outcome: Outcome

    @classmethod
    def begin(cls, request: web.Request, outcome: Outcome) -> Self:
        """Name a request and make the headers of its legs."""
        request_id = http_headers.choose_request_id(request.headers)
        leg_headers = http_headers.to_instance(request.headers, request_id)
        return cls(request, request_id, leg_headers, outcome)

    @property
    def path(self) -> str:
        """Path of the endpoint, the same on router and instances."""
        return self.request.path

    def answer_headers(self) -> CIMultiDict[str]:
        """Return the headers that the router adds to every answer."""
        added = CIMultiDict({REQUEST_ID: self.request_id})
        if self.outcome.path != "none":
            added[PD_PATH] = self.outcome.path
        return added


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt's KV cache waits at a prefill instance.

    Attributes:
        kv_params: what the decode leg must carry.
    """

    kv_params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NotPrefilled:
    """The decode instance has to prefill.

    Attributes:
        reason: why, as a metric label.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A prefill instance refused the request, for the client to know.

    Attributes:
        answer: the refusal.
    """

    answer: Answer


class Proxy:
    """Serves the OpenAI endpoints from the instances of a pool."""

    def __init__(
        self, pool: InstancePool, upstream: Upstream, metrics: Metrics, *, max_body_len: int
    ) -> None:
        self._pool = pool
        self._upstream = upstream
        self._metrics = metrics
        self._max_body_len = max_body_len

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Serve a completion or chat completion, prefill-first."""
        with self._metrics.request(request.path) as outcome:
            call = Call.begin(request, outcome)
            try:
                return await self._generate(call)
            except web.HTTPRequestEntityTooLarge:
                message = f"The request body is longer than {self._max_body_len} bytes."
                return self._error(call, 413, message)
            except RemoteProtocolError as exc:
                return self._error(call, 400, str(exc))
            except NoInstanceError as exc:
                return self._error(call, 503, str(exc))

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Serve the list of models, from a decode instance."""
        with self._metrics.request(request.path) as outcome:
            call = Call.begin(request, outcome)
            try:
                return await self._decode(call, None)
            except NoInstanceError as exc:
                return self._error(call, 503, str(exc))

    async def _generate(self, call: Call) -> web.StreamResponse:
        raw = await self._read(call.request)
        body = bodies.parse(raw)
        if not self._pool.has_healthy(Role.DECODE):  # before a prefill is wasted
            raise NoInstanceError("No decode instance is available.")
        if body is None:
            self._note_decode_only(call, "invalid_body")
            return await self._decode(call, raw)
        prefill = await self._prefill(call, body)
        if isinstance(prefill, Refused):
            call.outcome.path = PATH_DISAGGREGATED
            return await self._relay(call, prefill.answer)
        if isinstance(prefill, NotPrefilled):
            self._note_decode_only(call, prefill.reason)
            return await self._decode(call, bodies.dump(bodies.decode_body(body, None)))
        call.outcome.path = PATH_DISAGGREGATED
        return await self._decode(call, bodies.dump(bodies.decode_body(body, prefill.kv_params)))

    async def _read(self, request: web.Request) -> bytes:
        limit = self._max_body_len
        if request.content_length is not None and request.content_length > limit:
            raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
        try:
            raw = await request.read()
        except web.RequestPayloadError as exc:
            raise RemoteProtocolError(f"the request body is damaged: {describe(exc)}") from exc
        if len(raw) > limit:
            raise web.HTTPRequestEntityTooLarge(limit, len(raw))
        return raw

    async def _prefill(self, call: Call, body: bodies.Body) -> Prefilled | NotPrefilled | Refused:
        decision = policy.should_disaggregate(body)
        if not decision.disaggregate:
            return NotPrefilled(decision.reason)
        tried: set[str] = set()
        busy: Answer | None = None
        while (instance := self._pool.pick(Role.PREFILL, tried=tried)) is not None:
            if tried:
                self._metrics.prefill_retries.inc()
            tried.add(instance.base_url)
            answer = await self._prefill_on(instance, call, body)
            if answer is None or answer.status >= 500:
                continue
            if answer.status == 429:
                busy = answer
                continue
            if answer.status in _INVALID_REQUEST:
                return NotPrefilled("invalid_request")
            if answer.status != 200:
                return Refused(answer)
            return self._prefilled(call, instance, answer)
        if busy is not None:
            return Refused(busy)
        reason = "prefill_failed" if tried else "no_prefill_instance"
        logger.warning("%s is prefilled by the decode instance: %s", call.request_id, reason)
        return NotPrefilled(reason)

    async def _prefill_on(self, instance: Instance, call: Call, body: bodies.Body) -> Answer | None:
        """Send the prefill leg to one instance; None if it gave no answer."""
        # A new id for each attempt: the instance that failed may still hold blocks.
        leg = bodies.dump(bodies.prefill_body(body, uuid.uuid4().hex))
        with self._pool.in_use(instance):
            try:
                answer = await self._upstream.prefill(
                    instance.base_url + call.path, call.headers, leg
                )
            except UPSTREAM_ERRORS as exc:
                logger.warning(
                    "prefill of %s on %s failed: %s",
                    call.request_id,
                    instance.base_url,
                    describe(exc),
                )
                self._pool.mark_unhealthy(instance, exc)
                return None
        answer.close()  # it is complete
        if answer.status >= 500 or answer.status == 429:
            # Health is left to the probes: one request that makes the engine
            # answer 500 must not take every prefill instance out of use.
            logger.warning(
                "prefill of %s on %s failed: status %d",
                call.request_id,
                instance.base_url,
                answer.status,
            )
        return answer

    def _prefilled(
        self, call: Call, instance: Instance, answer: Answer
    ) -> Prefilled | NotPrefilled:
        kv_params = bodies.kv_params_of(answer.first)
        if kv_params is None:
            logger.warning(
                "%s is prefilled by the decode instance: %s answered without kv_transfer_params",
                call.request_id,
                instance.base_url,
            )
            return NotPrefilled("no_kv_transfer_params")
        return Prefilled(kv_params)

    async def _decode(self, call: Call, leg: bytes | None) -> web.StreamResponse:
        tried: set[str] = set()
        failure: BaseException | None = None
        while (instance := self._pool.pick(Role.DECODE, tried=tried)) is not None:
            tried.add(instance.base_url)
            with self._pool.in_use(instance):
                try:
                    answer = await self._upstream.decode(
                        call.request.method, instance.base_url + call.path, call.headers, leg
                    )
                except UPSTREAM_ERRORS as exc:
                    self._note_decode_failure(call, instance, exc)
                    failure = exc
                    if is_idle_timeout(exc):
                        break  # the client has waited long enough
                    continue
                return await self._relay(call, answer, instance)
        if failure is None:
            raise NoInstanceError("No decode instance is available.")
        return self._error(call, *_failure_of(failure))

    async def _relay(
        self, call: Call, answer: Answer, instance: Instance | None = None
    ) -> web.StreamResponse:
        """Pass an answer on to the client; ``instance`` is where a stream comes from."""
        call.outcome.code = answer.status
        headers = http_headers.to_client(answer.headers)
        headers.update(call.answer_headers())
        try:
            if instance is None or not answer.streamed:
                return web.Response(status=answer.status, headers=headers, body=answer.first)
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(call.request)
            await self._stream(call, answer, instance, response)
            await response.write_eof()
            return response
        finally:
            answer.close()

    async def _stream(
        self, call: Call, answer: Answer, instance: Instance, response: web.StreamResponse
    ) -> None:
        """Pass bytes on as they come; if the instance fails, an error event is the last of them."""
        chunk = answer.first
        while chunk:
            await response.write(chunk)
            try:
                chunk = await answer.more()
            except UPSTREAM_ERRORS as exc:
                self._note_decode_failure(call, instance, exc)
                call.outcome.code, message = _failure_of(exc)
                await response.write(error_event(call.outcome.code, f"{message} {_INCOMPLETE}"))
                return

    def _error(self, call: Call, status: int, message: str) -> web.Response:
        call.outcome.code = status
        return error_response(status, message, headers=call.answer_headers())

    def _note_decode_only(self, call: Call, reason: str) -> None:
        call.outcome.path = PATH_DECODE_ONLY
        self._metrics.decode_only.labels(reason).inc()

    def _note_decode_failure(self, call: Call, instance: Instance, exc: BaseException) -> None:
        logger.warning(
            "decode of %s on %s failed: %s", call.request_id, instance.base_url, describe(exc)
        )
        self._pool.mark_unhealthy(instance, exc)


def _failure_of(exc: BaseException) -> tuple[int, str]:
    """Return status and message for a client whose decode instance failed."""
    if is_idle_timeout(exc):
        return 504, "The decode instance did not answer in time."
    return 502, "The decode instance failed."
