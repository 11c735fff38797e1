from __future__ import annotations

from pathlib import Path

import pytest

from vllm_pd.errors import ConfigError
from vllm_pd.launcher.model import check_model, is_quantized


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_checkpoint_folder_is_made_absolute(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert check_model("./checkpoint") == str(checkpoint)
    assert check_model("checkpoint") == str(checkpoint)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-7B-Instruct"])
def test_anything_else_is_a_hugging_face_name(name: str) -> None:
    assert check_model(name) == name


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none/x", "a/b/c", "none/"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model folder .* does not exist"):
        check_model(name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model folder {tmp_path} has no config.json"):
        check_model(str(tmp_path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        check_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["", "two words", "a b/c"])
def test_a_text_that_is_neither_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a Hugging Face name"):
        check_model(name)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"dtype": "bfloat16"}', False),
        ('{"quantization_config": {"quant_method": "awq"}}', True),
        ('{"text_config": {"quantization_config": {"quant_method": "fp8"}}}', True),
        ('{"quantization_config": null, "text_config": {"vocab_size": 8}}', False),
        ("[]", None),
        ("{", None),
    ],
)
def test_a_checkpoint_says_whether_it_is_quantised(
    checkpoint: Path, config: str, expected: bool | None
) -> None:
    (checkpoint / "config.json").write_text(config)
    assert is_quantized(str(checkpoint)) is expected


def test_whether_a_hugging_face_name_is_quantised_is_not_known() -> None:
    assert is_quantized("Qwen/Qwen2.5-7B-Instruct") is None
