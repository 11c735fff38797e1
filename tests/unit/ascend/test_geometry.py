"""KV caches as vllm-ascend 0.23.0 makes them (worker/model_runner_v1.py, by line below)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ascend_vllm_plugin.geometry import check_kv_caches

from vllm_pd.connector.kv_cache import to_layout, to_regions
from vllm_pd.errors import ConfigError

ND, NZ = 2, 29
NUM_BLOCKS = 3


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def gqa(heads: int = 2, head_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer (:4597-4602, :4680)."""
    shape = (NUM_BLOCKS, 128, heads, head_size)
    return tensor(*shape), tensor(*shape)


def mla() -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and positional part of a layer (:4603-4627)."""
    return tensor(NUM_BLOCKS, 128, 1, 512), tensor(NUM_BLOCKS, 128, 1, 64)


def check(cache: Any, *, block_size: int = 128, **additional: object) -> None:
    check_kv_caches(
        {"model.layers.0.attn": cache},
        block_size=block_size,
        additional_config=additional,
        format_of=lambda _: ND,
    )


@pytest.mark.parametrize("cache", [gqa(), mla()])
def test_caches_of_full_attention_are_accepted(cache: tuple[torch.Tensor, torch.Tensor]) -> None:
    check(cache)


def test_latent_cache_gives_two_regions_with_blocks_of_different_length() -> None:
    regions = to_regions({"model.layers.0.attn": mla()}, num_heads=1, block_size=128)
    assert [region.name for region in regions] == ["model.layers.0.attn.0", "model.layers.0.attn.1"]
    assert [region.block_len for region in regions] == [128 * 1024, 16 * 1024]
    assert to_layout(regions).block_len == 144 * 1024


def test_heads_of_grouped_query_attention_are_strided_by_token() -> None:
    (key, value) = to_regions({"a": gqa(heads=2)}, num_heads=2, block_size=128)
    assert (key.num_rows, key.num_heads, key.head_len) == (128, 2, 32)
    assert value.addr != key.addr


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (tensor(NUM_BLOCKS, 128, 2, 16), "one tensor instead of K and V"),  # :4503-4540
        ([tensor(6, 128, 1, 16)[::2], tensor(3, 128, 1, 16)], "compressed"),  # :4318-4348
        ([tensor(3, 16), tensor(3, 8, 8)], "hybrid model"),  # :4681-4714
        ((*mla(), tensor(NUM_BLOCKS, 128, 1, 128)), "sparse-attention"),  # :4644-4680
        ((tensor(NUM_BLOCKS, 128, 1, 512),), "sparse-attention"),
        ((tensor(6, 64, 2, 16), tensor(6, 64, 2, 16)), "hybrid cache"),  # :4559-4568
        ((gqa(2)[0], gqa(4)[1]), "K is"),
        (tuple(t.to(torch.int8) for t in gqa()), "C8"),  # attention_v1.py:1645-1648
    ],
)
def test_other_caches_are_refused_by_name(cache: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(cache)


def test_nz_is_refused_where_it_is_configured() -> None:
    with pytest.raises(ConfigError, match="enable_kv_nz"):
        check(gqa(), enable_kv_nz=True)


def test_nz_is_refused_where_a_tensor_has_it() -> None:
    with pytest.raises(ConfigError, match="NZ format"):
        check_kv_caches({"a": gqa()}, block_size=128, additional_config={}, format_of=lambda _: NZ)


def test_other_block_sizes_are_refused_with_the_option_that_helps() -> None:
    with pytest.raises(ConfigError, match="--block-size 128"):
        check(gqa(), block_size=64)
