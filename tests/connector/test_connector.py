"""The class vLLM sees, made by vLLM's own factory from vLLM's own configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.connector.test_scheduler import KEEP, FakeRequest
from vllm_pd.demo.model import Geometry, write_untrained_model
from vllm_pd.errors import ConfigError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Importing vLLM warns about its own dependencies.
vllm_warnings = pytest.mark.filterwarnings("ignore")

MakeConnector = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "untrained"
    write_untrained_model(folder, Geometry(num_layers=1), seed=0)
    return folder


@pytest.fixture
def make(model: Path) -> Iterator[MakeConnector]:
    """Return a function that makes a scheduler-side connector as EngineCore does."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.engine.arg_utils import EngineArgs

    from vllm_pd.connector import register

    register()
    register()  # vLLM may load plugins more than once
    made: list[Any] = []

    def make_connector(name: str = "PDConnector", kv_cache: Any = None, **extra: Any) -> Any:
        transfer = KVTransferConfig(
            kv_connector=name,
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=extra,
        )
        args = EngineArgs(model=str(model), enforce_eager=True, kv_transfer_config=transfer)
        config = args.create_engine_config()
        connector = KVConnectorFactory.create_connector(
            config,
            KVConnectorRole.SCHEDULER,
            kv_cache,
        )
        made.append(connector)
        return connector

    yield make_connector
    for connector in made:
        connector.shutdown()
        connector.shutdown()


@vllm_warnings
def test_unknown_option_is_refused_by_name(make: MakeConnector) -> None:
    with pytest.raises(ConfigError, match="lease_seconds"):
        make(lease_seconds=5)


@vllm_warnings
def test_model_with_a_sliding_window_alone_is_refused_by_its_spec(make: MakeConnector) -> None:
    """Its skipped positions have the null block, which all requests share."""
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

    spec = SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64
    )
    groups = [KVCacheGroupSpec(["layers.0.attn"], spec)]
    with pytest.raises(ConfigError, match="KV cache is of SlidingWindowSpec"):
        make(kv_cache=KVCacheConfig(8, [], groups))


@vllm_warnings
def test_hccl_connector_insists_on_hccl(make: MakeConnector) -> None:
    from vllm_pd.connector.connector import HcclConnector

    assert isinstance(make("HcclConnector"), HcclConnector)


@vllm_warnings
def test_finished_prefill_is_kept_and_answered(make: MakeConnector) -> None:
    connector = make()
    request = FakeRequest(KEEP)
    block_size = connector._vllm_config.cache_config.block_size  # noqa: SLF001 - vLLM's
    keep, params = connector.request_finished_all_groups(request, ([7, 8, 9],))
    assert keep
    assert params["remote_block_ids"] == [7, 8, 9][: -(-40 // block_size)]
    step = SimpleNamespace(total_num_scheduled_tokens=0)
    metadata = connector.build_connector_meta(step)
    assert [grant.request_id for grant in metadata.grants] == ["req-1"]


@vllm_warnings
@pytest.mark.parametrize(
    ("hook", "arguments", "answer"),
    [
        ("get_num_new_matched_tokens", (None, 0), (0, False)),
        ("update_state_after_alloc", (None, None, 5), None),
        ("request_finished", (None, []), (False, None)),
        ("request_finished_all_groups", (None, ([],)), (False, None)),
        ("update_connector_output", (None,), None),
        ("set_xfer_handshake_metadata_pp_aware", (None,), None),
        ("get_finished", (set(),), (None, None)),  # a worker's hook on a scheduler's half
        ("get_block_ids_with_load_errors", (), set()),
    ],
)
def test_exception_never_leaves_a_hook(
    make: MakeConnector, hook: str, arguments: tuple[Any, ...], answer: object
) -> None:
    """It would end the engine; vLLM gets the answer that makes it compute by itself."""
    assert getattr(make(), hook)(*arguments) == answer
