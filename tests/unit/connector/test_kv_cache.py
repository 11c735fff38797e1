"""From tensors to regions, and what identifies a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.unit.protocol.test_messages import HELLO
from vllm_pd.connector.kv_cache import (
    KVCaches,
    memory_order,
    model_digest,
    to_layout,
    to_regions,
)
from vllm_pd.errors import ConfigError, IncompatiblePeerError
from vllm_pd.protocol.handshake import check_compatible
from vllm_pd.protocol.heads import heads_of_rank
from vllm_pd.protocol.messages import Hello
from vllm_pd.transport.base import KVRegion

SHAPE = (6, 2, 16, 8)  # blocks, heads, block_size, 2 * head_size


def regions_of(kv_caches: KVCaches, num_heads: int = 1) -> list[KVRegion]:
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


def test_latent_cache_has_one_head_with_or_without_a_dimension_for_it() -> None:
    """Multi-head latent attention; every rank of either side has all of it."""
    cache = (torch.zeros(6, 16, 1, 512), torch.zeros(6, 16, 64))
    layout = to_layout(regions_of({"layer.0": cache}))
    assert (layout.num_rows, layout.head_lens) == ((16, 1), (512 * 4, 16 * 64 * 4))


def cpu(num_heads: int, block_size: int) -> KVCaches:
    return {"l": torch.zeros(6, num_heads, block_size, 8)}


def npu(num_heads: int, block_size: int) -> KVCaches:
    return {"l": (torch.zeros(6, block_size, num_heads, 4),) * 2}


def tokens_first(num_heads: int, block_size: int) -> KVCaches:
    """What 0.32 makes on CUDA: logically the heads come first, in memory the tokens."""
    return {"l": torch.zeros(6, block_size, num_heads, 8).transpose(1, 2)}


def latent_npu(num_heads: int, block_size: int) -> KVCaches:
    assert num_heads == 1
    return {"l": (torch.zeros(6, block_size, 1, 512), torch.zeros(6, block_size, 1, 64))}


MakeCaches = Callable[[int, int], KVCaches]


def hello(make: MakeCaches, *, tp_size: int, num_kv_heads: int, block_size: int) -> Hello:
    """What the first worker of an engine announces."""
    num_heads = len(heads_of_rank(0, tp_size, num_kv_heads))
    caches = make(num_heads, block_size)
    order = memory_order(caches, num_heads=num_heads, block_size=block_size)
    fingerprint = msgspec.structs.replace(
        HELLO.fingerprint,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        kv_layout=f"device:{order}",
    )
    layout = to_layout(to_regions(caches, num_heads=num_heads, block_size=block_size))
    return msgspec.structs.replace(HELLO, tp_size=tp_size, fingerprint=fingerprint, layout=layout)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("remote_tp_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("make", "num_kv_heads", "num_rows"),
    [
        (cpu, 4, 1),
        (npu, 4, 16),
        (tokens_first, 4, 16),
        (cpu, 16, 1),  # as many heads as tokens
        (npu, 16, 16),
        (cpu, 1, 1),
        (npu, 1, 16),
        (latent_npu, 1, 16),
    ],
)
def test_ranks_of_unequal_engines_agree_on_rows(
    make: MakeCaches, num_kv_heads: int, num_rows: int, tp_size: int, remote_tp_size: int
) -> None:
    """One head per rank on one side only used to look like another layout."""
    ours = hello(make, tp_size=tp_size, num_kv_heads=num_kv_heads, block_size=16)
    theirs = hello(make, tp_size=remote_tp_size, num_kv_heads=num_kv_heads, block_size=16)
    assert set(ours.layout.num_rows) == {num_rows}
    check_compatible(ours, theirs)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("remote_tp_size", [1, 2, 4])
def test_two_orders_in_memory_never_pair(tp_size: int, remote_tp_size: int) -> None:
    ours = hello(cpu, tp_size=tp_size, num_kv_heads=4, block_size=16)
    theirs = hello(tokens_first, tp_size=remote_tp_size, num_kv_heads=4, block_size=16)
    with pytest.raises(IncompatiblePeerError, match="kv_layout: 'device:BHNC' != 'device:BNHC'"):
        check_compatible(ours, theirs)


def test_tokens_before_heads_in_memory_are_rows_of_tokens() -> None:
    """The default of 0.32 on CUDA used to be refused as a hybrid KV cache."""
    caches = tokens_first(2, 16)
    layout = to_layout(regions_of(caches, num_heads=2))
    assert (layout.num_rows, layout.head_lens, layout.block_len) == (
        (16,),
        (8 * 4,),
        2 * 16 * 8 * 4,
    )


def test_pair_of_one_head_is_rows_of_tokens_whatever_the_stride_of_that_head() -> None:
    """torch calls a tensor contiguous without looking at that stride."""
    odd = torch.zeros(6, 1, 16, 8).transpose(1, 2).contiguous()
    assert odd.stride(2) == 16 * 8
    assert to_layout(regions_of({"layer.0": (odd, odd)})).num_rows == (16, 16)


def test_tensor_for_a_device_lies_as_its_memory_does() -> None:
    logical = torch.zeros(6, 16, 2, 8, device="meta").transpose(1, 2)
    (region,) = regions_of({"layer.0": logical}, num_heads=2)
    assert region.tensor.is_contiguous()
    assert region.tensor.shape == (6, 16, 2, 8)


def test_orders_of_unlike_tensors_are_all_named() -> None:
    caches: KVCaches = {
        "a": (torch.zeros(6, 16, 1, 8), torch.zeros(6, 16, 4)),
        "b": torch.zeros(6, 16, 4),
    }
    assert memory_order(caches, num_heads=1, block_size=16) == "BNHC+BNC"


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("shape", [(2, 6, 16, 0, 8), (6, 2, 16, 0, 8)])
def test_keys_and_values_in_one_tensor_are_refused(shape: tuple[int, ...], num_heads: int) -> None:
    """Its first dimension may be that pair: a block is not where it seems."""
    cache = torch.zeros([size or num_heads for size in shape])
    with pytest.raises(ConfigError, match=r"layer\.0: .* one tensor of five dimensions"):
        regions_of({"layer.0": cache}, num_heads=num_heads)


@pytest.mark.parametrize("shape", [(12, 1, 8, 8), (12, 8, 1, 8), (12, 8, 64), (6, 128)])
def test_blocks_of_another_size_than_the_models_are_refused(shape: tuple[int, ...]) -> None:
    """Kernels may cut a block in two: its number would be that of another one."""
    with pytest.raises(ConfigError, match=r"layer\.0: cannot tell 1 heads and 16 tokens"):
        regions_of({"layer.0": torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(6, 3, 16, 8), (6, 16, 3, 8), (6, 2, 8, 8), (6, 16, 8), (6, 32)])
def test_cache_whose_heads_cannot_be_told_apart_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"layer\.0: cannot tell 2 heads and 16 tokens"):
        regions_of({"layer.0": torch.zeros(shape)}, num_heads=2)


def test_as_many_heads_as_tokens_are_told_apart_by_the_number_of_tensors() -> None:
    cache = torch.zeros(6, 16, 16, 8)
    assert to_layout(regions_of({"cpu": cache}, num_heads=16)).num_rows == (1,)
    assert to_layout(regions_of({"npu": (cache, cache)}, num_heads=16)).num_rows == (16, 16)


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(12, 2, 16, 8)[::2],  # gaps, or other layers, between the blocks
        torch.zeros(6, 2, 16, 9)[..., :8],  # padding inside
        torch.zeros(2, 6, 16, 8).transpose(0, 1),  # a block's heads far apart
    ],
)
def test_blocks_in_pieces_are_refused(cache: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"layer\.0.*not contiguous.*VLLM_KV_CACHE_LAYOUT"):
        regions_of({"layer.0": cache}, num_heads=2)


def test_no_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="no KV cache"):
        regions_of({})


def test_unequal_numbers_of_blocks_are_refused() -> None:
    regions = regions_of({"a": torch.zeros(4, 16, 8), "b": torch.zeros(5, 16, 8)})
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
