"""The soak in short: a real router, clients of all kinds, instances that are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.endurance.clients import LEFT, LOST, MIX, RIGHT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

REPO = Path(__file__).resolve().parents[2]
SECONDS = 30
KILL_PERCENT = 5  # more than in ten minutes, or nobody might be killed in 30 seconds


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("soak") / "report.json"
    command = [sys.executable, str(REPO / "benchmarks" / "soak.py"), "--json", str(path)]
    command += ["--seconds", str(SECONDS), "--kill-percent", str(KILL_PERCENT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert path.exists(), done.stdout + done.stderr
    report: dict[str, Any] = json.loads(path.read_text())
    assert done.returncode == (1 if report["failures"] else 0)
    return report


def test_nothing_is_lost_and_nothing_is_left(report: dict[str, Any]) -> None:
    # A half of 30 seconds has too few quiet moments to tell a leak from bodies on their way.
    assert [one for one in report["failures"] if not one.startswith("memory ")] == []
    assert report[LOST] == 0


def test_soak_was_one(report: dict[str, Any]) -> None:
    assert sum(report["kills"].values()) > 0
    assert set(report["requests"]) <= set(MIX)
    assert report["requests"]["whole"][RIGHT] > 0
    assert report["requests"]["leaves"][LEFT] > 0
