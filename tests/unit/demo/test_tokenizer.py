"""The tokenizer: every text survives it, and transformers reads it as it is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from vllm_pd.demo.checkpoint import EOS_ID, PAD_ID, SPECIAL_TOKENS, VOCAB_SIZE
from vllm_pd.demo.model import write_demo_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "demo"
    write_demo_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@settings(derandomize=True, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_survives_but_for_unicode_normalisation(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    composed = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == composed


def test_accents_are_composed_as_qwen2_does(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == "\u00e9"


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    # UTF-8 never has some bytes (0xC0, 0xFF), but a model may generate their tokens.
    single = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert len(single) == 256


def test_ids_fill_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))


def test_words_of_the_documentation_are_short(tokenizer: Tokenizer) -> None:
    text = "Disaggregated prefill-decode serving for unmodified vLLM"
    assert len(tokenizer.encode(text).ids) < len(text) / 2


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


def test_end_and_padding_agree_in_all_files(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == SPECIAL_TOKENS[config["eos_token_id"]]
    assert tokenizer_config["pad_token"] == SPECIAL_TOKENS[config["pad_token_id"]]
    assert generation["eos_token_id"] == [EOS_ID, PAD_ID]


def render(folder: Path, messages: list[dict[str, str]], *, prompt: bool) -> str:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        config["chat_template"]
    )
    return template.render(messages=messages, add_generation_prompt=prompt)


def test_a_chat_renders_as_chatml(folder: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is vllm-pd?"},
        {"role": "assistant", "content": "A server."},
    ]
    assert render(folder, messages, prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is vllm-pd?<|im_end|>\n"
        "<|im_start|>assistant\nA server.<|im_end|>\n"
    )


def test_a_generation_prompt_opens_the_answer(folder: Path) -> None:
    rendered = render(folder, [{"role": "user", "content": "hi"}], prompt=True)
    assert rendered.endswith("hi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_transformers_loads_the_folder_without_network(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers: Any = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    text = "Wörter, 词 and 🙂:\n\n    code(1234)  don't <|im_start|>x"
    assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (config.eos_token_id, config.pad_token_id)
    assert len(loaded) == config.vocab_size
    assert config.architectures == ["Qwen2ForCausalLM"]
