from __future__ import annotations

from pathlib import Path

import pytest

from vllm_pd.bench.trace import read_trace
from vllm_pd.bench.workload import ideal_hit_rate
from vllm_pd.errors import ConfigError

MOONCAKE = """\
{"timestamp": 0, "input_length": 700, "output_length": 52, "hash_ids": [7, 8]}
{"timestamp": 3000, "input_length": 900, "output_length": 26, "hash_ids": [7, 9], "x": 1}

{"timestamp": 3000, "input_length": 10, "output_length": 1}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def test_mooncake_trace_is_replayed_with_its_shared_chunks(trace: Path) -> None:
    trace.write_text(MOONCAKE)
    workload = read_trace(trace)
    assert [request.arrival_s for request in workload.requests] == [0.0, 3.0, 3.0]
    assert [request.output_len for request in workload.requests] == [52, 26, 1]
    assert ideal_hit_rate(workload) == pytest.approx(512 / 1610)


def test_azure_trace_is_replayed(trace: Path) -> None:
    trace.write_text(AZURE)
    workload = read_trace(trace)
    assert [r.prompt_len for r in workload.requests] == [4808, 3180]
    assert workload.span_s == pytest.approx(0.052, abs=1e-3)
    assert ideal_hit_rate(workload) == 0.0


def test_trace_can_be_cut_and_stretched(trace: Path) -> None:
    trace.write_text(MOONCAKE)
    workload = read_trace(trace, count=2, rate=0.1)
    assert [request.arrival_s for request in workload.requests] == [0.0, 10.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: .*truncated"),
        ('{"timestamp": 1}', "line 2: .*input_length"),
        ('{"timestamp": 1, "input_length": "x", "output_length": 1}', "line 2: .*input_length"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "line 2: .*at least 1"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "line 2: .*sort"),
        (
            '{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
            "line 2: 1 hash_ids .* too few",
        ),
    ],
)
def test_wrong_line_is_named(trace: Path, line: str, message: str) -> None:
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_trace(trace)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE.replace("ContextTokens", "Prompt"), "line 1: the header"),
        (AZURE + "yesterday,1,2\n", "line 4"),
        (AZURE + "2023-11-16 18:17:05,1\n", "line 4: 2 values"),
        ("", "no requests"),
        ("\n\n", "no requests"),
    ],
)
def test_file_that_is_no_trace_is_refused(trace: Path, text: str, message: str) -> None:
    trace.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(trace)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none")
