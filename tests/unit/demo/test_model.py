"""The model folders: complete, refused where they must be, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from vllm_pd.demo.checkpoint import DTYPES, VOCAB_SIZE, model_config, tensor_shapes
from vllm_pd.demo.model import MODEL_FILES, Geometry, write_demo_model, write_untrained_model
from vllm_pd.errors import ConfigError

SMALL = Geometry(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_size=32)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "demo"
    write_demo_model(folder)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "untrained"
    write_untrained_model(folder, SMALL)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_demo_model_has_all_files_and_nothing_else(demo: Path) -> None:
    assert sorted(path.name for path in demo.iterdir()) == sorted(MODEL_FILES)


def test_demo_model_is_at_most_8_mb(demo: Path) -> None:
    assert sum(path.stat().st_size for path in demo.iterdir()) <= 8_000_000


def test_demo_weights_match_the_config(demo: Path) -> None:
    config = read_json(demo / "config.json")
    assert tensors_of(demo) == {
        name: ("BF16", shape) for name, shape in tensor_shapes(config).items()
    }


def test_demo_config_is_what_the_code_makes(demo: Path) -> None:
    config = read_json(demo / "config.json")
    geometry = Geometry(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        intermediate_size=config["intermediate_size"],
        init_range=config["initializer_range"],
    )
    expected = json.loads(json.dumps(model_config(geometry, tied=True)))
    assert expected.items() <= config.items()


def test_nothing_but_the_model_is_left_beside_it(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "new" / "demo")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    write_demo_model(tmp_path / "demo")
    assert (tmp_path / "demo" / "model.safetensors").is_file()


def test_writing_the_demo_model_again_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    write_demo_model(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_demo_model(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_demo_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_incomplete_demo_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    write_demo_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no complete demo model"):
        write_demo_model(folder)


def test_a_truncated_demo_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    write_demo_model(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match="no complete demo model"):
        write_demo_model(folder)


@pytest.mark.parametrize("config", ["{", "[]", "{}"], ids=["broken", "list", "foreign"])
def test_another_model_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="not empty"):
        write_demo_model(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write_demo_model(tmp_path / "demo")


def test_a_file_in_place_of_the_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parent").write_text("")
    with pytest.raises(ConfigError, match=r"cannot (read|write) model folder"):
        write_demo_model(tmp_path / "parent" / "demo")


def test_an_untrained_model_never_replaces_a_demo_model(demo: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        write_untrained_model(demo, SMALL)


def test_untrained_model_has_all_files(untrained: Path) -> None:
    assert sorted(path.name for path in untrained.iterdir()) == sorted(MODEL_FILES)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_untrained_tensors_are_those_of_the_config(tmp_path: Path, dtype: str) -> None:
    geometry = Geometry(
        hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, dtype=dtype
    )
    write_untrained_model(tmp_path / "m", geometry)
    tensors = tensors_of(tmp_path / "m")
    assert {code for code, _ in tensors.values()} == {DTYPES[dtype][0]}
    assert {name: shape for name, (_, shape) in tensors.items()} == tensor_shapes(
        read_json(tmp_path / "m" / "config.json")
    )
    assert tensors["model.layers.2.self_attn.k_proj.weight"][1] == (16, 48)
    assert tensors["lm_head.weight"][1] == (VOCAB_SIZE, 48)


def test_untrained_config_describes_the_geometry(untrained: Path) -> None:
    config = read_json(untrained / "config.json")
    expected = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 192,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    assert expected.items() <= config.items()


def test_the_same_seed_gives_the_same_weights(untrained: Path, tmp_path: Path) -> None:
    write_untrained_model(tmp_path / "again", SMALL, seed=0)
    assert digest(tmp_path / "again") == digest(untrained)


def test_another_seed_gives_other_weights(untrained: Path, tmp_path: Path) -> None:
    write_untrained_model(tmp_path / "other", SMALL, seed=1)
    assert digest(tmp_path / "other") != digest(untrained)
