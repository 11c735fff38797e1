"""Parts of the serving benchmark that need no server."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.serving import tables
from benchmarks.serving.figures import Figures, as_data, make_figures, make_rows
from benchmarks.serving.load import Load, Run, upstream_args
from benchmarks.serving.machine import CpuTimes, parse_stat, read_cpu_times, stolen_between
from benchmarks.serving.progress import Progress
from benchmarks.serving.target import Marks, Target, stages_between
from tests.unit.bench.queue import record, serve
from vllm_pd.bench.slo import Objectives
from vllm_pd.bench.stages import Reading, Stage, parse_metrics
from vllm_pd.bench.workload import make_workload, shape_of

TARGET = Target("http://h:1", "m", "/models/m", 4096)


def figures(*, lost: int = 0, lag: float = 0.0, stages: tuple[Stage, ...] = ()) -> Figures:
    records = [record(due=n / 10, lag=lag, ttft=0.05 + lag, gaps=[0.01] * 4) for n in range(300)]
    records[:lost] = [record(due=n / 10, error="OSError: reset") for n in range(lost)]
    run = Run(records, is_scheduled=True, duration_s=30.0)
    return make_figures(run, Objectives(ttft_ms=100), stages)


def test_throughput_counts_what_was_answered() -> None:
    found = figures(lost=30)
    assert found.request_rate == pytest.approx(9.0)
    assert found.output_rate == pytest.approx(45.0)
    assert found.total_rate == pytest.approx(135.0)
    assert found.attainment is not None
    assert found.attainment.value == pytest.approx(0.9)


def test_goodput_does_not_fall_with_the_drain() -> None:
    records = [record(due=n / 10, ttft=0.05, gaps=[0.01] * 4) for n in range(300)]
    for duration_s in (30.0, 60.0):
        run = Run(records, is_scheduled=True, duration_s=duration_s)
        text = tables.markdown(make_figures(run, Objectives(ttft_ms=100)))
        assert "| goodput without start and drain, req/s | 10.0" in text


def test_goodput_of_a_backlog_is_that_until_the_last_answer() -> None:
    records = serve([0.0] * 40, 0.1)
    run = Run(records, is_scheduled=True, duration_s=4.0)
    text = tables.markdown(make_figures(run, Objectives(ttft_ms=2000.5)))
    assert "| goodput without start and drain, req/s | 5.00 |" in text


def test_good_run_has_no_warning() -> None:
    assert figures().warnings == []


def test_failures_are_said_with_their_causes() -> None:
    (warning,) = figures(lost=15).warnings
    assert warning.startswith("15 of 300 requests failed (5.0%): 15 x OSError: reset")


def test_interrupted_run_says_so_in_every_output() -> None:
    records = [record(due=n / 10, ttft=0.05, gaps=[0.01] * 4) for n in range(300)]
    run = Run(records, is_scheduled=True, duration_s=30.0, is_interrupted=True)
    found = make_figures(run)
    (warning,) = found.warnings
    assert warning.startswith("interrupted: these are the 300 requests that were over by then")
    assert warning in tables.markdown(found)
    assert as_data(found)["is_interrupted"]


def test_no_latency_is_shown_without_the_regime() -> None:
    overload = serve([n / 10 for n in range(300)], 0.2)
    found = make_figures(Run(overload, is_scheduled=True, duration_s=60.0))
    assert {row.labels["regime"] for row in make_rows(found)} == {"unstable"}
    titles = [str(table.title) for table in tables.tables(found) if "Latency" in str(table.title)]
    assert all(title.endswith("(unstable)") for title in titles)
    assert len(titles) == 2
    assert "steady" not in tables.markdown(found)


def test_late_client_is_said() -> None:
    (warning,) = figures(lag=0.02).warnings
    assert "the client was late by 20 ms" in warning


def test_unknown_schedule_is_said() -> None:
    run = Run(serve([n / 10 for n in range(300)], 0.01), is_scheduled=False, duration_s=30.0)
    assert any("not known when" in warning for warning in make_figures(run).warnings)


def test_chunks_of_several_tokens_are_said() -> None:
    records = [record(due=n / 10) for n in range(300)]
    merged = [type(one)(one.intended_s, one.sent_s, one.first_s, (0.1,), 10, 8) for one in records]
    found = make_figures(Run(merged, is_scheduled=True, duration_s=30.0))
    assert any("4.00 tokens" in warning for warning in found.warnings)


def test_rows_and_tables_have_the_seeds_figures_and_those_that_were_added() -> None:
    found = figures(stages=(Stage("prefill leg", 12.0, 300, "router"),))
    names = {row.figure for row in make_rows(found)}
    assert {"duration", "request_throughput", "ttft_p99", "second_p50", "stall_p90"} <= names
    assert {"window_itl_p99", "slo_attainment", "client_lag_p99"} <= names
    text = tables.markdown(found)
    assert "| TTFT | 50.00 | 50.00 | 50.00 | 50.00 |" in text
    assert "| prefill leg | router | 12.00 | 300 |" in text
    assert len(tables.tables(found)) == 4
    assert json.dumps(as_data(found), allow_nan=True)


def test_users_arguments_come_after_ours_so_that_they_win(tmp_path: Path) -> None:
    args = upstream_args(Load(TARGET, 5, ("--temperature", "0.7")), tmp_path)
    assert args[-2:] == ["--temperature", "0.7"]
    assert args[args.index("--num-prompts") + 1] == "5"


def test_workload_is_given_to_upstream_as_a_timed_trace(tmp_path: Path) -> None:
    made = make_workload("balanced", shape_of("balanced"), count=3, rate=1.0, seed=1)
    args = upstream_args(Load(TARGET, 3, (), made), tmp_path)
    assert args[args.index("--dataset-name") + 1] == "timed_trace"
    lines = Path(args[args.index("--dataset-path") + 1]).read_text().splitlines()
    assert len(lines) == 3


def test_warm_up_asks_the_same_lengths_with_other_prompts() -> None:
    made = make_workload("sharegpt", shape_of("sharegpt"), count=9, rate=1.0, seed=1)
    warm_up = Load(TARGET, 9, (), made).for_warm_up(4)
    assert warm_up.count == 4
    assert warm_up.workload is not None
    pairs = list(zip(made.requests, warm_up.workload.requests, strict=True))
    assert all(one.prompt_len == other.prompt_len for one, other in pairs)
    assert not any(set(one.chunk_ids) & set(other.chunk_ids) for one, other in pairs)
    assert warm_up.args[-1] == "--no-self-timed"


def test_router_that_could_not_be_read_before_a_run_has_no_stages() -> None:
    after = parse_metrics(
        "# TYPE vllm_pd:router_prefill_seconds histogram\n"
        "vllm_pd:router_prefill_seconds_sum 900\nvllm_pd:router_prefill_seconds_count 90\n"
    )
    assert stages_between(Marks({}, {}), Marks(after, {})) == []


def test_instance_that_could_not_be_read_before_a_run_is_left_out() -> None:
    def reading(count: int) -> Reading:
        return parse_metrics(
            f"vllm_pd:router_prefill_seconds_sum {count}\n"
            f"vllm_pd:router_prefill_seconds_count {count}\n"
            f"vllm:request_queue_time_seconds_sum {count}\n"
            f"vllm:request_queue_time_seconds_count {count}\n"
        )

    before = Marks(reading(1), {"prefill": {"http://a": {}, "http://b": reading(1)}})
    now = {"http://a": reading(90), "http://b": reading(3), "http://new": reading(4)}
    found = stages_between(before, Marks(reading(9), {"prefill": now}))
    assert {stage.name: stage.count for stage in found if stage.source == "prefill"} == {
        "queue in the engine": 2 + 4
    }


def test_service_without_metrics_has_no_stages() -> None:
    assert stages_between(Marks({}, {}), Marks({}, {})) == []


def test_stolen_time_is_a_part_of_all_time_of_all_cpus() -> None:
    lines = "cpu  10 20 30 40 50 60 70 {} 5 6\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 7\n"
    before, after = (parse_stat(lines.format(stolen)) for stolen in (20, 40))
    assert before == CpuTimes(300, 20)  # a guest's time is the user's already
    assert stolen_between(before, after) == 1.0
    assert stolen_between(before, CpuTimes(500, 30)) == pytest.approx(0.05)


@pytest.mark.parametrize("text", ["", "intr 7\n", "cpu  1 2 3 4\n"])
def test_kernel_that_does_not_tell_stolen_time_is_no_error(text: str) -> None:
    assert parse_stat(text) is None
    assert stolen_between(None, CpuTimes(2, 1)) is None
    assert stolen_between(CpuTimes(2, 1), CpuTimes(2, 1)) is None


def test_machine_without_proc_has_no_stolen_time(tmp_path: Path) -> None:
    assert read_cpu_times(tmp_path / "stat") is None


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    times = iter([0.0, 1.0, 20.0, 21.0, math.inf])
    tell = Progress(Console(file=out), [("measuring", 9)], clock=lambda: next(times))
    for done in (1, 2, 3):
        tell(0, done)
    assert out.getvalue() == "measuring: 2 of 9 requests (20 s)\n"
