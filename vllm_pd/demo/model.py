"""Model folders that need no network: the demo model and untrained models.

The demo model is a small Qwen2, trained on this project's documentation by
``tools/train_demo_model.py`` and shipped as package data. Untrained models have
any geometry and speak nonsense, but nonsense that depends on the whole prompt:
what a test of KV transfer needs.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path

from vllm_pd.demo.checkpoint import (
    EOS_ID,
    PAD_ID,
    Geometry,
    is_complete_safetensors,
    model_config,
    tensor_shapes,
    untrained_tensors,
    write_safetensors,
)
from vllm_pd.errors import ConfigError

__all__ = ["MODEL_FILES", "Geometry", "write_demo_model", "write_untrained_model"]

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)
DEMO_MARK = "vllm_pd_demo_model"
"""Key of ``config.json`` by which a demo model folder is known again."""


def write_demo_model(folder: Path) -> None:
    """Make the demo model's checkpoint folder; nothing happens where it already is.

    The folder appears complete or not at all. Missing parents are made.

    Raises:
        ConfigError: the folder holds something else, or cannot be written.
    """
    if _is_complete_demo_model(folder):
        return
    _write_folder(folder, _copy_demo_files)


def write_untrained_model(folder: Path, geometry: Geometry, seed: int = 0) -> None:
    """Make a checkpoint folder of random weights, with the demo model's tokenizer.

    The same geometry and seed give the same bytes.

    Raises:
        ConfigError: the folder is not empty, or cannot be written.
    """

    def fill(target: Path) -> None:
        config = model_config(geometry, tied=False)
        _write_json(target / "config.json", config)
        # No sampling defaults: tests and benchmarks choose their own.
        generation = {"eos_token_id": [EOS_ID, PAD_ID], "pad_token_id": PAD_ID}
        _write_json(target / "generation_config.json", generation)
        _copy(_data() / "tokenizer.json", target)
        tokenizer_config = json.loads((_data() / "tokenizer_config.json").read_text())
        tokenizer_config["model_max_length"] = geometry.max_len
        _write_json(target / "tokenizer_config.json", tokenizer_config)
        write_safetensors(
            target / "model.safetensors",
            tensor_shapes(config),
            geometry.dtype,
            untrained_tensors(geometry, config, seed),
        )

    _write_folder(folder, fill)


def _data() -> Traversable:
    return files("vllm_pd.demo") / "data"


def _copy(source: Traversable, folder: Path) -> None:
    with as_file(source) as path:
        shutil.copyfile(path, folder / source.name)


def _copy_demo_files(folder: Path) -> None:
    for name in MODEL_FILES:
        _copy(_data() / name, folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _is_complete_demo_model(folder: Path) -> bool:
    """Whether the folder holds a demo model, of this version or another."""
    try:
        config = json.loads((folder / "config.json").read_text())
        marked = isinstance(config, dict) and DEMO_MARK in config
        complete = all((folder / name).is_file() for name in MODEL_FILES)
        return marked and complete and is_complete_safetensors(folder / "model.safetensors")
    except (OSError, ValueError):
        return False


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a hidden folder beside ``folder``, then give it its name."""
    folder = folder.absolute()
    _check_free(folder)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        staging.mkdir(parents=True)
        fill(staging)
        staging.rename(folder)  # replaces an empty folder, never a filled one
    except OSError as exc:
        # Two starts at the same time: the other one was first, with the same files.
        if fill is _copy_demo_files and _is_complete_demo_model(folder):
            return
        raise ConfigError(f"cannot write model folder {folder}: {exc}") from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_free(folder: Path) -> None:
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ConfigError(f"{folder} is a file, not a model folder")
        occupied = any(folder.iterdir())
    except OSError as exc:
        raise ConfigError(f"cannot read model folder {folder}: {exc}") from exc
    if occupied:
        raise ConfigError(
            f"{folder} is not empty and holds no complete demo model",
            hint="name a new folder, or remove this one",
        )
