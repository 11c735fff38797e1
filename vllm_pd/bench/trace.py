"""A user's own workload: recorded traces, as Mooncake and Azure publish theirs.

Mooncake: one JSON object a line, ``{"timestamp": ms, "input_length": n,
"output_length": n, "hash_ids": [...]}`` with chunks of 512 tokens; without ``hash_ids`` a
prompt has nothing in common with others. Azure: CSV with the header
``TIMESTAMP,ContextTokens,GeneratedTokens``.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec

from vllm_pd.bench.arrivals import replayed
from vllm_pd.bench.workload import CHUNK_LEN, Request, Workload, own_chunk_ids
from vllm_pd.errors import ConfigError

MOONCAKE_CHUNK_LEN = 512
_AZURE_HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class _Line(msgspec.Struct, frozen=True):
    """A line of a trace in Mooncake's format."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] | None = None


def read_trace(path: Path, *, count: int | None = None, rate: float | None = None) -> Workload:
    """Read a trace and replay it.

    Args:
        path: the file.
        count: use only so many requests from its beginning; None: all.
        rate: stretch it to this mean rate; None: as recorded.

    Raises:
        ConfigError: it cannot be read, or a line is wrong; the message names the line.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    parse: Callable[[str], _Line] = _parse_json
    chunk_len = MOONCAKE_CHUNK_LEN
    if lines and lines[0][1].startswith(_AZURE_HEADER[0]):
        _check_header(path, lines[0][1])
        parse, chunk_len, lines = _parse_csv, CHUNK_LEN, lines[1:]
    lines = lines[:count]
    if not lines:
        raise ConfigError(f"{path} has no requests")
    parsed: list[_Line] = []
    for number, line in lines:
        try:
            parsed.append(_checked(parse(line), after=parsed[-1] if parsed else None))
        except (msgspec.DecodeError, ValueError) as exc:
            raise ConfigError(f"{path}, line {number}: {exc}") from exc
    arrivals = replayed([line.timestamp / 1e3 for line in parsed], rate)
    requests = tuple(
        Request(
            arrival_s=float(arrival_s),
            prompt_len=line.input_length,
            output_len=line.output_length,
            chunk_ids=_chunk_ids(line, index, chunk_len),
        )
        for index, (arrival_s, line) in enumerate(zip(arrivals, parsed, strict=True))
    )
    return Workload(path.name, requests, chunk_len)


def _parse_json(line: str) -> _Line:
    return msgspec.json.decode(line, type=_Line)


def _parse_csv(line: str) -> _Line:
    values = next(csv.reader([line]))
    if len(values) != len(_AZURE_HEADER):
        raise ValueError(f"{len(values)} values instead of {len(_AZURE_HEADER)}")
    moment, prompt_len, output_len = values
    # Seven digits of a second are recorded, and Python takes six.
    seconds = datetime.fromisoformat(moment.strip()[:26]).timestamp()
    return _Line(seconds * 1e3, int(prompt_len), int(output_len))


def _check_header(path: Path, line: str) -> None:
    if tuple(name.strip() for name in line.split(",")) != _AZURE_HEADER:
        raise ConfigError(f"{path}, line 1: the header is not {','.join(_AZURE_HEADER)}")


def _checked(line: _Line, *, after: _Line | None) -> _Line:
    """Refuse what cannot be asked.

    Raises:
        ValueError: a length that is not positive, too few ids, or a step back in time.
    """
    if line.input_length < 1 or line.output_length < 1:
        raise ValueError(
            f"{line.input_length} tokens of prompt and {line.output_length} of output: "
            "both must be at least 1"
        )
    if after is not None and line.timestamp < after.timestamp:
        raise ValueError("it comes before the line above: sort the trace by time")
    needed = -(-line.input_length // MOONCAKE_CHUNK_LEN)
    if line.hash_ids is not None and len(line.hash_ids) < needed:
        raise ValueError(
            f"{len(line.hash_ids)} hash_ids of {MOONCAKE_CHUNK_LEN} tokens are too few for a "
            f"prompt of {line.input_length}"
        )
    return line


def _chunk_ids(line: _Line, index: int, chunk_len: int) -> tuple[int, ...]:
    if line.hash_ids is None:
        return own_chunk_ids(index, line.input_length, chunk_len)
    return line.hash_ids
