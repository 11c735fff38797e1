"""The comparison's arithmetic, verdicts, report and pictures; no engine is started."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import compare
from benchmarks.comparing import bar, options, report
from benchmarks.comparing.cells import Cell, Level, cell_rows, duel_rows, duels, merge
from benchmarks.comparing.deployments import (
    CONTROL,
    PD,
    REPLICAS,
    Site,
    device_env,
    routed,
    topology,
)
from benchmarks.comparing.measuring import Effort, Subject, requests_of
from benchmarks.comparing.plots import draw_all
from benchmarks.comparing.report import write_report
from benchmarks.serving.target import Target
from benchmarks.transfer.pair import REPO, BenchError
from tests.unit.benchmarks.openai_server import Behaviour, serving
from tests.unit.benchmarks.processes import children_of
from tests.unit.benchmarks.synthetic import cell
from vllm_pd.bench.slo import Objectives
from vllm_pd.bench.verdict import Verdict
from vllm_pd.bench.workload import with_other_prompts
from vllm_pd.config import Topology, from_mapping


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return [cell(REPLICAS, stall_s=0.3, count=180), cell(PD, ttft_s=0.3, count=180)]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take seconds."""
    monkeypatch.setattr(report, "draw_all", lambda *_: [])


def site(device: str = "cpu", pool: tuple[str, ...] = ("0", "1")) -> Site:
    return Site("/models/m", device, pool, ("--max-num-seqs", "8"), 1, Path("/tmp"))


def read_raw(path: Path) -> list[dict[str, list[float]]]:
    records: list[dict[str, list[float]]] = json.loads(gzip.decompress(path.read_bytes()))
    return records


def test_what_is_better_and_what_is_worse_is_told_apart(cells: list[Cell]) -> None:
    (duel,) = duels(cells, PD)
    verdicts = {finding.name: finding.verdict for finding in duel.findings}
    assert verdicts["ITL P99"] is Verdict.BETTER
    assert verdicts["TPOT mean"] is Verdict.BETTER
    assert verdicts["TTFT mean"] is Verdict.WORSE
    assert "pd against replicas is better: " in duel.sentence()
    assert "worse: TTFT mean 1.50 x" in duel.sentence()


def test_equal_services_are_not_distinguished() -> None:
    (duel,) = duels([cell(PD), cell(REPLICAS)], PD)
    assert {finding.verdict for finding in duel.findings} == {
        Verdict.OPEN,
        Verdict.FEW,
    }


def test_verdict_is_withheld_if_one_side_lost_requests() -> None:
    (duel,) = duels([cell(PD, ttft_s=0.1, lose_every=10), cell(REPLICAS)], PD)
    assert {finding.verdict for finding in duel.findings} == {Verdict.WITHHELD}
    assert duel.sentence().startswith("pd against replicas: no verdict, as other requests failed")
    assert "24 of 240 requests of pd, 0 of 240 requests of replicas" in duel.sentence()


@pytest.mark.usefixtures("undrawn")
def test_attainment_has_a_verdict_also_where_other_requests_failed(tmp_path: Path) -> None:
    objectives = Objectives(ttft_ms=1000, tpot_ms=40)
    cells = [
        cell(PD, count=180, lose_every=90, objectives=objectives),
        cell(REPLICAS, stall_s=0.3, count=180, objectives=objectives),
    ]
    text = write_report(tmp_path, cells, {}, [])
    assert "pd against replicas is better: SLO attainment +" in text
    assert "; all else: no verdict, as other requests failed (failed: 6 of 540" in text
    assert "In all: " not in text


def test_failures_of_the_same_requests_are_named_beside_the_verdict() -> None:
    (duel,) = duels(
        [cell(PD, ttft_s=0.1, lose_every=10), cell(REPLICAS, lose_every=10)],
        PD,
    )
    assert "TTFT mean" in {finding.name for finding in duel.named(Verdict.BETTER)}
    assert "(failed: 24 of 240 requests of pd, 24 of 240" in duel.sentence()


@pytest.mark.parametrize(
    ("ours", "regime"),
    [(cell(PD, ttft_s=4.5), "too short to tell"), (cell(PD, overload_s=0.3), "unstable")],
)
def test_regime_is_in_every_row_and_sentence(ours: Cell, regime: str) -> None:
    theirs = cell(REPLICAS)
    (duel,) = duels([ours, theirs], PD)
    assert f"(no steady state: pd {regime}, replicas {theirs.regime.value};" in duel.sentence()
    assert {row.labels["regime"] for row in cell_rows([ours])} == {regime}
    labels = [row.labels for row in duel_rows([duel])]
    assert {label["regime"] for label in labels} == {regime}
    assert {label["regime of that"] for label in labels} == {theirs.regime.value}


def test_throughput_and_attainment_have_a_verdict() -> None:
    objectives = Objectives(ttft_ms=1000, tpot_ms=40)
    ours = cell(PD, count=180, objectives=objectives)
    theirs = cell(REPLICAS, stall_s=0.3, count=180, objectives=objectives)
    (duel,) = duels([ours, theirs], PD)
    verdicts = {finding.name: finding.verdict for finding in duel.findings}
    assert verdicts["throughput"] is Verdict.OPEN
    assert verdicts["SLO attainment"] is Verdict.BETTER
    assert "SLO attainment +" in duel.sentence()
    figures = {row.figure for row in duel_rows([duel])}
    assert {"ratio of throughput", "difference of SLO attainment"} <= figures


@pytest.mark.usefixtures("undrawn")
def test_control_is_compared_with_the_baseline_only(tmp_path: Path) -> None:
    write_report(tmp_path, [cell(REPLICAS), cell(PD), cell(CONTROL)], {}, [])
    text = (tmp_path / "report.md").read_text()
    _, ratios = text.split("## Ratios")
    rows = [line.split(" | ")[2] for line in ratios.splitlines() if line.startswith("| balanced |")]
    assert rows == ["pd / replicas", "control / replicas"]


def test_only_the_same_load_is_compared() -> None:
    assert duels([cell(PD), cell(REPLICAS, level=Level(0.25, 1.0))], PD) == []
    assert duels([cell(PD), cell(REPLICAS, count=50)], PD) == []  # it was interrupted


def test_report_has_tables_verdicts_and_pictures(cells: list[Cell], tmp_path: Path) -> None:
    text = write_report(tmp_path, cells, {"cpu": "some"}, ["a note"])
    assert "## balanced, 70% of capacity" in text
    assert "pd against replicas is better" in text
    assert "**a note**" in text
    assert "| balanced | 70% of capacity | pd / replicas | steady / steady | **1.50 x (" in text
    assert re.search(r"\*\*, \+1\d\d\.\d ms \(\+", text)
    for name in ("cdf", "itl-over-time"):
        picture = tmp_path / "plots" / f"balanced-70percent-{name}"
        assert f"plots/{picture.name}.png" in text
        assert picture.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(picture.with_suffix(".svg")).getroot().tag.endswith("svg")


@pytest.mark.usefixtures("undrawn")
def test_report_has_every_figure_and_every_request_as_json(
    cells: list[Cell], tmp_path: Path
) -> None:
    write_report(tmp_path, cells, {"cpu": "some"}, [])
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    found = {row["figure"]: row for row in rows}
    one, difference = found["ratio of ITL P99"], found["difference of ITL P99"]
    assert (one["labels"]["verdict"], one["labels"]["is_enough"]) == ("better", "yes")
    assert one["low"] < one["value"] < one["high"] < 1
    assert difference["unit"] == "ms"
    assert difference["low"] < difference["value"] < difference["high"] < 0
    assert found["compared_ttft_mean"]["labels"]["is_enough"] == "yes"
    raw = read_raw(tmp_path / "raw" / "balanced-70percent-pd-1.json.gz")
    assert len(raw) == 180
    assert len(raw[0]["gaps_ms"]) == 20
    assert raw[0]["gaps_ms"][0] == pytest.approx(20, abs=2)


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_distinguishable_is_not_called_equal(tmp_path: Path) -> None:
    text = write_report(tmp_path, [cell(REPLICAS), cell(PD, ttft_s=0.3)], {}, [])
    assert "not distinguishable: " in text
    assert "In all: worse wherever there is a verdict." in text
    assert "equal" not in text


@pytest.mark.usefixtures("undrawn")
def test_report_says_what_no_interval_shows(cells: list[Cell], tmp_path: Path) -> None:
    text = write_report(tmp_path, cells, {}, [])
    assert "what changed on the machine between them" in text
    assert (
        "P99 of fewer than 299 requests (60 for ITL, of which each has many) or where hardly one "
        "lies beyond, there is a ratio" in text
    )
    assert "What this does not mean" in text


def test_several_loads_give_a_curve(tmp_path: Path) -> None:
    levels = [Level(0.25, 0.5), Level(None, math.inf)]
    cells = [cell(name, level=level) for name in (PD, REPLICAS) for level in levels]
    text = write_report(tmp_path, cells, {}, [])
    assert "plots/balanced-throughput-latency.png" in text


def test_same_data_gives_the_same_picture(cells: list[Cell], tmp_path: Path) -> None:
    pictures = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        draw_all(cells, tmp_path / name)
        pictures.append((tmp_path / name / "balanced-70percent-cdf.svg").read_bytes())
    assert pictures[0] == pictures[1]


def test_both_halves_of_the_devices_are_used_by_pd() -> None:
    values = topology(site("npu", tuple("01234567")), [8000, 8100, 8200])
    made = from_mapping(Topology, values, source="test")
    assert made.prefill is not None
    assert made.decode is not None
    assert (made.prefill.tp, made.prefill.devices) == (4, (0, 1, 2, 3))
    assert (made.decode.tp, made.decode.devices) == (4, (4, 5, 6, 7))


def test_cores_are_threads_of_one_rank() -> None:
    values = topology(site(), [8000, 8100, 8200])
    assert (values["prefill"]["tp"], values["prefill"]["devices"]) == (1, [0])
    env = device_env(site(), ("0", "1"), 2)
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "2"


@pytest.mark.slow
def test_router_serves_two_instances_without_any_to_prefill(tmp_path: Path) -> None:
    behaviours = Behaviour(first_s=0.3), Behaviour(first_s=0.3)
    here = replace(site(), folder=tmp_path)
    with (
        serving(behaviours[0]) as one,
        serving(behaviours[1]) as other,
        routed(here, REPLICAS, [], [one, other]) as url,
        ThreadPoolExecutor(4) as pool,
    ):
        bodies = [{"model": "m", "prompt": [1] * 5, "max_tokens": 2, "stream": True}] * 4
        answers = list(pool.map(lambda body: post(f"{url}/v1/completions", body), bodies))
    assert all(answer.endswith("data: [DONE]\n\n") for answer in answers)
    assert [len(behaviour.prompts) for behaviour in behaviours] == [2, 2]


def post(url: str, body: dict[str, object]) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = response.read().decode()
        return text


def test_devices_are_given_by_the_variable_of_their_kind() -> None:
    assert device_env(site("npu"), ("4", "5"), 1) == {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--load", "0"], "neither 0 to 2"),
        (["--load", "0.5", "--rate", "1"], "exclude each other"),
        (["--rate", "-1"], "not a positive rate"),
        (["--duration", "inf"], "not a number of seconds"),
        (["--seeds", "0"], "not a positive number"),
        (["--workload", "chat"], "invalid choice: 'chat'"),
        (["--goodput", "itl:5"], "objective 'itl:5'"),
        (["--control", "--deployment", "pd"], "add --deployment replicas"),
        (["--bar", "--quick"], "--bar and --quick exclude each other"),
        (["--bar", "--at-once", "3"], "--bar and --at-once exclude each other"),
    ],
)
def test_bad_option_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        compare.main(argv)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


DRIVER = """
import contextlib, sys
from benchmarks import compare

@contextlib.contextmanager
def deployed(name, site):
    yield {url!r}

compare.deployed = deployed  # everything but the engines
sys.exit(compare.main(sys.argv[1:]))
"""


Asked = tuple[str, str, Level, int]
"""Deployment, workload, load and seed."""


class StandIns:
    """Deployments that only note what they are asked.

    Args:
        broken: fail at their start.
        interrupts: what is interrupted.
    """

    def __init__(self, broken: tuple[str, int] | None = None, interrupts: Asked | None = None):
        self._broken = broken
        self._interrupts = interrupts
        self.started: list[str] = []
        self.asked: list[Asked] = []

    @contextlib.contextmanager
    def deployed(self, name: str, _site: Site) -> Iterator[str]:
        self.started.append(name)
        if self._broken == (name, self.started.count(name)):
            raise BenchError("no port")
        yield name

    def measure_cells(
        self, subject: Subject, workload: str, levels: list[Level], effort: Effort, *_: object
    ) -> tuple[list[Cell], bool]:
        cells = []
        for level in levels:
            key = (subject.name, workload, level, effort.first_seed)
            self.asked.append(key)
            made = cell(subject.name, level=level, seeds=1, first_seed=effort.first_seed or 1)
            cells.append(replace(made, workload=workload))
            if key == self._interrupts:
                return [*cells[:-1], interrupted(cells[-1])], True
        return cells, False

    def of(self, name: str) -> list[Asked]:
        return [one for one in self.asked if one[0] == name]


def interrupted(whole: Cell) -> Cell:
    (sample,) = whole.samples
    run = replace(sample.run, records=sample.run.records[:9], is_interrupted=True)
    return replace(whole, samples=(replace(sample, run=run),))


def compared(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *argv: str
) -> int:
    target = Target("http://x", "m", "m", None)
    monkeypatch.setattr(report, "draw_all", lambda *_: [])
    monkeypatch.setattr(compare, "measure_cells", stand_ins.measure_cells)
    monkeypatch.setattr(compare, "deployed", stand_ins.deployed)
    monkeypatch.setattr(compare, "find_target", lambda *_: target)
    site = ["--model", "m", "--device", "cpu", "--devices", "0,1", "--output", str(tmp_path)]
    return compare.main([*argv, *site])


ONE_RATE = ("--workload", "balanced", "--rate", "2")


def test_every_deployment_is_asked_the_same_loads_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = StandIns()
    assert compared(stand_ins, monkeypatch, tmp_path, "--workload", "balanced") == 0
    asked = [[one[2:] for one in stand_ins.of(name)] for name in (REPLICAS, PD, "colocated")]
    reference, *others = asked
    assert reference[0] == (Level(None, math.inf), 0)  # is thrown away
    assert others == [reference[1:]] * 2
    assert [level.share for level, _ in reference[1:]] == [0.25, 0.7, None] * 3
    assert [seed for _, seed in reference[1:]] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_each_round_starts_every_deployment_once_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins = StandIns()
    assert compared(stand_ins, monkeypatch, tmp_path, *ONE_RATE) == 0
    one, two, three = REPLICAS, PD, "colocated"
    assert stand_ins.started == [one, two, three, two, three, one, three, one, two]
    assert "round 2 of 3: starting pd" in capsys.readouterr().out
    assert "in 3 runs" in (tmp_path / "report.md").read_text()


def test_deployment_that_does_not_start_is_left_out_of_later_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = StandIns(broken=(PD, 2))
    assert compared(stand_ins, monkeypatch, tmp_path, *ONE_RATE) == 0
    assert stand_ins.started.count(PD) == 2
    assert [seed for *_, seed in stand_ins.of(REPLICAS)] == [1, 2, 3]
    text = (tmp_path / "report.md").read_text()
    assert "**pd was not measured to the end of round 2 of 3: no port**" in text
    assert "| pd / replicas |" in text  # of the first round


def test_interrupted_comparison_reports_the_rounds_that_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = StandIns(interrupts=(PD, "balanced", Level(None, 2.0), 2))
    assert compared(stand_ins, monkeypatch, tmp_path, *ONE_RATE) == compare.INTERRUPTED
    raw = sorted(path.name for path in (tmp_path / "raw").iterdir())
    assert raw == [f"balanced-2rps-{name}-1.json.gz" for name in ("colocated", PD, REPLICAS)]
    assert "It was interrupted" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_run_that_was_interrupted_is_kept_where_there_is_no_other(tmp_path: Path) -> None:
    cells = merge([interrupted(cell(PD, seeds=1))])
    assert "the run was interrupted" in write_report(tmp_path, cells, {}, [])


def test_only_seeds_of_which_both_have_a_complete_run_are_compared() -> None:
    ours = merge([cell(PD, seeds=2), cell(PD, seeds=1, first_seed=4)])
    theirs = merge([cell(REPLICAS, seeds=1, first_seed=seed) for seed in (4, 3, 2)])
    (duel,) = duels([*ours, *theirs], PD)
    assert [sample.seed for sample in duel.ours.samples] == [2, 4]
    assert [sample.seed for sample in duel.theirs.samples] == [2, 4]
    unfinished = interrupted(cell(REPLICAS, seeds=1))
    assert duels([cell(PD, seeds=1), unfinished], PD) == []


def test_bar_asks_exactly_what_the_goals_are_set_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = StandIns()
    assert compared(stand_ins, monkeypatch, tmp_path, "--bar") == 0
    wanted = [("balanced", 0.7), ("prefill-heavy", 0.25)] * 2
    for name in (REPLICAS, PD, "nixl"):
        assert [(workload, level.rate) for _, workload, level, _ in stand_ins.of(name)] == wanted
    assert len(stand_ins.asked) == 12
    text = (tmp_path / "report.md").read_text()
    assert "| balanced: TTFT mean against nixl | <= 0.25 x | 1.00 x (" in text


def test_bar_is_met_or_missed() -> None:
    ours, theirs = cell(PD, ttft_s=0.3), cell(REPLICAS, ttft_s=0.2, stall_s=0.3)
    lines = bar.bar_lines(bar.GOALS, duels([ours, theirs], PD))
    judged = {line[0]: (line[1], line[3]) for line in lines}
    assert judged["balanced: TPOT mean against replicas"] == ("<= 0.85 x", "met")
    assert judged["balanced: TTFT mean against replicas"] == ("<= 1.30 x", "missed")
    assert judged["balanced: ITL mean against nixl"] == ("<= 0.33 x", "not measured")
    assert judged["prefill-heavy: TPOT P99 against replicas"] == ("<= 0.25 x", "not measured")


def test_bar_is_not_met_by_losing_requests() -> None:
    found = duels([cell(PD, ttft_s=0.1, lose_every=10), cell(REPLICAS)], PD)
    lines = bar.bar_lines([bar.Goal("balanced", REPLICAS, "TTFT mean", 1.3)], found)
    assert lines[0][3] == "no verdict, as other requests failed"


def test_run_may_have_an_exact_number_of_requests() -> None:
    effort = Effort(1, duration_s=60.0, at_once=32, exactly=5)
    assert effort.count(Level(None, 0.7)) == effort.count(Level(None, math.inf)) == 5


@pytest.mark.usefixtures("undrawn")
def test_report_begins_with_what_it_says_in_short(cells: list[Cell], tmp_path: Path) -> None:
    text = write_report(tmp_path, cells, {}, [])
    short, _ = text.split("## How to read this")
    assert short.startswith("# PD against colocated deployments\n\n## In short\n")
    row = next(line for line in short.splitlines() if line.startswith("| balanced |"))
    assert "| 70% of capacity | replicas | steady / steady | worse 1.50 x | better 0." in row
    assert "| same? 1." in row or "| same? 0." in row


@pytest.mark.usefixtures("undrawn")
def test_too_few_requests_are_said_in_short(tmp_path: Path) -> None:
    text = write_report(tmp_path, [cell(PD, seeds=1), cell(REPLICAS, seeds=1)], {}, [])
    assert "| 1.00 x, too few |" in text.split("## How to read this")[0]


@pytest.mark.usefixtures("undrawn")
def test_time_that_a_hypervisor_took_is_said(tmp_path: Path) -> None:
    cells = [cell(PD, stolen=0.062), cell(REPLICAS, stolen=0.01), cell("colocated")]
    text = write_report(tmp_path, cells, {}, [])
    assert "**pd: a hypervisor took 6.2% of the CPU time in a run" in text
    assert "replicas: a hypervisor" not in text
    assert "| 1.0% | 0 |" in text
    rows = {
        row.labels["deployment"]: row.value for row in cell_rows(cells) if row.figure == "steal"
    }
    assert rows == {PD: 0.062, REPLICAS: 0.01}


@pytest.mark.parametrize(
    ("device", "setting", "num_warnings"),
    [("cpu", "1\n", 1), ("cpu", "0\n", 0), ("cpu", None, 0), ("npu", "1\n", 0)],
)
def test_groups_of_sessions_are_warned_of(
    tmp_path: Path, device: str, setting: str | None, num_warnings: int
) -> None:
    path = tmp_path / "sched_autogroup_enabled"
    if setting is not None:
        path.write_text(setting)
    assert len(options.warnings_of(site(device), path)) == num_warnings


@pytest.mark.usefixtures("undrawn")
def test_same_requests_give_the_same_raw_file(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, [cell(PD, seeds=1)], {}, [])
        written.append((tmp_path / name / "raw" / "balanced-70percent-pd-1.json.gz").read_bytes())
    assert written[0] == written[1]


@pytest.mark.usefixtures("undrawn")
def test_report_has_one_row_a_line(cells: list[Cell], tmp_path: Path) -> None:
    write_report(tmp_path, cells, {}, [])
    text = (tmp_path / "report.json").read_text()
    assert len(json.loads(text)["rows"]) == len(text.splitlines()) - 2


def test_picture_says_whether_runs_were_steady(tmp_path: Path) -> None:
    draw_all([cell(PD, overload_s=0.3), cell(REPLICAS)], tmp_path)
    for name in ("cdf", "itl-over-time"):
        text = (tmp_path / f"balanced-70percent-{name}.svg").read_text()
        assert "balanced, 70% of capacity (pd unstable, replicas steady)" in text


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_comparison_reports_what_it_has_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    behaviour = Behaviour(first_s=0.01, gap_s=0.001)
    reached = threading.Event()
    behaviour.on_prompt = lambda count: reached.set() if count == 40 else None
    with serving(behaviour) as url:
        command = [sys.executable, "-c", DRIVER.format(url=url), "--model", "m", "--device", "cpu"]
        command += ["--workload", "balanced", "--rate", "20", "--duration", "60", "--seeds", "1"]
        process = subprocess.Popen([*command, "--output", str(output)], cwd=REPO)
        assert reached.wait(200)
        children = children_of(process.pid)
        process.send_signal(number)
        process.wait(60)
    assert process.returncode == 130
    assert children
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert "It was interrupted" in (output / "report.md").read_text()
    assert 20 <= len(read_raw(output / "raw/balanced-20rps-replicas-1.json.gz")) < 1200


def test_no_prompt_of_a_comparison_comes_twice() -> None:
    effort = Effort(seeds=2, duration_s=60.0, at_once=16)
    levels = [Level(None, math.inf), Level(0.25, 0.5), Level(0.7, 1.4), Level(None, 1.41)]
    first_chunks = [
        request.chunk_ids[0]
        for workload in compare.WORKLOADS
        for level in levels
        for seed in (0, 1, 2)  # 0: the run that tells the capacity
        for asked in [requests_of(workload, level, effort, seed, 4096)]
        for one in (asked, with_other_prompts(asked))  # the warm-up
        for request in one.requests
    ]
    assert len(set(first_chunks)) == len(first_chunks)


def test_every_deployment_is_asked_the_same() -> None:
    effort = Effort(seeds=1, duration_s=60.0, at_once=16)
    asked = [requests_of("balanced", Level(0.7, 1.4), effort, 1, None) for _ in range(2)]
    assert asked[0] == asked[1]


def test_arguments_of_the_user_come_after_those_of_the_untrained_model(tmp_path: Path) -> None:
    argv = ["--device", "cpu", "--devices", "0,1", "--", "--max-num-seqs", "4"]
    args = options.make_parser("x", "").parse_args(argv)
    made = options.make_site(args, tmp_path).args
    assert "--no-enable-prefix-caching" in made
    assert made[-2:] == ("--max-num-seqs", "4")


def test_odd_number_of_devices_is_refused(tmp_path: Path) -> None:
    args = options.make_parser("x", "").parse_args(["--device", "cpu", "--devices", "0"])
    with pytest.raises(BenchError, match="cannot be halved"):
        options.make_site(args, tmp_path)


def test_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    args = options.make_parser("x", "").parse_args(["--device", "cpu", "--devices", "0,9999"])
    with pytest.raises(BenchError, match="there is no device 9999"):
        options.make_site(args, tmp_path)
