"""The prefill leg: one attempt on one instance, and what its answer means."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vllm_pd.config import Role
from vllm_pd.errors import ConfigError
from vllm_pd.protocol.params import is_of_pd_connector, pending_prefill_params
from vllm_pd.router import body as bodies
from vllm_pd.router.addresses import control_address
from vllm_pd.router.call import Call, Job
from vllm_pd.router.instance import Instance, describe
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.loads import Work
from vllm_pd.router.upstream import UPSTREAM_ERRORS, Answer, Upstream
from vllm_pd.router.usage import PromptDetails, prompt_details_of

logger = logging.getLogger(__name__)

_INVALID_REQUEST = (400, 422)
"""Refusals of the body itself; the prefill leg's differs from the client's."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt's KV cache waits at a prefill instance.

    Attributes:
        instance: that instance.
        kv_params: what the decode leg must carry.
        details: counts of prompt tokens, for the answer's usage.
    """

    instance: Instance
    kv_params: dict[str, Any]
    details: PromptDetails


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


@dataclass(frozen=True, slots=True)
class GivenUp:
    """The request broke too much: no further instance is risked.

    Attributes:
        status: HTTP status for the client.
        message: what failed last.
    """

    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Another prefill instance may do better.

    Attributes:
        answer: what it answered, for the client if nobody does better; None: nothing.
    """

    answer: Answer | None = None

    @property
    def busy(self) -> Answer | None:
        """The answer of an instance that has too much to do."""
        return self.answer if self.answer is not None and self.answer.status == 429 else None


PrefillResult: TypeAlias = Prefilled | NotPrefilled | Refused | Failed


class PrefillLegs:
    """Sends prefill legs."""

    def __init__(self, pool: InstancePool, upstream: Upstream) -> None:
        self._pool = pool
        self._upstream = upstream

    async def run(
        self, instance: Instance, call: Call, job: Job, *, transfer_id: str
    ) -> PrefillResult:
        """Have an instance prefill, and keep the KV cache under ``transfer_id``."""
        leg = bodies.dump(bodies.prefill_body(job.members, transfer_id, path=call.path))
        cached = job.matches.cached.get(instance.base_url, 0)
        work = Work(prefill_tokens=max(job.prompt.num_tokens - cached, 0), num_sequences=1)
        span = call.record.leg(Role.PREFILL, instance.base_url, path=call.path)
        with span, self._pool.in_use(instance, work) as use:
            try:
                answer = await self._upstream.prefill(
                    instance.base_url + call.path, span.headers(call.headers), leg
                )
            except UPSTREAM_ERRORS as exc:
                _warn(call, instance, describe(exc))
                use.failed(exc)
                span.fail(exc)
                call.attempts.note_error(exc, Role.PREFILL)
                return Failed()
            answer.close()  # it is complete
            span.answered(answer.status)
            call.attempts.note_status(answer.status)
            if answer.status == 200:
                use.succeeded()
        return self._judge(call, instance, answer)

    def _judge(self, call: Call, instance: Instance, answer: Answer) -> PrefillResult:
        if answer.status >= 500 or answer.status == 429:
            # Health is left to the probes: one request that makes the engine
            # answer 500 must not take every prefill instance out of use.
            _warn(call, instance, f"status {answer.status}")
            return Failed(answer)
        if answer.status in _INVALID_REQUEST:
            return NotPrefilled("invalid_request")
        if answer.status != 200:
            return Refused(answer)
        kv_params = bodies.kv_params_of(answer.first)
        if kv_params is None:
            _warn(call, instance, "it answered without kv_transfer_params")
            return NotPrefilled("no_kv_transfer_params")
        _learn(instance, kv_params)
        call.record.note_prompt(answer.first)
        return Prefilled(instance, kv_params, prompt_details_of(answer.first))


def early_params(instance: Instance, transfer_id: str) -> dict[str, Any] | None:
    """Return what lets a decode leg wait for a prefill that has not ended.

    None if it is not known which engine will have it, and where.
    """
    if instance.control is None or instance.engine_id is None or instance.several_engines:
        return None
    host, port = instance.control
    return pending_prefill_params(transfer_id, engine_id=instance.engine_id, host=host, port=port)


def is_as_expected(prefilled: Prefilled, params: Mapping[str, Any]) -> bool:
    """Return whether a prefill is where a decode leg was told to wait for it."""
    found = prefilled.kv_params
    if found.get("transfer_id") != params["transfer_id"]:
        return False  # of another attempt
    if found.get("remote_engine_id") != params["remote_engine_id"]:
        # It restarted, or has several engines behind one address: then any may be the next. Unless
        # it is known by now that it restarted.
        if found.get("remote_engine_id") != prefilled.instance.engine_id:
            prefilled.instance.several_engines = True
        return False
    return True


def _learn(instance: Instance, kv_params: Mapping[str, Any]) -> None:
    """Take note of where an instance's control endpoint is, if nobody has told.

    After a restart it is somewhere else, and with several engines in several places: the
    watcher finds out which.
    """
    host, port = kv_params.get("remote_host"), kv_params.get("remote_port")
    if not is_of_pd_connector(kv_params) or (host, port) == instance.control:
        return
    try:
        address = control_address(f"{host}:{port}")
    except ConfigError:
        return
    instance.heard = address
    instance.learn_now.set()


def _warn(call: Call, instance: Instance, what: str) -> None:
    logger.warning("prefill of %s on %s failed: %s", call.request_id, instance.base_url, what)
