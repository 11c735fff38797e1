"""From tensors to regions, and what identifies a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_pd.connector.kv_cache import model_digest, to_layout, to_regions
from vllm_pd.errors import ConfigError

SHAPE = (6, 2, 16, 8)  # blocks, heads, block_size, 2 * head_size


def test_layers_that_are_views_of_one_allocation() -> None:
    """The layout of vLLM 0.32 on CPU: every layer has its own offset in one storage."""
    layers = torch.zeros(3, *SHAPE, dtype=torch.bfloat16)
    regions = to_regions({f"layer.{i}": layers[i] for i in range(3)})
    block_len = 2 * 16 * 8 * 2
    assert [region.block_len for region in regions] == [block_len] * 3
    assert [region.addr - layers.data_ptr() for region in regions] == [
        0,
        6 * block_len,
        12 * block_len,
    ]
    assert to_layout(regions).num_blocks == 6


def test_keys_and_values_apart_are_two_regions() -> None:
    """The layout of vllm-ascend: a tuple per layer, K and V of possibly unequal size."""
    cache = (torch.zeros(6, 16, 1, 512), torch.zeros(6, 16, 1, 64))
    layout = to_layout(to_regions({"layer.0": cache}))
    assert layout.region_names == ("layer.0.0", "layer.0.1")
    assert layout.block_lens == (16 * 512 * 4, 16 * 64 * 4)


def test_gaps_between_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer\.0"):
        to_regions({"layer.0": torch.zeros(12, 4)[::2]})


def test_no_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="no KV cache"):
        to_regions({})


def test_unequal_numbers_of_blocks_are_refused() -> None:
    regions = to_regions({"a": torch.zeros(4, 8), "b": torch.zeros(5, 8)})
    with pytest.raises(ConfigError, match="different numbers of blocks"):
        to_layout(regions)


def checkpoint(folder: Path, weights: bytes) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def test_checkpoint_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    here = checkpoint(tmp_path / "here", bytes(1000))
    there = checkpoint(tmp_path / "there", bytes(1000))
    assert model_digest(here, None) == model_digest(there, None)


def test_other_weights_are_another_checkpoint(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", bytes(1_000_000))
    tuned = checkpoint(tmp_path / "tuned", bytes(999_000) + b"\x01" * 1000)
    assert model_digest(base, None) != model_digest(tuned, None)


def test_checkpoint_without_weights_is_told_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_digest(str(tmp_path), None) != str(tmp_path)


def test_name_on_a_hub_is_told_by_name_and_revision() -> None:
    assert model_digest("org/model", None) == "org/model@main"
    assert model_digest("org/model", "abc") == "org/model@abc"
