"""Which model to serve, checked before anything is started."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vllm_pd.errors import ConfigError

DEMO_MODEL_NAME = "demo-model"

_HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


def is_folder_name(model: str) -> bool:
    """Whether ``model`` means a folder and not a Hugging Face name.

    ``org/name`` is a Hugging Face name unless there is such a folder.
    """
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith("/"):
        return True
    try:
        return Path(model).exists()
    except OSError:  # too long for a file name
        return False


def check_model(model: str) -> str:
    """Check the model as far as that is possible without loading it.

    Returns:
        What vLLM is told: an absolute folder or the Hugging Face name.

    Raises:
        ConfigError: a folder that is missing or holds no checkpoint, or no name at all.
    """
    if not model.strip() or not is_folder_name(model):
        if not _HUB_NAME.fullmatch(model):
            raise ConfigError(f"model {model!r} is neither a folder nor a Hugging Face name")
        return model
    try:
        folder = Path(model).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError) as exc:  # too long, or no such user's home
        raise ConfigError(f"model folder {model}: {exc}") from exc
    if not exists:
        raise ConfigError(f"model folder {folder} does not exist")
    if not folder.is_dir():
        raise ConfigError(f"model {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model folder {folder} has no config.json")
    return str(folder.absolute())


def is_quantized(model: str) -> bool | None:
    """Tell whether the weights are quantised, by ``config.json``; None: that is not at hand.

    Args:
        model: as ``check_model`` returns it; a Hugging Face name has no folder.
    """
    try:
        config = json.loads((Path(model) / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    parts = [config, config.get("text_config")]  # of a model with several, this one generates
    keys = ("quantization_config", "compression_config")
    return any(isinstance(part, dict) and part.get(key) for part in parts for key in keys)
