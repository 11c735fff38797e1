"""The router benchmark's traffic, arithmetic and report; no router is started."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import router_overhead
from benchmarks.router import load, report, routers, traffic
from benchmarks.router.report import Round, Row, added_ms, make_row, quantile, throughput_table
from benchmarks.transfer import peers


def row(proxy: str, *, req_per_s: float = 100.0, p50_ms: float = 1.0, p99_ms: float = 2.0) -> Row:
    return Row(
        proxy=proxy,
        scenario=report.UNARY_C1,
        req_per_s=req_per_s,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        errors=0,
    )


def test_row_has_the_median_rate_and_the_latencies_of_all_rounds() -> None:
    rounds = [Round(1.0, [1.0, 2.0], 0), Round(1.0, [3.0], 1), Round(1.0, [4.0] * 4, 0)]

    assert make_row("p", report.UNARY_C1, rounds) == Row(
        proxy="p", scenario=report.UNARY_C1, req_per_s=2.0, p50_ms=4.0, p99_ms=4.0, errors=1
    )


def test_proxy_that_answers_nothing_has_a_row_of_zeros() -> None:
    found = make_row("p", report.UNARY_C1, [Round(1.0, [], 7)])

    assert (found["req_per_s"], found["p99_ms"], found["errors"]) == (0.0, 0.0, 7)


def test_quantiles_are_interpolated() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([1.0, 2.0], 1.0) == 2.0


def test_added_latency_is_beyond_both_legs_without_a_router() -> None:
    rows = [row(routers.DIRECT, p50_ms=0.1, p99_ms=0.5), row(routers.OURS)]

    assert added_ms(rows, report.UNARY_C1) == {"p50": 0.9, "p99": 1.5}
    assert added_ms(rows[1:], report.UNARY_C1) is None


def test_table_tells_what_is_wanted_of_us() -> None:
    rows = [row(routers.OURS), row(routers.XPYD, req_per_s=60.0)]
    console = Console(width=120, file=io.StringIO(), record=True)

    console.print(throughput_table(rows))

    assert "1.67 x (wanted >= 2)" in console.export_text()


@pytest.mark.parametrize("answer", [traffic.prefill_answer(), traffic.decode_answer()])
def test_whole_answer_is_complete_with_its_last_byte(answer: bytes) -> None:
    assert load.is_complete(bytearray(answer))
    assert load.is_right(bytearray(answer), 0)
    assert not load.is_complete(bytearray(answer[:-1]))


def test_stream_is_complete_with_its_last_chunk() -> None:
    stream = traffic.stream_head() + b"".join(traffic.stream_chunks())

    assert load.is_complete(bytearray(stream))
    assert load.is_right(bytearray(stream), traffic.NUM_CHUNKS + 1)
    assert not load.is_complete(bytearray(stream[:-1]))


def test_refusal_is_not_right() -> None:
    assert not load.is_right(bytearray(traffic.response(b"{}", "503 Service Unavailable")), 0)


def test_legs_are_what_backends_must_get() -> None:
    assert json.loads(traffic.prefill_leg())["kv_transfer_params"]["do_remote_decode"] is True
    leg = json.loads(traffic.decode_leg(stream=True))
    assert (leg["stream"], leg["kv_transfer_params"]["do_remote_prefill"]) == (True, True)


def test_peers_are_pinned() -> None:
    packages = peers.describe_packages(routers.PEERS)

    assert "vllm-router 0.1.17" in packages
    assert "xpyd-proxy 1.8.0" in packages


def test_proxies_can_be_chosen() -> None:
    options = router_overhead.parse_options(["--proxy", "vllm-pd", "--proxy", "direct"])

    assert options.proxies == (routers.DIRECT, routers.OURS)


def test_peers_can_be_left_out() -> None:
    options = router_overhead.parse_options(["--no-peers", "--quick"])

    assert options.proxies == (routers.DIRECT, routers.OURS)
    assert options.streams_s is None


def test_file_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        router_overhead.parse_options(["--json", str(tmp_path / "none" / "x.json")])

    assert "is not a file that can be written" in capsys.readouterr().err
