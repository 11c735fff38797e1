"""The code for vLLM's versions, in whichever vLLM is importable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from vllm_pd.connector.compat import (
    cpu_packing,
    engine_index,
    preferred_layout,
    unsupported_specs,
)
from vllm_pd.connector.kv_cache import memory_order, to_layout, to_regions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from tests.connector.harness import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]


def test_packing_names_the_instruction_set_and_the_release(consumer: Engine) -> None:
    import vllm

    instruction_set, _, release = cpu_packing(consumer.config).split(":")
    assert instruction_set in {"amx", "neon", "rvv", "vec", "vec16", "vsx", "vxe"}
    assert release == f"vllm-{'.'.join(vllm.__version__.split('.')[:2])}"


def test_data_parallel_engines_of_a_dense_model_differ(consumer: Engine) -> None:
    parallel = consumer.config.parallel_config
    parallel.data_parallel_index = 3  # as EngineCore does for the fourth engine
    parallel.data_parallel_rank = 0
    assert engine_index(parallel) == 3


ATTENTION: dict[str, Any] = {
    "block_size": 32,
    "num_kv_heads": 2,
    "head_size": 64,
    "dtype": torch.bfloat16,
}


def spec_of(name: str, **changes: Any) -> Any:
    """Make one of vLLM's own specs; skip where this version has none of that name."""
    from vllm.v1 import kv_cache_interface

    if not hasattr(kv_cache_interface, name):
        pytest.skip(f"this vLLM has no {name}")
    return getattr(kv_cache_interface, name)(**{**ATTENTION, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("FullAttentionSpec", {}),
        # Without the hybrid allocator: all blocks are there, the window is the kernel's matter.
        ("FullAttentionSpec", {"sliding_window": 64}),
        ("MLAAttentionSpec", {"num_kv_heads": 1}),
    ],
)
def test_full_attention_can_be_transferred(name: str, changes: dict[str, Any]) -> None:
    assert unsupported_specs([spec_of(name, **changes)]) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SlidingWindowSpec", {"sliding_window": 64}),
        ("SlidingWindowMLASpec", {"sliding_window": 64, "num_kv_heads": 1}),
        ("ChunkedLocalAttentionSpec", {"attention_chunk_size": 64}),
        ("CrossAttentionSpec", {}),
        ("EncoderOnlyAttentionSpec", {}),
        ("SinkFullAttentionSpec", {"sink_len": 32}),
        ("HiddenStateCacheSpec", {}),
        ("RSWASpec", {"rswa_window": 64}),
    ],
)
def test_attention_whose_blocks_mean_something_else_is_named(
    name: str, changes: dict[str, Any]
) -> None:
    assert unsupported_specs([spec_of(name, **changes)]) == [name]


def test_state_of_a_linear_layer_is_named() -> None:
    from vllm.v1.kv_cache_interface import MambaSpec

    spec = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    assert unsupported_specs([spec]) == ["MambaSpec"]


def test_layers_of_one_group_are_looked_at_one_by_one() -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    full, window = spec_of("FullAttentionSpec"), spec_of("SlidingWindowSpec", sliding_window=64)
    wider = spec_of("FullAttentionSpec", head_size=128)
    good = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": full, "b": wider})
    mixed = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": full, "b": window})
    assert unsupported_specs([good]) == []
    assert unsupported_specs([good, mixed]) == ["SlidingWindowSpec"]


def layout_vllm_asks_for(config: VllmConfig) -> str | None:
    """Return what vLLM's own code learns from the connector."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout

    with set_current_vllm_config(config):
        layout: str | None = get_kv_connector_cache_layout()
    return layout


@pytest.mark.parametrize(
    ("device", "layout"), [("cuda", "HND"), ("xpu", "HND"), ("npu", None), ("cpu", None)]
)
def test_heads_are_asked_for_before_tokens_where_there_is_a_choice(
    consumer: Engine, monkeypatch: pytest.MonkeyPatch, device: str, layout: str | None
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", device)
    assert preferred_layout(consumer.config) == layout
    # 0.23 has a default of its own where the connector has no wish.
    assert layout_vllm_asks_for(consumer.config) in {layout, layout or "NHD"}


def test_layout_of_latent_caches_is_left_to_vllm(
    consumer: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", "cuda")
    monkeypatch.setattr(type(consumer.config.model_config), "use_mla", True)
    assert preferred_layout(consumer.config) is None


def views(layout_name: str, num_heads: int) -> dict[str, torch.Tensor]:
    """Return two layers of KV cache as vLLM 0.32 makes them of one allocation."""
    kv_cache_layout = pytest.importorskip("vllm.v1.kv_cache_layout", reason="0.32 has layouts")
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )

    layout = kv_cache_layout.KVCacheLayout[layout_name]
    spec = FullAttentionSpec(**{**ATTENTION, "num_kv_heads": num_heads})
    num_blocks, names = 6, ["layers.0", "layers.1"]
    size = num_blocks * len(names) * spec.page_size_bytes
    layer_stride, block_stride, *_ = compute_layout_strides(spec, num_blocks, len(names), layout)
    placed = KVCacheTensor(
        size=size, layers=names, layer_stride=layer_stride, block_stride=block_stride
    )
    raw = torch.zeros(size, dtype=torch.int8)
    made = create_kv_cache_views(raw, spec, num_blocks, layout, placed)
    return dict(zip(names, made, strict=True))


@pytest.mark.parametrize("num_heads", [1, 2, 8, 32])
@pytest.mark.parametrize(
    ("layout_name", "order", "num_rows"), [("LBHNC", "BHNC", 1), ("LBNHC", "BNHC", 32)]
)
def test_every_dense_layout_of_vllm_is_recognised(
    layout_name: str, order: str, num_rows: int, num_heads: int
) -> None:
    caches = views(layout_name, num_heads)
    assert memory_order(caches, num_heads=num_heads, block_size=32) == order
    layout = to_layout(to_regions(caches, num_heads=num_heads, block_size=32))
    assert layout.num_rows == (num_rows, num_rows)
    assert layout.block_len == 2 * num_heads * 32 * 2 * 64 * 2  # layers, K and V, bfloat16


@pytest.mark.parametrize("layout_name", ["BLHNC", "BLNHC", "BHLNC", "LHBNC"])
def test_layouts_that_spread_a_block_are_refused(layout_name: str) -> None:
    from vllm_pd.errors import ConfigError

    with pytest.raises(ConfigError, match="VLLM_KV_CACHE_LAYOUT"):
        to_regions(views(layout_name, 2), num_heads=2, block_size=32)
