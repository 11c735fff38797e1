"""Scheduler half of the connector: decides, never moves bytes.

It runs in vLLM's EngineCore process and reads little of vLLM's objects, which
the Protocols below name, so that it is tested without an engine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_pd.config import ConnectorConfig
from vllm_pd.connector.timeline import Timelines, wants_timeline
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.protocol.params import (
    RemotePrefill,
    parse_remote_prefill,
    prompt_digest,
    remote_prefill_params,
    transfer_id_of,
    wants_remote_decode,
)
from vllm_pd.session.fetches import FetchRequest
from vllm_pd.session.outbox import RemoteLease
from vllm_pd.session.producer import Grant
from vllm_pd.session.stats import FetchRecord

logger = logging.getLogger(__name__)

_DELIVERABLE = {"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"}
"""Final states of a request whose KV cache is complete and wanted."""


class SchedulerRequest(Protocol):
    """The part of ``vllm.v1.request.Request`` that this module reads."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None
    lora_request: Any
    mm_features: list[Any]
    cache_salt: str | None
    status: Any


class Endpoint(Protocol):
    """The part of ``session.instance.InstanceEndpoint`` that this module uses."""

    host: str
    port: int

    def take_releases(self) -> list[str]: ...  # noqa: D102
    def take_renewals(self) -> list[str]: ...  # noqa: D102
    def send_release(self, host: str, port: int, transfer_id: str) -> None: ...  # noqa: D102
    def start_renewing(self, request_id: str, lease: RemoteLease) -> None: ...  # noqa: D102
    def stop_renewing(self, request_id: str, *, once_more: bool) -> None: ...  # noqa: D102
    def try_hold(self, num_blocks: int) -> bool: ...  # noqa: D102
    def end_hold(self, num_blocks: int) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class StepNews:
    """What the worker half is told in one step; see ``PDConnectorMetadata``."""

    loads: list[FetchRequest]
    grants: list[Grant]
    releases: list[str]
    renewals: list[str]
    aborted_loads: list[str]
    num_blocks_saved: int


class PDConnectorScheduler:
    """Per-request decisions of one engine's scheduler process.

    Args:
        config: of the connector.
        engine_id: this engine.
        block_size: tokens per block.
        tp_size: tensor-parallel size, told to consumers.
        endpoint: this instance's control endpoint.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        engine_id: str,
        block_size: int,
        tp_size: int,
        endpoint: Endpoint,
    ) -> None:
        self._min_load_tokens = config.min_load_tokens
        self._prefill_wait_s = config.prefill_wait_s
        self._lease_s = config.lease_s
        self._engine_id = engine_id
        self._block_size = block_size
        self._tp_size = tp_size
        self._endpoint = endpoint
        self._remotes: dict[str, RemotePrefill | None] = {}  # request id -> its remote prefill
        self._decided: set[str] = set()  # requests whose remote KV was fetched or given up
        self._num_cached: dict[str, int] = {}  # tokens in the prefix cache, where nothing is loaded
        self._num_blocks_saved = 0
        self._leased: dict[str, Grant] = {}  # by request id
        self._transfer_ids: set[str] = set()  # of those
        self._timelines = Timelines()
        self._loads: list[FetchRequest] = []
        self._grants: list[Grant] = []
        self._loading: set[str] = set()  # requests whose load was handed over
        self._aborted_loads: list[str] = []

    def on_new_request(self, request: SchedulerRequest) -> None:
        """Keep the remote prefill of a request alive while it queues.

        Args:
            request: the request; vLLM calls this when it joins the queue.
        """
        if remote := self._remote_of(request):
            lease_s = remote.remote_lease_s or self._lease_s
            self._endpoint.start_renewing(
                request.request_id,
                RemoteLease(remote.remote_host, remote.remote_port, remote.transfer_id, lease_s),
            )
            if wants_timeline(request.kv_transfer_params):
                self._timelines.note_arrival(request.request_id)

    def get_num_new_matched_tokens(
        self, request: SchedulerRequest, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Decide how much of the prompt to load from the prefill instance.

        vLLM may ask several times for one request, so this records nothing but
        the checked params and the last answer's reason; the load is decided in
        ``update_state_after_alloc``.

        Args:
            request: the waiting request. Its ``kv_transfer_params`` name the
                remote prefill; without them nothing is loaded.
            num_computed_tokens: leading prompt tokens that the local prefix
                cache already covers.

        Returns:
            ``(num_tokens, load_async)``. ``num_tokens`` counts tokens, not
            blocks, and starts after ``num_computed_tokens``. ``load_async``
            is True exactly when ``num_tokens`` > 0: the request then waits in
            WAITING_FOR_REMOTE_KVS until the worker reports it received.
            ``(0, False)`` means: compute the prompt here.

        A request that has loaded once, well or badly, is not loaded again: after
        a failed load vLLM asks once more, and after a preemption the producer
        has freed the blocks.
        """
        remote = self._remote_of(request)
        if remote is None or request.request_id in self._decided:
            return 0, False
        # vLLM computes the last prompt token in any case, to have something to sample from.
        num_remote = _num_tokens(remote, request)
        num_saved = min(num_remote, request.num_prompt_tokens - 1)
        if num_saved - num_computed_tokens < self._min_load_tokens:
            self._num_cached[request.request_id] = num_computed_tokens
            return 0, False
        return num_remote - num_computed_tokens, True

    def update_state_after_alloc(
        self,
        request: SchedulerRequest,
        block_ids: Sequence[int],
        num_external_tokens: int,
    ) -> None:
        """Record a load, or give the remote prefill up.

        vLLM calls this for every admitted request, and a second time, with 0
        tokens, for one that has loaded.

        Args:
            request: the request.
            block_ids: all of its blocks, those of the local prefix cache first.
            num_external_tokens: tokens to load; 0 for none.
        """
        remote = self._remote_of(request)
        if remote is None or request.request_id in self._decided:
            return
        self._decided.add(request.request_id)
        num_cached = self._num_cached.pop(request.request_id, 0)
        # The fetch protects the lease while it reads, but it has to get there in time.
        self._endpoint.stop_renewing(request.request_id, once_more=num_external_tokens > 0)
        num_remote = _num_tokens(remote, request)
        if num_external_tokens == 0:
            self._num_blocks_saved += min(num_cached, num_remote) // self._block_size
            self._release(remote)
            return
        if wants_timeline(request.kv_transfer_params):
            self._timelines.expect(request.request_id)
        first = (num_remote - num_external_tokens) // self._block_size
        last = -(-num_remote // self._block_size)
        is_pending = remote.remote_num_tokens is None
        self._loading.add(request.request_id)
        self._loads.append(
            FetchRequest(
                request_id=request.request_id,
                transfer_id=remote.transfer_id,
                remote_engine_id=remote.remote_engine_id,
                remote_host=remote.remote_host,
                remote_port=remote.remote_port,
                block_offset=first,
                block_ids=tuple(block_ids[first:last]),
                prompt_digest=_digest(request, num_remote) if is_pending else "",
                wait_s=self._prefill_wait_s if is_pending else 0.0,
            )
        )

    def never_load(self, request_id: str) -> None:
        """Answer from now on that nothing is to be loaded for a request."""
        self._decided.add(request_id)

    def build_step_news(self) -> StepNews:
        """Return what the worker half must know now, and forget it."""
        renewals = [t for t in self._endpoint.take_renewals() if t in self._transfer_ids]
        releases = self._endpoint.take_releases()
        news = StepNews(
            self._loads,
            self._grants,
            releases,
            renewals,
            self._aborted_loads,
            self._num_blocks_saved,
        )
        self._loads, self._grants, self._aborted_loads = [], [], []
        self._num_blocks_saved = 0
        return news

    def request_finished(
        self, request: SchedulerRequest, block_ids: Sequence[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Decide whether a finished request's blocks are kept for a consumer.

        Args:
            request: the request; vLLM calls this once for each.
            block_ids: its blocks. 0.32 gives those of computed tokens, 0.23 may
                give more.

        Returns:
            ``(keep, params)``: True when vLLM must keep the blocks until the
            worker half reports the request as sent, and the
            ``kv_transfer_params`` of the response: of a prefill what its consumer
            needs, of a decode request its timeline if it asked for one.
        """
        if request.request_id not in self._remotes:  # aborted or rejected before it was scheduled
            remote = self._parse(request)
        else:
            remote = self._remotes.pop(request.request_id)
        self._num_cached.pop(request.request_id, None)
        if request.request_id in self._decided:
            self._decided.remove(request.request_id)
        elif remote is not None:
            self._endpoint.stop_renewing(request.request_id, once_more=False)
            self._release(remote)
        if request.request_id in self._loading:
            self._loading.remove(request.request_id)
            if request.status.name == "FINISHED_ABORTED":
                self._aborted_loads.append(request.request_id)  # if it has not ended yet
        timeline = self._timelines.take(request.request_id)
        params = request.kv_transfer_params
        if params is None or not wants_remote_decode(params):
            return False, timeline
        return self._grant(request, params, block_ids)

    def update_fetches(self, fetches: Iterable[FetchRecord]) -> None:
        """Take note of fetches that ended, for requests that want their timeline."""
        self._timelines.add(fetches)

    def update_finished_sending(self, request_ids: Iterable[str]) -> None:
        """Take note that the worker half has given blocks back."""
        for request_id in request_ids:
            if grant := self._leased.pop(request_id, None):
                self._transfer_ids.remove(grant.transfer_id)
                self._endpoint.end_hold(len(grant.block_ids))

    def _grant(
        self, request: SchedulerRequest, params: dict[str, Any], block_ids: Sequence[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        num_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        num_blocks = -(-num_tokens // self._block_size)
        if request.status.name not in _DELIVERABLE or not 0 < num_blocks <= len(block_ids):
            return False, None
        transfer_id = transfer_id_of(params, default=request.request_id)
        if transfer_id in self._transfer_ids:
            logger.warning("%s: transfer %s is leased already", request.request_id, transfer_id)
            return False, None
        kept = tuple(block_ids[:num_blocks])
        # Whatever can fail comes before the lease: once granted, vLLM must keep the blocks.
        remote = RemotePrefill(
            transfer_id=transfer_id,
            remote_engine_id=self._engine_id,
            remote_request_id=request.request_id,
            remote_host=self._endpoint.host,
            remote_port=self._endpoint.port,
            remote_num_tokens=num_tokens,
            remote_prompt_digest=_digest(request, num_tokens),
            remote_lease_s=self._lease_s,
        )
        answer = remote_prefill_params(remote, block_ids=kept, tp_size=self._tp_size)
        grant = Grant(transfer_id, request.request_id, kept, remote.remote_prompt_digest)
        if not self._endpoint.try_hold(len(kept)):
            logger.info("%s: draining, its KV cache is not kept", request.request_id)
            return False, None
        self._leased[request.request_id] = grant
        self._transfer_ids.add(transfer_id)
        self._grants.append(grant)
        return True, answer

    def _remote_of(self, request: SchedulerRequest) -> RemotePrefill | None:
        """Return the usable remote prefill of a request; checked once per request."""
        if not request.kv_transfer_params:
            return None
        if request.request_id not in self._remotes:
            self._remotes[request.request_id] = self._check(request)
        return self._remotes[request.request_id]

    def _check(self, request: SchedulerRequest) -> RemotePrefill | None:
        """Return the remote prefill if its KV is that of this prompt.

        Unusable params are logged and treated as absent. A client must not be
        able to fail the engine's step, and recomputing is always correct.
        """
        remote = self._parse(request)
        if remote is None:
            return None
        problem = None
        num_remote = _num_tokens(remote, request)
        if remote.remote_engine_id == self._engine_id:
            problem = "it was prefilled by this engine, so its prefix cache has it"
        elif num_remote > request.num_prompt_tokens:
            problem = f"{num_remote} remote tokens, {request.num_prompt_tokens} here"
        elif remote.remote_prompt_digest not in ("", _digest(request, num_remote)):
            problem = "the remote prefill is of another prompt, adapter, cache salt or image"
        if problem is None:
            return remote
        logger.warning("%s: prefilling locally: %s", request.request_id, problem)
        self._release(remote)
        return None

    def _parse(self, request: SchedulerRequest) -> RemotePrefill | None:
        try:
            return parse_remote_prefill(request.kv_transfer_params)
        except RemoteProtocolError as exc:
            logger.warning("%s: prefilling locally: %s", request.request_id, exc)
            return None

    def _release(self, remote: RemotePrefill) -> None:
        self._endpoint.send_release(remote.remote_host, remote.remote_port, remote.transfer_id)


def _num_tokens(remote: RemotePrefill, request: SchedulerRequest) -> int:
    """Return of how many leading prompt tokens the KV is there, or will be."""
    num_tokens = remote.remote_num_tokens
    return request.num_prompt_tokens if num_tokens is None else num_tokens


def _digest(request: SchedulerRequest, num_tokens: int) -> str:
    """Return the digest of a prompt's leading tokens, or ``""`` if it has no token ids."""
    if request.prompt_token_ids is None:  # prompt embeddings
        return ""
    salt = _salt(request, num_tokens)
    return prompt_digest(request.prompt_token_ids[:num_tokens], salt=salt)


def _salt(request: SchedulerRequest, num_tokens: int) -> str:
    """Return whatever the KV of a prompt's leading tokens depends on besides their ids.

    The ids of an image's tokens are all the same: vLLM's identifier, a digest of the
    image, tells them apart, as it does in the prefix cache.
    """
    lora_name = getattr(request.lora_request, "lora_name", "")
    inputs = [
        (feature.identifier, feature.mm_position.offset)
        for feature in request.mm_features
        if feature.mm_position.offset < num_tokens
    ]
    if not (lora_name or request.cache_salt or inputs):
        return ""
    return json.dumps([lora_name, request.cache_salt or "", inputs])
