"""The class vLLM sees. It delegates; differences between vLLM versions are in ``compat``.

Works with vLLM 0.23.0 to 0.32.0: hooks that one of them lacks are harmless to
define. An exception that leaves a hook ends the engine, so after start-up every
hook is contained: it is logged, and the answer is the one that makes vLLM compute
by itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from vllm_pd.config import ConnectorConfig, from_mapping
from vllm_pd.connector.compat import (
    cache_hit_source,
    cpu_packing,
    engine_index,
    in_rank_order,
    plain_mapping,
    preferred_layout,
    unsupported_specs,
)
from vllm_pd.connector.kv_cache import model_digest
from vllm_pd.connector.metadata import PDConnectorMetadata, PDHandshakeMetadata
from vllm_pd.connector.metrics import PDPromMetrics
from vllm_pd.connector.scheduler import PDConnectorScheduler
from vllm_pd.connector.stats import PDConnectorStats, StatsReporter
from vllm_pd.connector.worker import PDConnectorWorker
from vllm_pd.errors import ConfigError
from vllm_pd.protocol.messages import Fingerprint, WorkerAddress
from vllm_pd.session.instance import InstanceEndpoint

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def _contained(answer: Callable[[], Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a hook's exception out of vLLM's engine loop; ``answer()`` is returned instead."""

    def decorate(hook: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(hook)
        def contained(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return hook(*args, **kwargs)
            except Exception:
                logger.exception("%s failed; vLLM goes on without it", hook.__name__)
                value: R = answer()
                return value

        return contained

    return decorate


class PDConnector(KVConnectorBase_V1, SupportsHMA):
    """Moves KV cache blocks from prefill to decode instances.

    Raises:
        ConfigError: ``kv_connector_extra_config`` or the model's KV cache cannot be used.
    """

    _transport: str | None = None  # forced by a subclass
    _cache_hit_source = cache_hit_source()  # read by vLLM

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _use_vllm_log_handlers()
        transfer_config = vllm_config.kv_transfer_config
        assert transfer_config is not None
        extra = dict(transfer_config.kv_connector_extra_config)
        if self._transport is not None:
            extra["transport"] = self._transport
        config = from_mapping(ConnectorConfig, extra, source="kv_connector_extra_config")
        _check_supported(vllm_config, kv_cache_config)
        if transfer_config.kv_load_failure_policy != "recompute":
            logger.warning(
                'kv_load_failure_policy is %r: a lost transfer fails its request; "recompute" '
                "computes the prompt here instead",
                transfer_config.kv_load_failure_policy,
            )
        engine_id = str(transfer_config.engine_id)
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        self._failed_loads: list[tuple[str, tuple[int, ...]]] = []
        self._worker_states: dict[str, Any] = {}  # by rank, for the metrics
        self._endpoint: InstanceEndpoint | None = None
        self._scheduler: PDConnectorScheduler | None = None
        self._worker: PDConnectorWorker | None = None
        self._reporter: StatsReporter | None = None
        if role == KVConnectorRole.SCHEDULER:
            if config.side_channel_port:
                port = config.side_channel_port + engine_index(vllm_config.parallel_config)
                config = msgspec.structs.replace(config, side_channel_port=port)
            self._endpoint = InstanceEndpoint(config, engine_id=engine_id, tp_size=tp_size)
            self._scheduler = PDConnectorScheduler(
                config,
                engine_id=engine_id,
                block_size=vllm_config.cache_config.block_size,
                tp_size=tp_size,
                endpoint=self._endpoint,
            )
        else:
            self._worker = PDConnectorWorker(
                config,
                engine_id=engine_id,
                tp_rank=_tp_rank(),
                tp_size=tp_size,
                fingerprint=_fingerprint(vllm_config, kv_cache_config),
                additional_config=plain_mapping(vllm_config.additional_config),
            )
            self._reporter = StatsReporter(self._worker)

    # Scheduler half

    @_contained(lambda: None)
    def on_new_request(self, request: Request) -> None:
        """See PDConnectorScheduler."""
        self._scheduler_half.on_new_request(request)

    @_contained(lambda: (0, False))
    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See PDConnectorScheduler."""
        return self._scheduler_half.get_num_new_matched_tokens(request, num_computed_tokens)

    @_contained(lambda: None)
    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See PDConnectorScheduler."""
        block_ids = blocks.get_block_ids()[0]
        try:
            self._scheduler_half.update_state_after_alloc(request, block_ids, num_external_tokens)
        except Exception:
            # vLLM waits for these blocks from now on: somebody must report them.
            if num_external_tokens:
                self._scheduler_half.never_load(request.request_id)
                self._failed_loads.append((request.request_id, tuple(block_ids)))
            raise

    @_contained(PDConnectorMetadata)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Pack what the worker half must know in this step."""
        computes = scheduler_output.total_num_scheduled_tokens > 0
        news = self._scheduler_half.build_step_news()
        failed, self._failed_loads = self._failed_loads, []
        return PDConnectorMetadata(
            news.loads,
            news.grants,
            news.releases,
            news.renewals,
            news.aborted_loads,
            failed,
            news.num_blocks_saved,
            computes=computes,
        )

    @_contained(lambda: None)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take note of blocks that the worker half gave back, and of fetches that ended."""
        if connector_output.finished_sending:
            self._scheduler_half.update_finished_sending(connector_output.finished_sending)
        stats = connector_output.kv_connector_stats
        if isinstance(stats, PDConnectorStats):  # vLLM sends these on after this hook
            stats.remember_workers(self._worker_states)
            self._scheduler_half.update_fetches(stats.fetches)

    @_contained(lambda: (False, None))
    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See PDConnectorScheduler."""
        return self._scheduler_half.request_finished(request, block_ids)

    @_contained(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As ``request_finished``; there is one group, which the constructor checks."""
        return self._scheduler_half.request_finished(request, block_ids[0] if block_ids else [])

    @_contained(lambda: None)
    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Learn where the workers are."""
        self._set_workers(in_rank_order(metadata))

    @_contained(lambda: None)
    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[Any, KVConnectorHandshakeMetadata]
    ) -> None:
        """Learn where the workers are; keys are (pp, tp), on vllm-ascend (pp, pcp, tp)."""
        self._set_workers(in_rank_order(metadata))

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Make the KV cache reachable for peers; an exception here stops the start-up."""
        self._worker_half.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Tell the scheduler half where this worker is."""
        address = self._worker_half.address
        if address is None:
            return None
        worker = self._worker_half
        return PDHandshakeMetadata(
            worker.tp_rank, *address, msgspec.msgpack.encode(worker.fingerprint)
        )

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Start this step's transfers.

        Here and not in ``start_load_kv``, which 0.32 calls after the forward pass.
        """
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, PDConnectorMetadata):
            self._start(connector_metadata)

    @_contained(lambda: None)
    def _start(self, metadata: PDConnectorMetadata) -> None:
        self._worker_half.fail(metadata.failed_loads)
        self._worker_half.add_saved_blocks(metadata.num_blocks_saved)
        self._worker_half.start(
            metadata.loads,
            metadata.grants,
            metadata.releases,
            metadata.renewals,
            metadata.aborted_loads,
        )
        # Here the engine's thread has not begun to compute; what it issues now comes first.
        self._worker_half.pump()

    @_contained(lambda: (None, None))
    def get_finished(
        self,
        finished_req_ids: set[str],  # noqa: ARG002
    ) -> tuple[set[str] | None, set[str] | None]:
        """Report each request once, when its blocks are sent, received or failed."""
        metadata = self._connector_metadata
        if isinstance(metadata, PDConnectorMetadata) and not metadata.computes:
            self._worker_half.wait_for_fetch()
        return self._worker_half.get_finished()

    @_contained(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Report the blocks of failed fetches in the step that reports their request."""
        return self._worker_half.take_invalid_block_ids()

    @_contained(lambda: None)
    def get_kv_connector_stats(self) -> PDConnectorStats | None:
        """Report what happened since the last step.

        Both halves are asked; 0.23 asks the scheduler half only in steps in which workers
        have reported, so its news wait until then.
        """
        if self._reporter is not None:
            return self._reporter.take()
        dropped = self._endpoint.take_num_dropped() if self._endpoint is not None else None
        return PDConnectorStats.of_instance(dropped) if dropped else None

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Do nothing; loads started in ``bind_connector_metadata``."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing; a request runs only after all of its layers have arrived."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing; blocks are read where they are, after the prefill."""

    def wait_for_save(self) -> None:
        """Do nothing; see ``save_kv_layer``."""

    # Both halves

    def shutdown(self) -> None:
        """Stop threads and close sockets; idempotent."""
        if self._worker is not None:
            self._worker.close()
        if self._endpoint is not None:
            self._endpoint.close()

    # Where there is no instance of this class: before there is one, and in the API server

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Ask for the order of a block's contents that is best to transfer; None: any."""
        return preferred_layout(vllm_config)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PDConnectorStats:
        """Make stats for vLLM's log; a copy, as several loggers read ``data``."""
        stats = PDConnectorStats()
        return stats if data is None else stats.aggregate(PDConnectorStats(data))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PDPromMetrics:
        """Make the metrics that vLLM shows beside its own."""
        return PDPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _scheduler_half(self) -> PDConnectorScheduler:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _worker_half(self) -> PDConnectorWorker:
        assert self._worker is not None
        return self._worker

    def _set_workers(self, workers: list[KVConnectorHandshakeMetadata]) -> None:
        ours = [worker for worker in workers if isinstance(worker, PDHandshakeMetadata)]
        if self._endpoint is not None and ours:
            self._endpoint.set_workers(
                [WorkerAddress(tp_rank=w.tp_rank, host=w.host, port=w.port) for w in ours],
                msgspec.msgpack.decode(ours[0].fingerprint, type=Fingerprint),
            )


class HcclConnector(PDConnector):
    """PDConnector that insists on the HCCL transport (``ascend-vllm-plugin``)."""

    _transport = "hccl"


def _check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> None:
    """Refuse what would give wrong answers.

    Raises:
        ConfigError: pipeline or context parallelism, more than one KV cache group, or
            one in which vLLM drops blocks of a prompt, or adds some.
    """
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name} > 1 is not supported by this connector")
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    if len(groups) > 1:
        raise ConfigError(
            f"the model has {len(groups)} KV cache groups",
            hint="models that mix attention types are not supported yet",
        )
    if refused := unsupported_specs(group.kv_cache_spec for group in groups):
        raise ConfigError(
            f"the model's KV cache is of {', '.join(refused)}",
            hint="only full attention and multi-head latent attention are supported yet",
        )


def _tp_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()


def _fingerprint(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Fingerprint:
    from vllm.platforms import current_platform

    model, cache = vllm_config.model_config, vllm_config.cache_config
    device = current_platform.device_type
    layout = f"{device}:{cpu_packing(vllm_config)}" if device == "cpu" else device
    dtype = str(model.dtype).removeprefix("torch.")
    groups = kv_cache_config.kv_cache_groups
    return Fingerprint(
        model=model_digest(model.model, model.revision, model.hf_config.to_dict()),
        dtype=dtype,
        kv_cache_dtype=dtype if cache.cache_dtype == "auto" else str(cache.cache_dtype),
        quantization=str(model.quantization or ""),
        num_layers=sum(len(group.layer_names) for group in groups),
        # The latent cache of MLA is one head, which every rank holds whole.
        num_kv_heads=1 if model.use_mla else model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        block_size=cache.block_size,
        kv_layout=layout,
    )


def _use_vllm_log_handlers() -> None:
    """Let this package's log lines look like, and go where, vLLM's go."""
    ours, theirs = logging.getLogger("vllm_pd"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
        ours.propagate = not theirs.handlers
