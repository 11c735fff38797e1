"""Requests with clocks: one at a time, as token ids, on a connection that is open already."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.service.servers import MODEL_NAME
from benchmarks.transfer.pair import BenchError
from vllm_pd.router import body as bodies
from vllm_pd.router.headers import PATH_DISAGGREGATED, PD_PATH

PATH = "/v1/completions"
_TIMEOUT_S = 300.0
_DATA = b"data: "
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Streamed:
    """A streamed answer.

    Attributes:
        first_s: seconds until the first token was here.
        last_s: seconds until the last one was.
        num_tokens: generated tokens.
    """

    first_s: float
    last_s: float
    num_tokens: int

    @property
    def step_s(self) -> float:
        """Seconds per token after the first."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Legs:
    """One request through both legs by hand.

    Attributes:
        prefill_s: seconds of the prefill leg.
        decode_s: seconds of the decode leg, which generates one token.
        timeline: what the decode instance tells of the fetch.
    """

    prefill_s: float
    decode_s: float
    timeline: Mapping[str, Any]


def stream(
    url: str, prompt: Sequence[int], num_tokens: int, *, path: str | None = None
) -> Streamed:
    """Generate exactly ``num_tokens`` and note when they come.

    Args:
        url: of the router or of an instance.
        prompt: token ids.
        num_tokens: to generate.
        path: what the router must say of the way it served the request; None: anything.

    Raises:
        BenchError: it was refused, failed, or went another way.
    """
    body = _body(prompt, num_tokens)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    lines = []
    with _post(url, body) as (response, started):
        if path is not None and response.headers[PD_PATH] != path:
            raise BenchError(f"{url} served a request {response.headers[PD_PATH]}, not {path}")
        while line := response.readline():
            lines.append((time.perf_counter() - started, line))
    return parse_stream(lines)


def parse_stream(lines: Sequence[tuple[float, bytes]]) -> Streamed:
    """Read the events of a streamed completion.

    The first event is the first token: a completion is streamed one event per step,
    also where the token is a part of a character and has no text yet.

    Args:
        lines: seconds since the start, and the line that was complete then.

    Raises:
        BenchError: an error event, or something is missing.
    """
    times: list[float] = []
    usage: Mapping[str, Any] | None = None
    for seconds, line in lines:
        if not line.startswith(_DATA) or line.startswith(_DATA + _DONE):
            continue
        event = json.loads(line.removeprefix(_DATA))
        if "error" in event:
            raise BenchError(f"a stream failed: {event['error'].get('message')}")
        if event["choices"]:
            times.append(seconds)
        usage = event.get("usage") or usage
    if not times or usage is None:
        raise BenchError("a stream ended without tokens or usage")
    return Streamed(times[0], times[-1], usage["completion_tokens"])


def two_legs(prefill_url: str, decode_url: str, prompt: Sequence[int]) -> Legs:
    """Send both legs of a request as a router does, and ask for the timeline.

    Raises:
        BenchError: a leg failed, or nothing was fetched.
    """
    body = _body(prompt, 1)
    started = time.perf_counter()
    answer = _complete(prefill_url, bodies.prefill_body(body, uuid.uuid4().hex, path=PATH))
    handed_over = time.perf_counter()
    params = answer.get(bodies.KV_PARAMS)
    if not params:
        raise BenchError(f"{prefill_url} answered without kv_transfer_params")
    leg = bodies.decode_body(body, {**params, "timeline": True})
    answer = _complete(decode_url, leg)
    ended = time.perf_counter()
    timeline = (answer.get(bodies.KV_PARAMS) or {}).get("timeline")
    if timeline is None or timeline["outcome"] != "ok":
        raise BenchError(f"{decode_url} fetched nothing: {timeline}")
    return Legs(handed_over - started, ended - handed_over, timeline)


def fetched_tokens(url: str) -> int:
    """Return how many prompt tokens of an instance came from another one so far."""
    name = "vllm:prompt_tokens_by_source"
    return int(_sum_metric(_metrics(url), name, source="external_kv_transfer"))


def num_blocks(url: str) -> int:
    """Return how many blocks the KV cache of an instance has."""
    for family in text_string_to_metric_families(_metrics(url)):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                return int(sample.labels["num_gpu_blocks"])
    raise BenchError(f"{url} does not tell the size of its KV cache")


def _sum_metric(text: str, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        if family.name == name
        for sample in family.samples
        if sample.name == f"{name}_total" and labels.items() <= sample.labels.items()
    )


def _metrics(url: str) -> str:
    with _opened(url) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def _body(prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def _complete(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    with _post(url, body) as (response, _):
        answer: dict[str, Any] = json.loads(response.read())
        return answer


@contextlib.contextmanager
def _post(url: str, body: Mapping[str, Any]) -> Iterator[tuple[http.client.HTTPResponse, float]]:
    """Send a request; yield its answer and when it was sent."""
    data = json.dumps(body).encode()
    with _opened(url) as connection:
        started = time.perf_counter()
        connection.request("POST", PATH, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode(errors="replace")
            raise BenchError(f"{url} answered {response.status}: {' '.join(text.split())[:300]}")
        yield response, started


@contextlib.contextmanager
def _opened(url: str) -> Iterator[http.client.HTTPConnection]:
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    try:
        connection.connect()
        yield connection
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise BenchError(f"{url}: {type(exc).__name__}: {exc}") from exc
    finally:
        connection.close()


__all__ = [
    "PATH_DISAGGREGATED",
    "Legs",
    "Streamed",
    "fetched_tokens",
    "num_blocks",
    "parse_stream",
    "stream",
    "two_legs",
]
