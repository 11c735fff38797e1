"""What the plugin says about what is installed beside it."""

from __future__ import annotations

import pytest
from ascend_vllm_plugin.versions import doubts, problems

IMAGE: dict[str, str | None] = {
    "vllm-pd": "0.1.0",
    "torch": "2.10.0+cpu",
    "torch-npu": "2.10.0.post4",
    "vllm": "0.23.0+empty",
    "vllm-ascend": "0.23.0",
}
"""As in the image quay.io/ascend/vllm-ascend:v0.23.0."""


def test_image_fits() -> None:
    assert problems(IMAGE) == doubts(IMAGE) == []


def test_newer_torch_with_its_torch_npu_fits() -> None:
    installed = {**IMAGE, "torch": "2.13.0+cpu", "torch-npu": "2.13.0"}
    assert problems(installed) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch-npu": None}, "torch-npu is not installed"),
        ({"torch": None}, "torch is not installed"),
        ({"torch": "2.9.0", "torch-npu": "2.9.0"}, "older than 2.10"),
        ({"torch": "2.11.0"}, "do not belong together: install the torch-npu 2.11"),
        ({"vllm-pd": None}, "needs vllm-pd 0.1.0, not installed"),
        ({"vllm-pd": "0.2.0"}, "needs vllm-pd 0.1.0, found 0.2.0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, str | None], words: str) -> None:
    (problem,) = problems({**IMAGE, **change})
    assert words in problem


def test_untested_engines_are_doubted_only() -> None:
    installed = {**IMAGE, "vllm": "0.40.0"}
    assert problems(installed) == []
    assert doubts(installed) == [
        "vLLM 0.40.0 is not among the versions that are tested, 0.23 to 0.32",
        "vllm-ascend 0.23.0 is made for another vLLM than 0.40.0",
    ]


def test_engine_that_is_not_installed_is_no_matter_of_the_plugin() -> None:
    assert doubts({**IMAGE, "vllm": None, "vllm-ascend": None}) == []
