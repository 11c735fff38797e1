"""A worker without a model beside an ``Engine``: vLLM's own step around our worker half."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from tests.connector.harness import BLOCK_SIZE, Engine, Step
from vllm_pd.connector.stats import PDConnectorStats

if TYPE_CHECKING:
    import pytest
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

NUM_HEADS = 2
HEAD_SIZE = 32


class Instance:
    """An engine and its one worker.

    Args:
        engine: the scheduler's side.
        monkeypatch: stands in for the process group of one worker.
        fill: the byte that the KV cache holds at first.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, *, fill: int) -> None:
        self.engine = engine
        self.num_computed: Counter[str] = Counter()
        self.num_bytes_saved = 0
        self._monkeypatch = monkeypatch
        self._caches = _kv_caches(engine, fill)
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
        self._connector = KVConnectorFactory.create_connector(
            engine.config, KVConnectorRole.WORKER, engine.kv_cache_config
        )
        self._connector.register_kv_caches(self._caches)
        address = self._connector.get_handshake_metadata()
        assert address is not None
        connector = engine.scheduler.get_kv_connector()
        assert connector is not None
        connector.set_xfer_handshake_metadata_pp_aware({(0, 0): address})

    def close(self) -> None:
        self._connector.shutdown()  # type: ignore[no-untyped-call]

    @property
    def connector(self) -> KVConnectorBase_V1:
        """The worker half, as vLLM has it."""
        return self._connector

    @property
    def block_len(self) -> int:
        """Bytes of one block in all layers."""
        return sum(cache[0].nbytes for cache in self._caches.values())

    def holds(self, block_id: int, value: int) -> bool:
        """Whether every byte of a block is this one, in every layer."""
        return all(bool((cache[block_id] == value).all()) for cache in self._caches.values())

    def step(self) -> Step:
        """Do one step of the engine, with the worker's part done by vLLM's mixin."""
        step = self.engine.step_with(self._run_worker)
        self.num_computed.update(step.num_scheduled)
        return step

    def _run_worker(self, scheduled: SchedulerOutput) -> KVConnectorOutput | None:
        """Call the hooks as a worker does, but for the forward pass."""
        with self._monkeypatch.context() as patched:
            patched.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", self._connector)
            run = KVConnectorModelRunnerMixin.kv_connector_no_forward
            found = run(scheduled, self.engine.config).kv_connector_output
        if found is not None and isinstance(found.kv_connector_stats, PDConnectorStats):
            self.num_bytes_saved += found.kv_connector_stats.data["num_bytes_saved"]
        return found


def _kv_caches(engine: Engine, fill: int) -> dict[str, torch.Tensor]:
    """Allocate what a CPU worker does: 0.23 each layer, 0.32 all layers at once."""
    num_blocks = engine.kv_cache_config.num_blocks
    shape = (num_blocks, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    (group,) = engine.kv_cache_config.kv_cache_groups
    names = group.layer_names
    if hasattr(engine.config.cache_config, "kv_cache_layout"):
        whole = torch.full((len(names), *shape), fill, dtype=torch.uint8)
        return {name: whole[i] for i, name in enumerate(names)}
    return {name: torch.full(shape, fill, dtype=torch.uint8) for name in names}
