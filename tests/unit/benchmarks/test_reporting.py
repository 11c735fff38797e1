"""The report format that all benchmarks share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.reporting import Report, Row, check_writable, markdown_table, number
from benchmarks.rows import router_rows, transfer_rows
from benchmarks.transfer.pair import BenchError

ROWS = [
    Row({"deployment": "pd"}, "ttft_mean", 12.345, "ms", 11.0, 13.0),
    Row({}, "duration", math.nan, "s"),
]
REPORT = Report("x", {"cpu": "some"}, ROWS, ["a note"], {"deep": (1.0, math.inf)})


def test_report_as_json_has_no_number_that_json_has_not(tmp_path: Path) -> None:
    REPORT.write_json(tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["rows"][0]["low"] == 11.0
    assert data["rows"][1]["value"] is None
    assert data["measured"] == {"deep": [1.0, None]}


def test_report_as_markdown_has_environment_notes_and_intervals() -> None:
    text = REPORT.markdown()
    assert "- cpu: some" in text
    assert "**a note**" in text
    assert "| pd | ttft_mean | 12.35 | 11.00 to 13.00 | ms |" in text
    assert "|  | duration | - |  | s |" in text


def test_cells_cannot_break_a_table() -> None:
    assert "a\\|b" in markdown_table(["x"], [["a|b"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (123.45, "123.5"), (1.234, "1.23"), (0.01234, "0.0123"), (None, "-")],
)
def test_numbers_have_about_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="there is no folder"):
        check_writable(tmp_path / "none" / "x.json")
    with pytest.raises(BenchError, match="is a folder"):
        check_writable(tmp_path)


def test_transports_with_several_peers_have_a_ratio_to_each() -> None:
    common = {"transport": "tcp", "block_len": 65536, "gb_per_s": 4.0, "ratio_to_memmove": 0.5}
    rows = [
        {**common, "ratio_to_peer": 0.9, "peer": "socket"},
        {**common, "ratio_to_peer": 5.0, "peer": "ucx-tcp"},
    ]
    found = {row.figure: row.value for row in transfer_rows(rows)}  # type: ignore[arg-type]
    assert found == {
        "throughput": 4.0,
        "ratio to memmove": 0.5,
        "ratio to socket": 0.9,
        "ratio to ucx-tcp": 5.0,
    }


def test_proxies_have_rate_latency_and_failures() -> None:
    row = {
        "proxy": "vllm-pd",
        "scenario": "unary_c1",
        "req_per_s": 900.0,
        "p50_ms": 1.0,
        "p99_ms": 2.0,
        "errors": 3,
    }
    found = router_rows([row])  # type: ignore[list-item]
    assert [one.value for one in found] == [900.0, 1.0, 2.0, 3]
