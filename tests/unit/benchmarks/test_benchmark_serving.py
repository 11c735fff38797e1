"""The serving benchmark against real servers that are fake: slow ones, and unreliable ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import benchmark_serving
from benchmarks.benchmark_serving import parse_options
from benchmarks.transfer.pair import REPO
from tests.unit.benchmarks.openai_server import Behaviour, serving
from tests.unit.benchmarks.processes import children_of

PROGRAM = REPO / "benchmarks/benchmark_serving.py"
GOODPUT = ("--goodput", "ttft:150", "tpot:100")


@pytest.fixture
def server() -> Iterator[str]:
    with serving(Behaviour()) as url:
        yield url


def measure(url: str, json_file: Path, *args: str, num: int = 60) -> Any:
    """Run the benchmark; return what it wrote."""
    argv = ["--base-url", url, "--num-prompts", str(num), "--json", str(json_file), *args]
    benchmark_serving.main(argv)
    return json.loads(json_file.read_text())


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line with which a run that cannot be ends."""
    try:
        status = benchmark_serving.main(argv)
    except SystemExit as exc:
        status = int(exc.code or 0)
    captured = capsys.readouterr()
    assert status != 0
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_steady_service_is_measured_as_it_is(tmp_path: Path) -> None:
    behaviour = Behaviour(first_s=0.05, gap_s=0.01)
    with serving(behaviour) as url:
        args = ["--workload", "balanced", "--request-rate", "20", *GOODPUT, "--warm-up", "4"]
        data = measure(url, tmp_path / "x.json", *args)
    found = data["measured"]["figures"]
    assert found["failed"] == 0
    assert found["is_scheduled"]
    assert found["latencies"]["ttft"]["p50"] >= 50
    assert found["latencies"]["itl"]["p50"] >= 10
    assert {len(prompt) for prompt in behaviour.prompts} == {512}
    assert len(behaviour.prompts) == 64  # with the warm-up, and without upstream's first test
    assert len({tuple(prompt) for prompt in behaviour.prompts}) == 64


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_service_that_cannot_keep_up_is_said_to_be_in_no_steady_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour(first_s=0.02, gap_s=0.0, is_serial=True)) as url:
        args = ["--workload", "balanced", "--request-rate", "100", *GOODPUT, "--warm-up", "0"]
        data = measure(url, tmp_path / "x.json", *args, num=100)
    found = data["measured"]["figures"]
    assert found["steadiness"]["regime"] == "unstable"
    assert "note: unstable: overload" in capsys.readouterr().out
    assert any("unstable" in note for note in data["notes"])
    assert found["latencies"]["ttft"]["p99"] > 500  # from when it was due, not from the sending


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_lost_requests_are_counted_against_the_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour(lose_every=20)) as url:
        args = ["--workload", "balanced", "--request-rate", "30", *GOODPUT, "--warm-up", "0"]
        data = measure(url, tmp_path / "x.json", *args)
    found = data["measured"]["figures"]
    assert found["failed"] == 3
    assert found["attainment"]["value"] <= 0.95
    assert "note: 3 of 60 requests failed (5.0%)" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Behaviour(cut_every=10), "ended after 32 of 64 tokens"),
        (
            Behaviour(err_every=10),
            "RuntimeError: the stream ended with an error: engine died",
        ),
    ],
)
def test_stream_that_breaks_off_after_some_tokens_is_a_failure(
    tmp_path: Path, behaviour: Behaviour, error: str
) -> None:
    with serving(behaviour) as url:
        args = ["--workload", "balanced", "--request-rate", "30", *GOODPUT, "--warm-up", "0"]
        data = measure(url, tmp_path / "x.json", *args, num=30)
    found = data["measured"]["figures"]
    assert found["errors"] == {error: 3}
    assert found["failed"] == 3
    assert found["attainment"]["value"] <= 0.9


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_datasets_of_upstream_pass_through_with_their_arrivals_known(
    server: str, tmp_path: Path
) -> None:
    args = ["--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "4"]
    args += ["--request-rate", "20", "--burstiness", "0.5", "--warm-up", "0"]
    data = measure(server, tmp_path / "x.json", *args, num=30)
    requests = data["measured"]["requests"]
    assert data["measured"]["figures"]["is_scheduled"]
    assert requests[-1]["intended_s"] == pytest.approx(30 / 20)  # as upstream stretches them
    assert min(r["sent_s"] - r["intended_s"] for r in requests) >= -0.001


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_warm_up_with_a_dataset_of_upstream_asks_its_prompts_backwards(tmp_path: Path) -> None:
    behaviour = Behaviour()
    dataset = tmp_path / "prompts.json"
    prompts = [f"one{n} two{n} three{n}" for n in range(12)]
    talks = [{"conversations": [{"value": one}, {"value": "yes"}]} for one in prompts]
    dataset.write_text(json.dumps(talks))  # a format that upstream reads without pandas
    with serving(behaviour) as url:
        args = ["--dataset-name", "sharegpt", "--dataset-path", str(dataset)]
        args += ["--sharegpt-output-len", "4", "--warm-up", "4"]
        measure(url, tmp_path / "x.json", *args, num=12)
    backwards = {f"three{n} two{n} one{n}" for n in range(12)}
    assert set(behaviour.prompts[:4]) <= backwards
    assert set(behaviour.prompts[4:]) == set(prompts)


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_writes_what_it_has_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    json_file = tmp_path / "x.json"
    behaviour = Behaviour(first_s=0.01, gap_s=0.001)
    with serving(behaviour) as url:
        command = [sys.executable, str(PROGRAM), "--base-url", url, "--workload", "balanced"]
        command += ["--num-prompts", "1000", "--request-rate", "20", "--warm-up", "0"]
        process = subprocess.Popen(
            [*command, "--json", str(json_file)], stderr=subprocess.PIPE, text=True
        )
        reached = threading.Event()
        behaviour.on_prompt = lambda count: reached.set() if count == 20 else None
        assert reached.wait(200)
        children = children_of(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert children
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    found = json.loads(json_file.read_text())["measured"]
    assert found["is_interrupted"]
    assert 15 <= found["figures"]["count"] < 1000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-prompts", "0"], "not a positive number"),
        (["--request-rate", "0"], "not a positive rate"),
        (["--request-rate", "-2"], "not a positive rate"),
        (["--workload", "chat"], "unknown workload 'chat'"),
        (["--goodput", "itl:5"], "objective 'itl:5'"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--dataset-path", "/no/such/file.json"], "cannot read /no/such/file.json"),
        (["--workload", "sharegpt", "--trace", "x"], "exclude each other"),
        (["--burstiness", "0"], "not a positive number"),
        (["--burstiness", "2", "--trace", "x"], "a trace has its own"),
    ],
)
def test_bad_option_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in error_of(capsys, *argv)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_missing_permission_is_noticed_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    assert "no permission" in error_of(capsys, "--json", str(tmp_path / "x.json"))


def test_address_where_nobody_listens_is_one_line(
    capsys: pytest.CaptureFixture[str], server: str
) -> None:
    port = int(server.rpartition(":")[2])
    with serving(Behaviour()) as other:
        gone = other
    assert gone != f"http://127.0.0.1:{port}"
    assert "cannot be reached" in error_of(capsys, "--base-url", gone)


def test_model_that_is_not_served_is_one_line_with_those_that_are(
    capsys: pytest.CaptureFixture[str], server: str
) -> None:
    message = error_of(capsys, "--base-url", server, "--model", "other")
    assert "does not serve 'other'; it serves m" in message


def test_trace_with_a_wrong_line_is_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], server: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": 1}\n')
    assert "line 2" in error_of(capsys, "--base-url", server, "--trace", str(trace))


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [("d.jsonl", '{"prompt": "a"}\n{"prompt"\n', 2), ("d.json", '[\n{},\n{"a" 1}\n]', 3)],
)
def test_dataset_that_does_not_parse_is_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str, line: int
) -> None:
    (tmp_path / name).write_text(text)
    message = error_of(capsys, "--dataset-path", str(tmp_path / name))
    assert f"{name}, line {line}: " in message


def test_burstiness_of_a_workload_is_drawn_here_and_of_a_dataset_by_upstream() -> None:
    args = ["--burstiness", "0.25"]
    own = parse_options(["--workload", "balanced", *args])
    assert (own.burstiness, own.upstream) == (0.25, ())
    assert parse_options(args).upstream == ("--burstiness", "0.25")


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_workload_comes_in_bursts_if_asked_to(server: str, tmp_path: Path) -> None:
    args = ["--workload", "balanced", "--request-rate", "50", "--burstiness", "0.05"]
    data = measure(server, tmp_path / "x.json", *args, "--warm-up", "0", num=200)
    due = np.asarray([request["intended_s"] for request in data["measured"]["requests"]])
    gaps = np.diff(due)
    assert gaps.std() / gaps.mean() > 2.5  # 4.5 in the long run, 1 without


def test_what_is_not_known_is_passed_on_to_upstream() -> None:
    options = parse_options(
        ["--num-prompts", "5", "--burstiness", "0.5", "--backend", "openai-chat"]
    )
    assert options.count == 5
    assert options.upstream == ("--burstiness", "0.5", "--backend", "openai-chat")
