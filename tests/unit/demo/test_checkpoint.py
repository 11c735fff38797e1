"""Number formats, the weights' scale and the checks of a geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from vllm_pd.demo.checkpoint import (
    Geometry,
    is_complete_safetensors,
    model_config,
    tensor_shapes,
    to_bytes,
    untrained_tensors,
    write_safetensors,
)

GEOMETRY = Geometry(num_layers=1)


def from_bfloat16(data: bytes) -> Any:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (0.0, 0x0000),
        (1.0 + 2**-8, 0x3F80),  # a tie, down to even
        (1.0 + 3 * 2**-8, 0x3F82),  # a tie, up to even
        (1.0 + 2**-8 + 2**-20, 0x3F81),  # above the tie
        (1.9999, 0x4000),  # carries into the exponent
    ],
)
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    data = to_bytes(np.array([value], np.float32), "bfloat16")
    assert int.from_bytes(data, "little") == bits


def test_bfloat16_is_within_half_a_unit() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, np.float32)
    error = np.abs(from_bfloat16(to_bytes(values, "bfloat16")) - values)
    assert np.all(error <= np.abs(values) * 2**-8)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_safetensors_reads_back_what_was_written(tmp_path: Path, dtype: str) -> None:
    values = {"a": np.arange(3, dtype=np.float32), "b.c": np.ones((2, 5), np.float32)}
    shapes = {name: value.shape for name, value in values.items()}
    write_safetensors(tmp_path / "m", shapes, dtype, iter(values.items()))
    read = load_file(tmp_path / "m")
    assert {name: value.dtype.name for name, value in read.items()} == {"a": dtype, "b.c": dtype}
    assert all(np.array_equal(read[name], value) for name, value in values.items())


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    tensors = iter([("a", np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match="expected a"):
        write_safetensors(tmp_path / "m", {"a": (4,)}, "float32", tensors)


def test_a_written_file_is_complete(tmp_path: Path) -> None:
    tensors = iter([("a", np.zeros(3, np.float32))])
    write_safetensors(tmp_path / "m", {"a": (3,)}, "bfloat16", tensors)
    assert is_complete_safetensors(tmp_path / "m")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        (2).to_bytes(8, "little") + b"[]",
        (10).to_bytes(8, "little") + b'{"a": 1}  ',
        (2).to_bytes(8, "little") + b"{}" + b"surplus",
    ],
    ids=["empty", "garbage", "list", "no offsets", "too long"],
)
def test_a_damaged_file_is_not_complete(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    assert not is_complete_safetensors(tmp_path / "m")


def test_untrained_weights_have_the_scale_that_was_asked_for() -> None:
    config = model_config(GEOMETRY, tied=False)
    tensors = dict(untrained_tensors(GEOMETRY, config, seed=3))
    assert np.std(tensors["model.layers.0.mlp.up_proj.weight"]) == pytest.approx(0.1, rel=0.02)
    assert 0 < np.std(tensors["model.layers.0.self_attn.q_proj.bias"]) < 0.02
    assert np.all(tensors["model.norm.weight"] == 1)


def test_untrained_models_prefer_no_special_token() -> None:
    config = model_config(GEOMETRY, tied=False)
    head = dict(untrained_tensors(GEOMETRY, config, seed=3))["lm_head.weight"]
    assert not head[:3].any()
    assert head[3:].any(axis=1).all()


def test_tied_models_have_no_output_layer_of_their_own() -> None:
    assert "lm_head.weight" not in tensor_shapes(model_config(GEOMETRY, tied=True))


def test_the_default_mlp_is_eight_thirds_as_wide_in_multiples_of_64() -> None:
    assert [Geometry(hidden_size=size).mlp_size for size in (64, 256, 512)] == [192, 704, 1408]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_heads": 4, "num_kv_heads": 3}, "not a multiple"),
        ({"head_size": 33}, "head_size must be even"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"init_range": 0.0}, "init_range"),
        ({"dtype": "int8"}, "is not one of bfloat16"),
    ],
)
def test_an_impossible_geometry_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(**options)
