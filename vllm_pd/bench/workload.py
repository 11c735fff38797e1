"""What is asked, and when: the same for the same seed, on every machine, without network.

A prompt is named by the ids of its chunks: equal ids stand for equal tokens, so that
what requests have in common is part of the workload. That is the format of the Mooncake
traces, which ``vllm bench serve --dataset-name timed_trace`` makes token ids from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_pd.bench import lengths
from vllm_pd.bench.arrivals import gamma_arrivals
from vllm_pd.bench.lengths import Fixed, LengthLaw
from vllm_pd.errors import ConfigError

CHUNK_LEN = 128
"""Tokens of a chunk in the workloads made here; vLLM's block size on the CPU."""

_IDS_PER_SEED = 1 << 40
_FIRST_OWN_ID = 1 << 30
"""Ids of chunks that only one request has; below are those of shared prefixes."""
_IDS_PER_PREFIX = 1 << 14
_OTHER_IDS = 1 << 60
_IDS_PER_SALT = 1 << 64
_SALT_LEN = 6
"""Bytes of the digest of a salt."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        arrival_s: when it is to be sent, in seconds since the start.
        prompt_len: tokens of the prompt.
        output_len: tokens to generate.
        chunk_ids: names of the prompt's chunks; the last one may be longer than what
            is left of the prompt.
    """

    arrival_s: float
    prompt_len: int
    output_len: int
    chunk_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival.

    Attributes:
        name: for reports.
        requests: at least one.
        chunk_len: tokens of a chunk.
    """

    name: str
    requests: tuple[Request, ...]
    chunk_len: int = CHUNK_LEN

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s


@dataclass(frozen=True, slots=True)
class Shape:
    """What the requests of a workload are like.

    Attributes:
        prompts: lengths of prompts.
        outputs: lengths of outputs, independent of the prompts' (Spearman's correlation
            is 0.07 and -0.02 in the Azure traces).
        cv: of the gaps between arrivals; see ``gamma_arrivals``.
        shared: part of each prompt that is the beginning of one of ``num_prefixes`` texts.
        num_prefixes: how many such texts there are.
    """

    prompts: LengthLaw
    outputs: LengthLaw
    cv: float = 1.0
    shared: float = 0.0
    num_prefixes: int = 16


SHAPES: Mapping[str, Shape] = {
    "sharegpt": Shape(lengths.SHAREGPT_IN, lengths.SHAREGPT_OUT),
    "azure-conversation": Shape(lengths.AZURE_CONV_IN, lengths.AZURE_CONV_OUT),
    "azure-code": Shape(lengths.AZURE_CODE_IN, lengths.AZURE_CODE_OUT),
    # Gaps in the trace have a CV of 13, which needs days to average out.
    "azure-code-bursts": Shape(lengths.AZURE_CODE_IN, lengths.AZURE_CODE_OUT, cv=4.0),
    "mooncake-conversation": Shape(
        lengths.MOONCAKE_CONV_IN, lengths.MOONCAKE_CONV_OUT, shared=0.37
    ),
    "mooncake-toolagent": Shape(lengths.MOONCAKE_AGENT_IN, lengths.MOONCAKE_AGENT_OUT, shared=0.65),
    "prefix-reuse": Shape(Fixed(1024), Fixed(64), shared=0.75, num_prefixes=8),
    "prefill-heavy": Shape(Fixed(2000), Fixed(64)),
    "balanced": Shape(Fixed(512), Fixed(64)),
    "decode-heavy": Shape(Fixed(128), Fixed(256)),
}
"""Workloads by name."""


def shape_of(name: str) -> Shape:
    """Return a workload's shape.

    Raises:
        ConfigError: there is none of that name.
    """
    if (shape := SHAPES.get(name)) is None:
        raise ConfigError(f"unknown workload {name!r}", hint=f"use one of {', '.join(SHAPES)}")
    return shape


def make_workload(
    name: str, shape: Shape, *, count: int, rate: float, seed: int, salt: str = ""
) -> Workload:
    """Draw a workload.

    Args:
        name: for reports.
        shape: what its requests are like.
        count: how many requests.
        rate: per second; ``inf``: all at once.
        seed: the same seed gives the same requests; arrival pattern and lengths do not
            depend on each other, so that another rate asks the same.
        salt: another one gives other prompts of the same lengths, shared prefixes
            included, so that what a service kept of one run does not serve the next.

    Raises:
        ConfigError: no requests, or a rate that is not positive.
    """
    if count < 1:
        raise ConfigError(f"{count} requests are none to measure")
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative")
    length_rng, prefix_rng, arrival_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    prompt_lens = shape.prompts.draw(count, length_rng)
    output_lens = shape.outputs.draw(count, length_rng)
    prefixes = prefix_rng.integers(shape.num_prefixes, size=count)
    arrivals = gamma_arrivals(count, rate, shape.cv, arrival_rng)
    ids = _Ids(seed, salt)
    requests = tuple(
        Request(
            arrival_s=float(arrival_s),
            prompt_len=int(prompt_len),
            output_len=int(output_len),
            chunk_ids=ids.of(int(prompt_len), int(prefix), shape.shared),
        )
        for arrival_s, prompt_len, output_len, prefix in zip(
            arrivals, prompt_lens, output_lens, prefixes, strict=True
        )
    )
    return Workload(name, requests)


def own_chunk_ids(index: int, prompt_len: int, chunk_len: int, seed: int = 0) -> tuple[int, ...]:
    """Return ids that no other request has, for a request that shares nothing."""
    first = seed * _IDS_PER_SEED + _FIRST_OWN_ID + index * _IDS_PER_PREFIX
    return tuple(range(first, first + -(-prompt_len // chunk_len)))


def cap_lengths(workload: Workload, max_len: int) -> Workload:
    """Cut outputs to half of ``max_len`` tokens and prompts to what is left of it.

    Args:
        workload: what to cut.
        max_len: most tokens of prompt and output together, the model's limit.

    Raises:
        ConfigError: nothing would be left.
    """
    if max_len < 2:
        raise ConfigError(f"{max_len} tokens are too few for a prompt and an output")
    requests = []
    for request in workload.requests:
        output_len = min(request.output_len, max_len // 2)
        prompt_len = min(request.prompt_len, max_len - output_len)
        num_chunks = -(-prompt_len // workload.chunk_len)
        requests.append(
            replace(
                request,
                prompt_len=prompt_len,
                output_len=output_len,
                chunk_ids=request.chunk_ids[:num_chunks],
            )
        )
    return replace(workload, requests=tuple(requests))


def with_other_prompts(workload: Workload) -> Workload:
    """Return the same with other tokens, to warm a service up without filling its caches."""
    requests = (
        replace(request, chunk_ids=tuple(_OTHER_IDS + one for one in request.chunk_ids))
        for request in workload.requests
    )
    return replace(workload, requests=tuple(requests))


def ideal_hit_rate(workload: Workload) -> float:
    """Return the part of all prompt tokens that a cache that forgets nothing would have."""
    known: set[tuple[int, int]] = set()
    hits = total = 0
    for request in workload.requests:
        total += request.prompt_len
        chunks = _chunks(request, workload.chunk_len)
        for chunk in chunks:
            if chunk not in known:
                break
            hits += chunk[1]
        known.update(chunks)
    return hits / total


def to_timed_trace(workload: Workload) -> str:
    """Return the file that ``vllm bench serve --dataset-name timed_trace`` reads.

    One JSON object a line; time stamps are seconds.
    """
    lines = (
        json.dumps(
            {
                "timestamp": round(request.arrival_s, 6),
                "input_length": request.prompt_len,
                "output_length": request.output_len,
                "hash_ids": request.chunk_ids,
            }
        )
        for request in workload.requests
    )
    return "\n".join(lines) + "\n"


class _Ids:
    """Gives out chunk ids."""

    def __init__(self, seed: int, salt: str) -> None:
        self._seed = seed
        self._salt = _salt_id(salt) * _IDS_PER_SALT
        self._count = 0

    def of(self, prompt_len: int, prefix: int, shared: float) -> tuple[int, ...]:
        """Return the ids of a prompt whose beginning is shared, in whole chunks."""
        num_chunks = -(-prompt_len // CHUNK_LEN)
        num_shared = round(shared * prompt_len / CHUNK_LEN)
        first = self._salt + self._seed * _IDS_PER_SEED + (1 + prefix) * _IDS_PER_PREFIX
        own = own_chunk_ids(self._count, prompt_len, CHUNK_LEN, self._seed)
        self._count += 1
        salted = (self._salt + one for one in own[num_shared:num_chunks])
        return (*range(first, first + num_shared), *salted)


def _salt_id(salt: str) -> int:
    """Return a number for a salt, 0 for none; the same in every process, unlike a hash."""
    digest = hashlib.blake2b(salt.encode(), digest_size=_SALT_LEN)
    return int.from_bytes(digest.digest(), "big") if salt else 0


def _chunks(request: Request, chunk_len: int) -> Sequence[tuple[int, int]]:
    """Return id and number of tokens of each chunk."""
    left = request.prompt_len
    chunks = []
    for chunk_id in request.chunk_ids:
        chunks.append((chunk_id, min(chunk_len, left)))
        left -= chunk_len
    return chunks
