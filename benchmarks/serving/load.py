"""Runs of ``vllm bench serve`` in a process of their own, and what was recorded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.serving.target import Target
from benchmarks.transfer.pair import REPO, BenchError
from vllm_pd.bench.records import Record, read_result
from vllm_pd.bench.workload import Workload, to_timed_trace, with_other_prompts

_TIED = REPO / "benchmarks/service/tied.py"
_STOP_TIMEOUT_S = 20.0
_LAST_WORDS_LEN = 300
_WARM_UP_CONCURRENCY = 4
_INTERRUPTED = 130
UNFINISHED = "interrupted"
"""What the recorder calls requests that were under way when it was interrupted."""

_QUIET = (
    *("--save-result", "--save-detailed", "--disable-tqdm"),
    *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"),
    # Upstream's first test asks the first prompt, whose prefix would then be cached.
    *("--ready-check-timeout-sec", "0"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What to ask.

    Attributes:
        target: whom.
        count: how many requests.
        args: for ``vllm bench serve``: the dataset, the rate, whatever else.
        workload: asked instead of a dataset of upstream's; None: ``args`` name one.
    """

    target: Target
    count: int
    args: tuple[str, ...] = ()
    workload: Workload | None = None

    def for_warm_up(self, count: int) -> Load:
        """Return a few requests of the same lengths, four at a time, as fast as possible.

        The prompts are others: of a workload they are drawn, of a dataset of upstream's the
        recorder turns them round.
        """
        options = ["--request-rate", "inf", "--max-concurrency", str(_WARM_UP_CONCURRENCY)]
        workload = self.workload
        if workload is not None:
            options.append("--no-self-timed")
            workload = with_other_prompts(workload)
        return replace(self, count=count, args=(*self.args, *options), workload=workload)


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it.

    Attributes:
        records: one for each request, in the order of arrival.
        is_scheduled: whether it is known when each request was to be sent.
        duration_s: from the first arrival to the last answer.
        goodput: upstream's figure, if objectives were given.
        is_interrupted: whether the user ended it early.
    """

    records: list[Record]
    is_scheduled: bool
    duration_s: float
    goodput: float | None = None
    is_interrupted: bool = False


def run_loads(
    loads: Sequence[Load],
    *,
    warm_up: int,
    tell_progress: Callable[[int, int], None],
    between: Callable[[], None],
) -> list[Run]:
    """Ask, and return what happened. Ctrl-C ends it early, with what there is.

    Args:
        loads: what to ask, one after the other.
        warm_up: how many requests like those of the first load to ask before, untimed.
        tell_progress: gets the number of loads that are over, the warm-up included, and
            of requests of the present one that are, now and then.
        between: called before the first load and after each of them, while nothing is
            asked.

    Returns:
        One for each load; fewer, and the last one incomplete, if it was interrupted.

    Raises:
        BenchError: upstream's tool failed.
        KeyboardInterrupt: it was interrupted before the first request.
    """
    phases = [*([loads[0].for_warm_up(warm_up)] if warm_up else []), *loads]
    if not warm_up:
        between()
    with tempfile.TemporaryDirectory(prefix="vllm-pd-bench-") as name:
        folder = Path(name)
        parts = [folder / str(number) for number in range(len(phases))]
        plan = [
            _phase(load, part, is_measured=number >= len(phases) - len(loads))
            for number, (load, part) in enumerate(zip(phases, parts, strict=True))
        ]
        status = _run_recorder(plan, folder, tell_progress, between)
        if status not in {0, _INTERRUPTED}:
            raise BenchError(f"vllm bench serve: {_last_words(folder / 'log')}")
        runs = [_read_run(part) for part in parts[-len(loads) :]]
    found = [run for run in runs if run is not None]
    if not found:
        raise KeyboardInterrupt
    if len(found) < len(loads):  # between two of them
        found[-1] = replace(found[-1], is_interrupted=True)
    return found


def _phase(load: Load, folder: Path, *, is_measured: bool) -> dict[str, Any]:
    """Return an entry of the recorder's plan."""
    folder.mkdir()
    return {
        "args": upstream_args(load, folder),
        "schedule": str(folder / "schedule.json") if is_measured else None,
        "partial": str(folder / "partial.json") if is_measured else None,
        "is_turned": not is_measured and load.workload is None,
    }


def _read_run(folder: Path) -> Run | None:
    """Return what a run has left; None: it had no request yet."""
    files = [folder / "result.json", folder / "partial.json"]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    if not result["start_times"]:
        return None
    schedule_file = folder / "schedule.json"
    schedule = json.loads(schedule_file.read_text()) if schedule_file.exists() else None
    records, is_scheduled = read_result(result, schedule)
    records = [record for record in records if record.error != UNFINISHED]
    if not records:
        return None
    ends = [record.ended_s for record in records if record.is_ok]
    return Run(
        records=records,
        is_scheduled=is_scheduled,
        duration_s=max(ends, default=0.0) - records[0].intended_s,
        goodput=result.get("request_goodput"),
        is_interrupted=file is files[1],
    )


def upstream_args(load: Load, folder: Path) -> list[str]:
    """Return the arguments of ``vllm bench serve``; a workload is written into ``folder``.

    The user's own come last, so that they win.
    """
    target = load.target
    args = ["--base-url", target.base_url, "--model", target.root]
    args += ["--served-model-name", target.model, "--num-prompts", str(load.count)]
    args += ["--temperature", "0", "--result-dir", str(folder), "--result-filename", "result.json"]
    args += _QUIET
    if (workload := load.workload) is not None:
        path = folder / "workload.jsonl"
        path.write_text(to_timed_trace(workload))
        args += ["--dataset-name", "timed_trace", "--dataset-path", str(path)]
        args += ["--timed-trace-chunk-hash-size", str(workload.chunk_len)]
    return [*args, *load.args]


def _run_recorder(
    plan: Sequence[Mapping[str, Any]],
    folder: Path,
    tell_progress: Callable[[int, int], None],
    between: Callable[[], None],
) -> int:
    """Return the exit status; that of an interruption if there was one."""
    plan_file = folder / "plan.json"
    plan_file.write_text(json.dumps(plan))
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-P", str(_TIED), str(os.getpid()), sys.executable, "-P"]
    command += ["-m", "benchmarks.serving.recorder", str(plan_file), str(write_fd)]
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    # timed_trace makes prompts from hash(str), which differs from process to process.
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    try:
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                process_group=0,  # Ctrl-C is for this process, which passes it on
            )
    finally:
        os.close(write_fd)
    try:
        for num_over, done, is_over in _news(read_fd):
            tell_progress(num_over, done)
            if is_over:
                between()
                _go_on(process)
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        return _INTERRUPTED
    finally:
        os.close(read_fd)
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _news(progress_fd: int) -> Iterator[tuple[int, int, bool]]:
    """Yield how many runs are over, how many requests of the present one, and if it is, too."""
    num_over, done = 0, 0
    while news := os.read(progress_fd, 4096):
        for part in news.splitlines(keepends=True):
            done += part.count(b".")
            is_over = part.endswith(b"\n")
            yield num_over, done, is_over
            if is_over:
                num_over, done = num_over + 1, 0


def _go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has just ended
        process.stdin.write(b"\n")
        process.stdin.flush()


def _last_words(log: Path) -> str:
    """Return the last line of a log that names an error, or the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror:" in line or "error:" in line]
    return (errors or lines or ["it ended without output"])[-1][-_LAST_WORDS_LEN:]
