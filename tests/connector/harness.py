"""Engines without a model: vLLM's real scheduler and this project's connector.

``Engine`` is what EngineCore is to its scheduler: it makes it from vLLM's own
configuration, steps it, and answers for the workers. The tests decide what the
workers report. Works with every supported vLLM, whichever is importable.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_pd.connector import register
from vllm_pd.connector.metadata import PDConnectorMetadata

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

BLOCK_SIZE = 32
MAX_LEN = 192
SAMPLED = 7
"""The token that every forward pass samples."""


@dataclass(frozen=True)
class ExternalHits:
    """Prompt tokens that vLLM counts as loaded from elsewhere.

    Attributes:
        num_tokens: how many.
        by_source: the same by vLLM's label; None where it has no labels.
    """

    num_tokens: int
    by_source: dict[str, int] | None


@dataclass(frozen=True)
class Step:
    """What one engine step did.

    Attributes:
        metadata: what the connector's worker half was told.
        num_scheduled: tokens to compute, by request.
        finished: requests that ended, with the ``kv_transfer_params`` of their response.
            With overlap, by the output of the step before.
        finish_reasons: of the same requests.
        external_hits: of the requests that this step admitted.
    """

    metadata: PDConnectorMetadata
    num_scheduled: dict[str, int]
    finished: dict[str, dict[str, Any] | None]
    finish_reasons: dict[str, str]
    external_hits: ExternalHits


class Engine:
    """One instance's scheduler, with a connector made by vLLM's factory.

    Args:
        model: checkpoint folder; only its configuration is read.
        num_blocks: size of the KV cache; vLLM keeps one block of it for itself.
        failure_policy: ``kv_load_failure_policy``.
        max_step_tokens: ``max_num_batched_tokens``; longer prompts are computed in chunks.
        overlap: schedule each step before the output of the one before has come, as
            vLLM does on accelerators (asynchronous scheduling).
        engine_id: as a platform may set it; None: vLLM's own.
        extra: the connector's options.
    """

    def __init__(
        self,
        model: Path,
        *,
        num_blocks: int = 64,
        failure_policy: Literal["recompute", "fail"] = "recompute",
        max_step_tokens: int = 4096,
        overlap: bool = False,
        engine_id: str | None = None,
        **extra: Any,
    ) -> None:
        register()
        transfer = KVTransferConfig(
            kv_connector="PDConnector",
            kv_role="kv_both",
            kv_load_failure_policy=failure_policy,
            kv_connector_extra_config=extra,
        )
        if engine_id is not None:
            transfer.engine_id = engine_id
        self.config = _vllm_config(model, transfer, num_blocks, max_step_tokens)
        self.config.scheduler_config.async_scheduling = overlap  # CPU turns it off
        self.kv_cache_config = _kv_cache_config(self.config)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(
            self.kv_cache_config, self.config
        )
        scheduler_class: type[Scheduler] = AsyncScheduler if overlap else Scheduler
        self.scheduler = scheduler_class(
            vllm_config=self.config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=block_size,
            hash_block_size=hash_block_size,
            log_stats=True,
        )
        hash_fn = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(hash_block_size, hash_fn)
        self._ids = itertools.count()
        self._num_ahead = 1 if overlap else 0
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def close(self) -> None:
        self.scheduler.shutdown()

    @property
    def engine_id(self) -> str:
        assert self.config.kv_transfer_config is not None
        return str(self.config.kv_transfer_config.engine_id)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that vLLM may hand out now, cached ones included."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def num_requests(self) -> int:
        """Requests that vLLM has not forgotten, those with kept blocks included."""
        return len(self.scheduler.requests)

    @property
    def request_ids(self) -> set[str]:
        """Ids of the same requests."""
        return set(self.scheduler.requests)

    def block_ids(self, request_id: str) -> list[int]:
        """Return the blocks a request holds."""
        (block_ids,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return list(block_ids)

    def status(self, request_id: str) -> str:
        return str(self.scheduler.requests[request_id].status.name)

    def num_preemptions(self, request_id: str) -> int:
        return int(self.scheduler.requests[request_id].num_preemptions)

    def add(
        self,
        prompt: Sequence[int],
        params: dict[str, Any] | None = None,
        *,
        max_tokens: int = 1,
    ) -> str:
        """Queue a request and return its id."""
        extra_args = None if params is None else {"kv_transfer_params": params}
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args)
        request_id = f"req-{next(self._ids)}"
        request = Request(request_id, list(prompt), sampling, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        return request_id

    def abort(self, *request_ids: str) -> None:
        """End requests as a client's disconnect does."""
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def step(
        self,
        *,
        sent: Iterable[str] = (),
        received: Iterable[str] = (),
        invalid: Iterable[int] = (),
    ) -> Step:
        """Schedule, "compute", and report what the workers found.

        Args:
            sent: requests whose kept blocks may be freed now.
            received: requests whose loads have ended, well or badly.
            invalid: blocks of loads that failed.
        """
        found = KVConnectorOutput(
            finished_sending=set(sent),
            finished_recving=set(received),
            invalid_block_ids=set(invalid),
        )
        return self.step_with(lambda _: found)

    def step_with(self, run_worker: Callable[[SchedulerOutput], KVConnectorOutput | None]) -> Step:
        """Do the same, where ``run_worker`` finds what is reported."""
        scheduled = self.scheduler.schedule()
        metadata = scheduled.kv_connector_metadata
        assert isinstance(metadata, PDConnectorMetadata)
        self._in_flight.append((scheduled, self._compute(scheduled)))
        found = run_worker(scheduled)
        ended: list[EngineCoreOutput] = []
        external_hits = ExternalHits(0, None)
        if len(self._in_flight) > self._num_ahead:
            oldest, output = self._in_flight.popleft()
            output.kv_connector_output = found
            answers = list(self.scheduler.update_from_output(oldest, output).values())
            ended = [a for each in answers for a in each.outputs if a.finish_reason is not None]
            external_hits = _external_hits(answers)
        else:
            is_empty = found is None or found.is_empty()  # type: ignore[no-untyped-call]
            assert is_empty, "the first step has no output yet"
        return Step(
            metadata,
            dict(scheduled.num_scheduled_tokens),
            {answer.request_id: answer.kv_transfer_params for answer in ended},
            {answer.request_id: str(answer.finish_reason) for answer in ended},
            external_hits,
        )

    def _compute(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """Sample a token for each request of which no prompt token is left to compute."""
        request_ids = list(scheduled.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for request_id in request_ids:
            request = self.scheduler.requests[request_id]
            is_done = request.num_computed_tokens >= request.num_tokens
            sampled.append([SAMPLED] if is_done else [])
        indices = {request_id: i for i, request_id in enumerate(request_ids)}
        return ModelRunnerOutput(request_ids, indices, sampled_token_ids=sampled)


def _external_hits(answers: list[EngineCoreOutputs]) -> ExternalHits:
    (stats,) = [each.scheduler_stats for each in answers if each.scheduler_stats is not None]
    counted = stats.connector_prefix_cache_stats
    assert counted is not None
    labels = getattr(counted, "hits_by_source", None)
    by_source = None if labels is None else {label.value: num for label, num in labels.items()}
    return ExternalHits(counted.hits, by_source)


def _vllm_config(
    model: Path, transfer: KVTransferConfig, num_blocks: int, max_step_tokens: int
) -> VllmConfig:
    args = EngineArgs(
        model=str(model),
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=max_step_tokens,
        num_gpu_blocks_override=num_blocks,
        kv_transfer_config=transfer,
    )
    return args.create_engine_config()


def _kv_cache_config(config: VllmConfig) -> KVCacheConfig:
    """Return the scheduler's view of the KV cache, made as EngineCore makes it."""
    model = config.model_config
    spec = FullAttentionSpec(
        block_size=config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(config.parallel_config),
        head_size=model.get_head_size(),
        dtype=torch.float32,
    )
    num_layers = model.get_num_layers(config.parallel_config)
    specs: dict[str, KVCacheSpec] = {f"layers.{i}.attn": spec for i in range(num_layers)}
    cache = config.cache_config
    if hasattr(cache, "kv_cache_layout"):  # 0.32 lets the workers choose; CPU has one
        cache.kv_cache_layout = "LBHNC"
    memory = (cache.num_gpu_blocks_override or 1) * spec.page_size_bytes * num_layers
    made = generate_scheduler_kv_cache_config(get_kv_cache_configs(config, [specs], [memory]))
    cache.num_gpu_blocks = made.num_blocks
    return made
