"""The search for goodput: its report, and a whole search of a fake server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import goodput
from benchmarks.comparing.deployments import PD, REPLICAS
from benchmarks.comparing.measuring import Effort
from benchmarks.goodput import Found, Plan, make_report
from benchmarks.transfer.pair import BenchError
from tests.unit.benchmarks.openai_server import Behaviour, serving
from vllm_pd.bench.goodput import Search, Trial
from vllm_pd.bench.slo import Objectives

PLAN = Plan("balanced", Objectives(ttft_ms=500, tpot_ms=50), 1.0, 0.9, 0.05, Effort(3, 60.0, 36))


def trial(rate: float, met: int) -> Trial:
    return Trial(rate, met / 100, 300)


def search(*trials: Trial) -> Search:
    return Search(1.0, trials=list(trials))


def over(*trials: Trial) -> Search:
    return Search(1.0, tolerance=1.0, trials=list(trials))


@pytest.mark.parametrize(
    ("theirs", "note"),
    [
        (
            search(trial(1.0, 100), trial(2.0, 50)),
            "the search of replicas is unfinished: its goodput is at least 1.00 req/s",
        ),
        (search(), "the search of replicas is unfinished: its goodput is unknown"),
        (
            over(*(trial(2.0**step, 100) for step in range(13))),
            "replicas failed at no rate that was tried: its goodput is at least 4,096 req/s",
        ),
        (
            over(*(trial(0.5**step, 0) for step in range(5))),
            "replicas is not known to meet the objectives at any rate that was tried: its goodput "
            "is less than 0.0625 req/s",
        ),
        (
            over(*(Trial(0.5**step, 0.9, 20, is_stable=None) for step in range(5))),
            "replicas is not known to meet the objectives at any rate that was tried, nor to miss "
            "them: its goodput is unknown",
        ),
    ],
)
def test_search_without_an_end_or_a_bound_gives_no_ratio(theirs: Search, note: str) -> None:
    ours = over(trial(2.0, 99), trial(4.0, 50))
    report = make_report(PLAN, Found({REPLICAS: theirs, PD: ours}), {})
    assert note in report.notes
    assert "PD against replicas: no ratio, as not both goodputs are known" in report.notes
    figures = {(row.labels["deployment"], row.figure) for row in report.rows}
    assert (REPLICAS, "goodput") not in figures
    assert "ratio of goodputs" not in {figure for _, figure in figures}


def test_ratio_of_goodputs_has_an_interval_and_a_sentence() -> None:
    searches = {
        REPLICAS: over(trial(1.0, 99), trial(2.0, 50)),
        PD: over(trial(2.0, 99), trial(4.0, 50)),
    }
    report = make_report(PLAN, Found(searches), {})
    (ratio,) = [row for row in report.rows if row.figure == "ratio of goodputs"]
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low is not None
    assert ratio.low > 1
    assert any(note.startswith("PD has more goodput than replicas") for note in report.notes)


def test_nothing_measured_is_an_error_with_its_reason() -> None:
    with pytest.raises(BenchError, match="pd was not measured"):
        make_report(PLAN, Found(notes=["pd was not measured to the end"]), {})


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_goodput_of_a_serial_server_is_found_below_its_capacity(tmp_path: Path) -> None:
    json_file = tmp_path / "x.json"
    with serving(Behaviour(first_s=0.05, gap_s=0.0, is_serial=True)) as url:  # 20 req/s at most
        argv = ["--base-url", url, "--goodput", "ttft:400", "--start-rate", "8", "--seeds", "1"]
        argv += ["--duration", "3", "--tolerance", "0.9", "--json", str(json_file)]
        assert goodput.main(argv) == 0
    rows = json.loads(json_file.read_text())["rows"]
    found = {row["figure"]: row["value"] for row in rows}
    assert 0 < found["goodput"] < 20
    assert 0 < found["highest rate that passed"] < 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--goodput"),
        (["--goodput", "itl:5"], "objective 'itl:5'"),
        (["--goodput", "ttft:5", "--attainment", "1"], "not between 0 and 1"),
        (["--goodput", "ttft:5", "--base-url", "http://127.0.0.1:9"], "cannot be reached"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    try:
        status = goodput.main(argv)
    except SystemExit as exc:
        status = int(exc.code or 0)
    error = capsys.readouterr().err
    assert status
    assert message in error
    assert error.count("\n") == 1
