"""What PD is to reach at least, and whether it does. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.comparing.cells import Duel, shown
from benchmarks.comparing.deployments import NIXL, PD, REPLICAS
from vllm_pd.bench.steady import Regime
from vllm_pd.bench.verdict import Finding, Verdict

BALANCED, PREFILL_HEAVY = "balanced", "prefill-heavy"

RUNS = {BALANCED: (0.7, 40), PREFILL_HEAVY: (0.25, 24)}
"""Requests per second and their number, by workload."""

DEPLOYMENTS = (REPLICAS, PD, NIXL)


@dataclass(frozen=True, slots=True)
class Goal:
    """A latency of PD, at most so many times that of another deployment.

    Attributes:
        workload: what is asked.
        against: the other deployment.
        figure: name of a ``Finding``.
        most: the ratio.
    """

    workload: str
    against: str
    figure: str
    most: float


GOALS = (
    Goal(BALANCED, REPLICAS, "TPOT mean", 0.85),
    Goal(BALANCED, REPLICAS, "TPOT P99", 0.75),
    Goal(BALANCED, REPLICAS, "TTFT mean", 1.3),
    Goal(PREFILL_HEAVY, REPLICAS, "TPOT mean", 0.6),
    Goal(PREFILL_HEAVY, REPLICAS, "TPOT P99", 0.25),
    Goal(BALANCED, NIXL, "TTFT mean", 1 / 4),
    Goal(BALANCED, NIXL, "ITL mean", 1 / 3),
)


def bar_lines(goals: Sequence[Goal], fought: Sequence[Duel]) -> list[list[str]]:
    """Return for each goal what it is of, what is aimed at, what was found, and if it is met."""
    return [_line(goal, fought) for goal in goals]


def _line(goal: Goal, fought: Sequence[Duel]) -> list[str]:
    named = [f"{goal.workload}: {goal.figure} against {goal.against}", f"<= {goal.most:.2f} x"]
    for duel in fought:
        is_asked = (duel.ours.deployment, duel.ours.workload) == (PD, goal.workload)
        if is_asked and duel.theirs.deployment == goal.against:
            found = {one.name: one for one in duel.findings}
            if (finding := found.get(goal.figure)) is not None:
                return [*named, shown(finding) + _regimes(duel), _judged(finding, goal.most)]
    return [*named, "-", "not measured"]


def _judged(finding: Finding, most: float) -> str:
    if finding.verdict is Verdict.WITHHELD:
        return Verdict.WITHHELD.value
    value = finding.interval.value
    if math.isnan(value):
        return "not measured"
    return "met" if value <= most else "missed"


def _regimes(duel: Duel) -> str:
    cells = [cell for cell in (duel.ours, duel.theirs) if cell.regime is not Regime.STEADY]
    return "".join(f", {cell.deployment} {cell.regime.value}" for cell in cells)
