"""The decode leg: attempts on decode instances, and their answer on its way to the client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from aiohttp import web
from multidict import CIMultiDict

from vllm_pd.config import Role
from vllm_pd.router import headers as http_headers
from vllm_pd.router.attempts import failure_of
from vllm_pd.router.body import RESPONSES
from vllm_pd.router.call import Call
from vllm_pd.router.instance import Instance, describe
from vllm_pd.router.instances import InstancePool, Use
from vllm_pd.router.loads import Work
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.pace import Pace
from vllm_pd.router.replies import error_event, error_response
from vllm_pd.router.sink import Sink
from vllm_pd.router.spans import Span
from vllm_pd.router.sse import SseReader, is_aborted, is_prelude
from vllm_pd.router.timeline import timeline_of
from vllm_pd.router.upstream import UPSTREAM_ERRORS, Answer, Upstream, is_idle_timeout
from vllm_pd.router.usage import PromptDetails, repaired

logger = logging.getLogger(__name__)

_LOCAL_PREFILL_S = 5.0
_INCOMPLETE = "The output is incomplete."


class AbortedError(OSError):
    """The instance ended the request by itself, as it shuts down."""


class TruncatedError(OSError):
    """The stream ended without saying that it is complete."""


_SMALL_LEN = 1 << 16
"""Bytes that are left to the kernel and aiohttp at once; about as much as they hold."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """The beginning of a decode instance's answer; counts as work there until closed.

    Attributes:
        instance: where it comes from.
        answer: status, headers and first bytes.
    """

    instance: Instance
    answer: Answer
    _use: Use
    _span: Span

    def failed(self, exc: BaseException) -> None:
        """The rest of the answer does not come."""
        self._use.failed(exc)
        self._span.fail(exc)

    def close(self) -> None:
        """Give it up; idempotent. If it is not complete, vLLM aborts the request."""
        self.answer.close()
        self._use.end()
        self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        if exc is not None:
            self._span.fail(exc)
        self.close()


class DecodeLegs:
    """Sends decode legs and relays their answers.

    Args:
        pool: counts what is open, and hears of failures.
        upstream: HTTP to the instances.
        metrics: take note of the answers' pace and timelines.
        client_timeout_s: longest wait for a client to take a part of its stream.
    """

    def __init__(
        self,
        pool: InstancePool,
        upstream: Upstream,
        metrics: Metrics,
        *,
        client_timeout_s: float,
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._upstream = upstream
        self._client_timeout_s = client_timeout_s

    async def open(
        self,
        instance: Instance,
        call: Call,
        leg: bytes | None,
        work: Work,
        *,
        local_tokens: int = 0,
        is_early: bool = False,
    ) -> Opened:
        """Send a request and wait for the beginning of its answer.

        Args:
            instance: where to.
            call: the client's request.
            leg: the body.
            work: what it is for the instance until the answer is complete.
            local_tokens: prompt tokens that it has to compute before it answers.
            is_early: whether it has to wait for a prefill, so that silence is not its fault.

        Raises:
            OSError: one of ``UPSTREAM_ERRORS``; the instance has been told off for it.
        """
        span = call.record.leg(
            Role.DECODE, instance.base_url, method=call.request.method, path=call.path
        )
        use = self._pool.in_use(instance, work)
        try:
            use.begin()
            began = time.monotonic()
            answer = await self._ask(instance, call, leg, span, local_tokens)
        except BaseException as exc:
            if isinstance(exc, UPSTREAM_ERRORS):
                _warn(call, instance, exc)
                if not (is_early and is_idle_timeout(exc)):
                    use.failed(exc)
                    call.attempts.note_error(exc, Role.DECODE)
            use.end()
            span.fail(exc)
            span.end()
            raise
        span.answered(answer.status)
        call.attempts.note_status(answer.status)
        if answer.status == 200:
            use.succeeded()
            if answer.streamed and not is_early:
                self._metrics.note_decode_start(time.monotonic() - began)
        return Opened(instance, answer, use, span)

    async def _ask(
        self, instance: Instance, call: Call, leg: bytes | None, span: Span, local_tokens: int
    ) -> Answer:
        """Send a request and return the beginning of its answer, unless it was aborted.

        That is its first output: the events before it say nothing of the engine.
        """
        with _prefilling(instance, local_tokens):
            answer = await self._upstream.decode(
                call.request.method,
                instance.base_url + call.target,
                span.headers(call.headers),
                leg,
            )
            if call.path == RESPONSES:
                await answer.pass_over(is_prelude)
        if _can_abort(call) and is_aborted(answer.first):
            answer.close()
            raise AbortedError("the instance aborted the request")
        return answer

    async def relay(self, call: Call, opened: Opened, details: PromptDetails) -> web.StreamResponse:
        """Pass an answer on to the client, its usage repaired by ``details``."""
        call.record.note_first_bytes()
        answer = opened.answer
        if not answer.streamed:
            self._metrics.note_timeline(timeline_of(answer.first))
            body = repaired(answer.first, details)
            if len(body) > _SMALL_LEN:
                return await self._send_whole(call, answer, body)
            return plain_answer(call, answer, body)
        call.outcome.code = answer.status
        response = web.StreamResponse(status=answer.status, headers=_headers(call, answer))
        await response.prepare(call.request)
        reader = SseReader(details, can_abort=_can_abort(call))
        with Sink(call, response, timeout_s=self._client_timeout_s) as client:
            await self._relay_stream(call, opened, reader, client)
        return response

    async def _send_whole(self, call: Call, answer: Answer, body: bytes) -> web.StreamResponse:
        """Send an answer in parts, so that a client who takes none of it does not keep it."""
        _note_answer(call, answer)
        response = web.StreamResponse(status=answer.status, headers=_headers(call, answer))
        response.content_length = len(body)
        await response.prepare(call.request)
        with Sink(call, response, timeout_s=self._client_timeout_s) as client:
            for start in range(0, len(body), _SMALL_LEN):
                await client.write(body[start : start + _SMALL_LEN])
            await client.end()
        return response

    async def _relay_stream(
        self, call: Call, opened: Opened, reader: SseReader, client: Sink
    ) -> None:
        try:
            failure = await self._stream(opened.answer, reader, client)
        except ConnectionResetError:
            raise  # the client has left
        except Exception:
            # A bug costs this stream, and not what the client sends next on its connection.
            logger.exception("stream of %s failed", call.request_id)
            call.record.error = "the router failed; its log has a traceback"
            await _end_broken(call, client, 500, "Internal Server Error.")
            return
        if failure is not None:
            _warn(call, opened.instance, failure)
            opened.failed(failure)
            call.record.error = f"the stream broke: {describe(failure)}"
            await _end_broken(call, client, *failure_of(failure, Role.DECODE))
            return
        await client.end()

    async def _stream(
        self, answer: Answer, reader: SseReader, client: Sink
    ) -> BaseException | None:
        """Pass bytes on as they come; return why they are not complete, if they are not."""
        pace = self._metrics.pace()
        try:
            return await _pass_on(answer, reader, client, pace)
        finally:
            if pace is not None:
                pace.flush()


async def _pass_on(
    answer: Answer, reader: SseReader, client: Sink, pace: Pace | None
) -> BaseException | None:
    chunk = answer.first
    while chunk:
        if pace is not None:
            pace.note()
        if passed := reader.feed(chunk):
            await client.write(passed)
        if reader.aborted:
            return AbortedError("the instance aborted the request")
        try:
            chunk = await answer.more()
        except UPSTREAM_ERRORS as exc:  # not of a write: that is the client
            return exc
    rest = reader.finish()
    if reader.aborted or not reader.ended:
        return TruncatedError("the stream ended too early")
    if rest:
        await client.write(rest)
    return None


async def _end_broken(call: Call, client: Sink, code: int, message: str) -> None:
    """End a stream that lacks its end by an event that says so."""
    call.outcome.code = code
    await client.write(error_event(code, f"{message} {_INCOMPLETE}"))
    await client.end()


def _prefilling(instance: Instance, num_tokens: int) -> contextlib.AbstractContextManager[None]:
    """Count tokens as being prefilled, for the time that this takes at most.

    What is not streamed is answered at its end, long after its prompt was computed.
    """
    if num_tokens == 0:
        return contextlib.nullcontext()
    return _for_a_while(instance.ledger.open(Work(prefill_tokens=num_tokens)))


@contextlib.contextmanager
def _for_a_while(context: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """Leave a context after that time, even if its block goes on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(context)
        timer = asyncio.get_running_loop().call_later(_LOCAL_PREFILL_S, stack.close)
        try:
            yield
        finally:
            timer.cancel()


def plain_answer(call: Call, answer: Answer, body: bytes) -> web.Response:
    """Return an instance's whole answer, with another body, for the client."""
    _note_answer(call, answer)
    call.record.passed(body)
    return web.Response(status=answer.status, headers=_headers(call, answer), body=body)


def _note_answer(call: Call, answer: Answer) -> None:
    call.outcome.code = answer.status
    if answer.status >= 400:
        call.record.error = "refused by an instance"


def error_answer(
    call: Call, status: int, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """Return an error of the router's own for the client."""
    call.outcome.code = status
    call.record.error = message
    return error_response(status, message, headers=call.mark(CIMultiDict(headers or {})))


def _headers(call: Call, answer: Answer) -> CIMultiDict[str]:
    return call.mark(http_headers.to_client(answer.headers))


def _can_abort(call: Call) -> bool:
    return not call.path.startswith(RESPONSES)


def _warn(call: Call, instance: Instance, exc: BaseException) -> None:
    logger.warning(
        "decode of %s on %s failed: %s", call.request_id, instance.base_url, describe(exc)
    )
