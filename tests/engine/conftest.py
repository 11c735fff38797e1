"""What the engine tests share: an untrained model and a colocated instance's answers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.engine.deployment import served
from tests.engine.workload import Answer, Case, ask_all, equality_cases, load_cases
from vllm_pd.demo.model import Geometry, write_untrained_model

BAD_REQUESTS: dict[str, tuple[str, str]] = {
    "invalid JSON": ("/v1/completions", '{"model": "m", "prompt": '),
    "not an object": ("/v1/chat/completions", "[1, 2]"),
    "unknown model": ("/v1/completions", '{"model": "nope", "prompt": "hi", "max_tokens": 4}'),
    "negative max_tokens": ("/v1/completions", '{"model": "m", "prompt": "a", "max_tokens": -4}'),
    "prompt too long": (
        "/v1/completions",
        json.dumps({"model": "m", "prompt": [11] * 5000, "max_tokens": 4}),
    ),
    "wrong type": ("/v1/completions", '{"model": "m", "prompt": "hi", "temperature": "hot"}'),
    "no messages": ("/v1/chat/completions", '{"model": "m"}'),
    "unknown endpoint": ("/v1/nope", "{}"),
}


@dataclass(frozen=True)
class Reference:
    """How one colocated vLLM answers."""

    equality: list[tuple[Case, Answer]]
    load: list[tuple[Case, Answer]]
    errors: dict[str, tuple[int, Any]]  # name -> status and body


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint whose greedy answer depends strongly on the whole prompt."""
    folder = tmp_path_factory.mktemp("model") / "untrained"
    write_untrained_model(folder, Geometry(), seed=0)
    return folder


@pytest.fixture(scope="session")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Ask a plain vLLM everything once; no test may change what it answered."""
    equality, load = equality_cases(), load_cases(200)
    with served(tmp_path_factory.mktemp("colocated"), model) as url:
        answers = asyncio.run(ask_all(url, [*equality, *load], concurrency=8))
        errors = asyncio.run(post_bad_requests(url))
    return Reference(
        list(zip(equality, answers[: len(equality)], strict=True)),
        list(zip(load, answers[len(equality) :], strict=True)),
        errors,
    )


async def post_bad_requests(url: str) -> dict[str, tuple[int, Any]]:
    """Send every bad request; return status and body."""
    found = {}
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session:
        for name, (path, data) in BAD_REQUESTS.items():
            async with session.post(url + path, data=data, headers=headers) as response:
                found[name] = response.status, json.loads(await response.text())
    return found
