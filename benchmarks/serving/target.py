"""The service that is measured: what it serves, and what its metrics say."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.transfer.pair import BenchError
from vllm_pd.bench import stages
from vllm_pd.bench.stages import Reading, Stage

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """A service that answers.

    Attributes:
        base_url: without ``/v1``.
        model: its name at the API.
        root: where its tokenizer is: a folder or a Hugging Face name.
        max_len: most tokens of prompt and output; None: it does not tell.
    """

    base_url: str
    model: str
    root: str
    max_len: int | None


def find_target(base_url: str, model: str | None) -> Target:
    """Ask a service what it serves.

    Args:
        base_url: of any server with the OpenAI API.
        model: what it must serve; None: its first model.

    Raises:
        BenchError: it cannot be reached, or serves something else.
    """
    base_url = base_url.rstrip("/").removesuffix("/v1")
    if urllib.parse.urlsplit(base_url).scheme not in {"http", "https"}:
        raise BenchError(f"{base_url} is not an address that begins with http:// or https://")
    try:
        entries = {
            entry["id"]: entry for entry in json.loads(_get(f"{base_url}/v1/models"))["data"]
        }
    except (ValueError, KeyError, TypeError) as exc:
        raise BenchError(f"{base_url} does not speak the OpenAI API: {exc}") from exc
    if not entries:
        raise BenchError(f"{base_url} serves no model")
    name = model or next(iter(entries))
    if name not in entries:
        raise BenchError(f"{base_url} does not serve {name!r}; it serves {', '.join(entries)}")
    entry: Mapping[str, Any] = entries[name]
    return Target(base_url, name, entry.get("root") or name, entry.get("max_model_len"))


@dataclass(frozen=True, slots=True)
class Marks:
    """Metrics of a service at one moment.

    Attributes:
        router: those of the address that is asked.
        instances: if that is a router of this project, those of its instances, by role
            and address.
    """

    router: Reading
    instances: Mapping[str, Mapping[str, Reading]]


def read_marks(base_url: str) -> Marks:
    """Read the metrics of a service; what has none is left empty."""
    router = _read(base_url)
    instances = {
        role: {url: _read(url) for url in urls} for role, urls in stages.instances(router).items()
    }
    return Marks(router, instances)


def stages_between(before: Marks, after: Marks) -> list[Stage]:
    """Return where the time of disaggregated requests went; nothing if there were none.

    What could not be read before is left out, as its counters are older than the run; of an
    instance that came meanwhile they are not.
    """
    found = stages.router_stages(before.router, after.router) if before.router else []
    if not found:  # what instances know is no hand-over then
        return []
    for role, readings in after.instances.items():
        earlier = before.instances.get(role, {})
        pairs = [
            (earlier.get(url, {}), reading)
            for url, reading in readings.items()
            if earlier.get(url) != {}
        ]
        found += stages.instance_stages(role, pairs)
    return found


def _read(base_url: str) -> Reading:
    """Return the metrics of a server; nothing if it has none."""
    try:
        return stages.parse_metrics(_get(f"{base_url}/metrics"))
    except (BenchError, ValueError):
        return {}


def _get(url: str) -> str:
    headers = {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as exc:
        raise BenchError(f"{url} answered {exc.code} {exc.reason}") from exc
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "reason", exc)
        raise BenchError(f"{url} cannot be reached: {reason}") from exc
