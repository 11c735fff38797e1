"""From tensors to regions, and what identifies a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_pd.connector.kv_cache import model_digest, to_layout, to_regions
from vllm_pd.errors import ConfigError
from vllm_pd.transport.base import KVRegion

SHAPE = (6, 2, 16, 8)  # blocks, heads, block_size, 2 * head_size


def regions_of(
    kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], num_heads: int = 1
) -> list[KVRegion]:
    return to_regions(kv_caches, num_heads=num_heads, block_size=16)


def test_layers_that_are_views_of_one_allocation() -> None:
    """The layout of vLLM 0.32 on CPU: every layer has its own offset in one storage."""
    layers = torch.zeros(3, *SHAPE, dtype=torch.bfloat16)
    regions = regions_of({f"layer.{i}": layers[i] for i in range(3)}, num_heads=2)
    block_len = 2 * 16 * 8 * 2
    assert [region.block_len for region in regions] == [block_len] * 3
    assert [region.addr - layers.data_ptr() for region in regions] == [
        0,
        6 * block_len,
        12 * block_len,
    ]
    layout = to_layout(regions)
    assert (layout.num_blocks, layout.num_heads) == (6, 2)
    assert (layout.num_rows, layout.head_lens) == ((1, 1, 1), (16 * 8 * 2,) * 3)


def test_keys_and_values_apart_are_two_regions() -> None:
    """The layout of vllm-ascend: a tuple per layer, K and V of possibly unequal size."""
    cache = (torch.zeros(6, 16, 4, 8), torch.zeros(6, 16, 4, 2))
    layout = to_layout(regions_of({"layer.0": cache}, num_heads=4))
    assert layout.region_names == ("layer.0.0", "layer.0.1")
    assert (layout.num_rows, layout.head_lens) == ((16, 16), (8 * 4, 2 * 4))
    assert layout.block_len == 16 * 4 * (8 + 2) * 4


def test_cache_of_one_head_is_one_row_whatever_its_shape() -> None:
    """Multi-head latent attention: no dimension of heads, or one of size 1."""
    cache = (torch.zeros(6, 16, 1, 512), torch.zeros(6, 16, 64))
    layout = to_layout(regions_of({"layer.0": cache}))
    assert (layout.num_rows, layout.head_lens) == ((1, 1), (16 * 512 * 4, 16 * 64 * 4))


@pytest.mark.parametrize(
    "shape", [(6, 3, 16, 8), (6, 16, 3, 8), (6, 2, 8, 8), (2, 6, 16, 2, 8), (6, 32)]
)
def test_cache_whose_heads_cannot_be_told_apart_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"layer\.0: cannot tell 2 heads and 16 tokens"):
        regions_of({"layer.0": torch.zeros(shape)}, num_heads=2)


def test_as_many_heads_as_tokens_are_told_apart_by_the_number_of_tensors() -> None:
    cache = torch.zeros(6, 16, 16, 8)
    assert to_layout(regions_of({"cpu": cache}, num_heads=16)).num_rows == (1,)
    assert to_layout(regions_of({"npu": (cache, cache)}, num_heads=16)).num_rows == (16, 16)


def test_gaps_between_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer\.0"):
        regions_of({"layer.0": torch.zeros(12, 4)[::2]})


def test_no_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="no KV cache"):
        regions_of({})


def test_unequal_numbers_of_blocks_are_refused() -> None:
    regions = regions_of({"a": torch.zeros(4, 8), "b": torch.zeros(5, 8)})
    with pytest.raises(ConfigError, match="different numbers of blocks"):
        to_layout(regions)


CONFIG: dict[str, Any] = {"hidden_size": 64, "rope_theta": 10000.0, "_name_or_path": "here"}


def checkpoint(folder: Path, tensors: list[bytes]) -> str:
    """Write a safetensors file of byte tensors."""
    folder.mkdir()
    header, offset = {}, 0
    for index, data in enumerate(tensors):
        span = [offset, offset + len(data)]
        header[f"t{index}"] = {"dtype": "U8", "shape": [len(data)], "data_offsets": span}
        offset += len(data)
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        len(encoded).to_bytes(8, "little") + encoded + b"".join(tensors)
    )
    return str(folder)


def test_checkpoint_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    here = checkpoint(tmp_path / "here", [bytes(1000)])
    there = checkpoint(tmp_path / "there", [bytes(1000)])
    moved = {**CONFIG, "_name_or_path": "there"}
    assert model_digest(here, None, CONFIG) == model_digest(there, None, moved)


def test_one_other_tensor_among_many_is_another_checkpoint(tmp_path: Path) -> None:
    tensors = [bytes(50_000) for _ in range(40)]
    base = checkpoint(tmp_path / "base", tensors)
    tuned = checkpoint(tmp_path / "tuned", [*tensors[:17], b"\x01" * 50_000, *tensors[18:]])
    assert model_digest(base, None, CONFIG) != model_digest(tuned, None, CONFIG)


def test_other_configuration_is_another_model(tmp_path: Path) -> None:
    """Overrides change what is computed, though the weights are the same."""
    folder = checkpoint(tmp_path / "base", [bytes(1000)])
    other = {**CONFIG, "rope_theta": 1000000.0}
    assert model_digest(folder, None, CONFIG) != model_digest(folder, None, other)


@pytest.mark.parametrize("data", [b"", b"short", bytes(8) + b"x" * 5000, b"\xff" * 5000])
def test_weights_of_unknown_format_are_sampled_evenly(tmp_path: Path, data: bytes) -> None:
    digests = set()
    for name, content in (("a", data), ("b", data), ("c", data + b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        digests.add(model_digest(str(tmp_path / name), None, CONFIG))
    assert len(digests) == 2


def test_name_on_a_hub_is_told_by_name_and_revision() -> None:
    digests = {
        model_digest("org/model", None, CONFIG),
        model_digest("org/model", "abc", CONFIG),
        model_digest("org/other", None, CONFIG),
    }
    assert len(digests) == 3
