"""From a client's request to its answer: prefill leg, decode leg, and what if one fails.

1. ``policy``: disaggregate or not, and the pair of instances; if not, continue at 4
   without params
2. prefill leg, on another prefill instance if one fails. Where it is known which engine
   will have the KV cache, the decode leg is sent shortly before the end and waits there
3. a refusal of the prefill instance (4xx) is the answer, but for what it says of the
   body: the decode instance words that for the body the client sent. Without params,
   the decode instance prefills itself, if it has room
4. decode leg, on another decode instance as long as the client got nothing
5. bytes to the client as they come, usage repaired

A request that has broken three instances (``attempts``) gets no fourth one of either role.

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
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_pd.config import Role, RouterConfig
from vllm_pd.errors import NoInstanceError
from vllm_pd.router import policy
from vllm_pd.router.affinity import NO_MATCHES, AffinityIndex
from vllm_pd.router.body_budget import BodyBudget
from vllm_pd.router.call import Call, Job
from vllm_pd.router.decode import DecodeLegs, Opened, error_answer, plain_answer
from vllm_pd.router.describe import ControlLink
from vllm_pd.router.early import Early
from vllm_pd.router.headers import PATH_DECODE_ONLY, PATH_DISAGGREGATED
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.loads import Work
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.policy import InstanceView, Pair
from vllm_pd.router.prefill import (
    Failed,
    GivenUp,
    NotPrefilled,
    Prefilled,
    PrefillLegs,
    Refused,
    early_params,
)
from vllm_pd.router.queues import Queues
from vllm_pd.router.stored import StoredResponses
from vllm_pd.router.upstream import UPSTREAM_ERRORS, Answer, Upstream, is_idle_timeout
from vllm_pd.router.usage import PromptDetails

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)

_NO_DETAILS: PromptDetails = {}


@dataclass(frozen=True, slots=True)
class Backend:
    """The instances, and what is known of them.

    Attributes:
        pool: the instances.
        upstream: HTTP to them.
        control: their control endpoints.
        index: what they have seen.
        rng: decides between instances that are equal.
        held: memory for the bodies of requests to them.
    """

    pool: InstancePool
    upstream: Upstream
    control: ControlLink
    index: AffinityIndex
    rng: random.Random
    held: BodyBudget


class Generation:
    """Has requests served by the instances of a pool."""

    def __init__(
        self, backend: Backend, queues: Queues, metrics: Metrics, config: RouterConfig
    ) -> None:
        self._pool = backend.pool
        self._control = backend.control
        self._index = backend.index
        self._rng = backend.rng
        self._prefill_legs = PrefillLegs(backend.pool, backend.upstream)
        self._decode_legs = DecodeLegs(
            backend.pool, backend.upstream, metrics, client_timeout_s=config.client_timeout_s
        )
        self._stored = StoredResponses(backend.pool, backend.upstream)
        self._queues = queues
        self._metrics = metrics
        self._config = config

    async def serve(self, call: Call, job: Job) -> web.StreamResponse:
        """Serve a request that holds a slot of the decode stage.

        Raises:
            OverloadedError: the prefill stage has no room for it.
            NoInstanceError: there is nobody to serve it.
        """
        decision = policy.should_disaggregate(job.body)
        if not decision.disaggregate:
            return await self._decode_alone(call, job, decision.reason)
        pair = self._choose_pair(job, tried=set())
        if pair is None:
            return await self._fall_back(call, job, "no_prefill_instance")
        decision = policy.weigh(pair, job.prompt.num_tokens, job.matches, self._config)
        if not decision.disaggregate:
            return await self._decode_only(call, job, decision.reason, pair.decode)
        early = Early()
        try:
            async with self._queues.slot(
                Role.PREFILL, call, job.priority, job.prompt.num_tokens
            ) as has_waited:
                result = await self._prefill(call, job, early, None if has_waited else pair)
            return await self._finish(call, job, result, early)
        finally:
            early.cancel()

    async def _prefill(
        self, call: Call, job: Job, early: Early, first: Pair | None
    ) -> Prefilled | NotPrefilled | Refused | GivenUp:
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
            if len(tried) == 1 and policy.may_decode_early(choice.decode):
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
            self._release(instance, transfer_id)  # it may have prefilled all the same
            if call.attempts.are_spent:
                return _give_up(call, result)
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
        early: Early,
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

        def send() -> Awaitable[Opened] | None:
            if pause_s > 0 and not self._still_decodes(instance):
                return None
            self._index.note(job.prompt, instance.base_url)
            return self._decode_legs.open(
                instance, call, job.leg(params), _work(job), is_early=True
            )

        early.start(instance.base_url, params, pause_s, send)

    def _still_decodes(self, instance: Instance) -> bool:
        """Return whether an instance that was chosen a while ago may still get a decode leg."""
        return (
            instance in self._pool
            and instance.serves(Role.DECODE)
            and self._pool.is_accepting(instance)
            and policy.may_decode_early(instance.view(0.0))
        )

    async def _finish(
        self,
        call: Call,
        job: Job,
        result: Prefilled | NotPrefilled | Refused | GivenUp,
        early: Early,
    ) -> web.StreamResponse:
        """Answer the client once the prefill leg is over."""
        if isinstance(result, Refused):
            call.outcome.path = PATH_DISAGGREGATED
            return plain_answer(call, result.answer, result.answer.first)
        if isinstance(result, GivenUp):
            call.outcome.path = PATH_DISAGGREGATED
            return error_answer(call, result.status, result.message)
        if isinstance(result, NotPrefilled):
            early.cancel()  # it would wait for nothing
            if result.reason == "invalid_request":
                return await self._decode_only(call, job, result.reason)
            return await self._fall_back(call, job, result.reason)
        call.outcome.path = PATH_DISAGGREGATED
        try:
            began = time.monotonic()
            opened = await early.take(result)
            tried = self._failed_early(call, job, result, early, opened)
            if opened is not None and tried:
                opened.close()  # perhaps another one does better
                opened = None
            if opened is not None:
                if opened.answer.status == 200:
                    self._metrics.early_decodes.inc()
                if opened.answer.streamed:
                    self._metrics.note_decode_start(time.monotonic() - began)
                self._note_refusal(opened, result)
                with opened:
                    self._metrics.note_first_bytes(call.outcome, streamed=opened.answer.streamed)
                    _let_go(call, job)
                    return await self._decode_legs.relay(call, opened, result.details)
            return await self.decode(
                call,
                job.leg(result.kv_params),
                _work(job),
                job=job,
                prefilled=result,
                tried=tried,
            )
        except (asyncio.CancelledError, ConnectionResetError):  # the client left
            self._release(result.instance, str(result.kv_params.get("transfer_id")))
            raise

    def _failed_early(
        self, call: Call, job: Job, result: Prefilled, early: Early, opened: Opened | None
    ) -> set[str]:
        """Return whom to pass over as the early leg failed there, if there is anybody else."""
        failed_at = early.broke_at
        if opened is not None and opened.answer.status >= 500:
            failed_at = opened.instance.base_url
        if failed_at is None or call.attempts.are_spent:
            return set()
        tried = {failed_at}
        return tried if self._choose_decode(job, result.instance, tried) is not None else set()

    async def ask_for_stored(self, call: Call) -> web.StreamResponse:
        """Serve a request for a response from the instance that has stored it."""
        instance = await self._stored.speaker(call)
        # Without a slot: it is no work for an engine, and a cancellation even saves some.
        return await self.decode(call, None, Work(), only=instance)

    async def _decode_alone(self, call: Call, job: Job, reason: str) -> web.StreamResponse:
        """Have one instance do all, because only that is right."""
        owner = await self._stored.owner_of_previous(call, job.body)
        if owner is None:
            return await self._decode_only(call, job, reason)
        self.note_decode_only(call, reason)
        return await self.decode(call, job.leg(None), _work(job), job=job, only=owner)

    async def _decode_only(
        self, call: Call, job: Job, reason: str, view: InstanceView | None = None
    ) -> web.StreamResponse:
        """Have a decode instance prefill by itself, ``view`` if there is no other reason."""
        self.note_decode_only(call, reason)
        return await self.decode(call, job.leg(None), _work(job), job=job, first=view)

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

    async def decode(  # noqa: PLR0913  # what to send, and who may answer
        self,
        call: Call,
        leg: bytes | None,
        work: Work,
        *,
        job: Job | None = None,
        prefilled: Prefilled | None = None,
        first: InstanceView | None = None,
        only: Instance | None = None,
        tried: Collection[str] = (),
    ) -> web.StreamResponse:
        """Send the decode leg and relay its answer; another instance is tried if one fails.

        Args:
            call: the client's request.
            leg: the body.
            work: what it is for the instance.
            job: the client's body, if it was read.
            prefilled: where its KV cache is; None: nowhere.
            first: the instance for the first attempt; None: any.
            only: the one instance that can do it; None: any can.
            tried: instances that have failed with this request.

        Raises:
            NoInstanceError: there is no instance to try.
        """
        details = prefilled.details if prefilled else _NO_DETAILS
        producer = prefilled.instance if prefilled else None
        tried = set(tried)

        def choose() -> InstanceView | None:
            return None if only else self._choose_decode(job, producer, tried)

        if only is not None:
            first = only.view(0.0)
        attempts = call.attempts
        # Not the exception: it would keep this frame, and with it the body, from being freed.
        failure: tuple[int, str] | None = None
        while not attempts.are_spent and (view := first or choose()) is not None:
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
                    local_tokens=0
                    if job is None or prefilled
                    else policy.uncached(view, job.prompt.num_tokens, job.matches),
                )
            except UPSTREAM_ERRORS as exc:
                failure = attempts.failure
                if is_idle_timeout(exc):
                    break  # the client has waited long enough
                continue
            with opened:
                # Perhaps its engine is dead, or busy. Unless the request may be what engines
                # cannot stand, another one is tried.
                may_retry = opened.answer.status >= 500 and not attempts.are_spent
                if may_retry and choose() is not None:
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

    def note_decode_only(self, call: Call, reason: str) -> None:
        """Take note that a decode instance prefills by itself."""
        call.outcome.path = PATH_DECODE_ONLY
        self._metrics.note_decode_only(reason)

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

    def _note_refusal(self, opened: Opened, prefilled: Prefilled | None) -> None:
        """Release the prefill of a request that the decode instance has not even begun."""
        if prefilled is not None and opened.answer.status >= 400:
            self._release(prefilled.instance, str(prefilled.kv_params.get("transfer_id")))

    def _release(self, instance: Instance, transfer_id: str) -> None:
        """Give the blocks of a prefill back that nobody will fetch; best effort."""
        if instance.control is not None:
            self._control.release(instance.control, transfer_id)


def _give_up(call: Call, result: Failed) -> Refused | GivenUp:
    """Return the failure of the last prefill leg of a request as what the client gets."""
    if result.answer is not None:
        return Refused(result.answer)
    assert call.attempts.failure is not None
    return GivenUp(*call.attempts.failure)


def _let_go(call: Call, job: Job | None) -> None:
    """Free a body that no other instance will get, as one has begun to answer."""
    if job is not None:
        job.forget()
        call.hold.release()


def _work(job: Job) -> Work:
    return Work(kv_tokens=job.prompt.num_tokens, num_sequences=job.prompt.num_sequences)
