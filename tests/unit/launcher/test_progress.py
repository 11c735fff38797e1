from __future__ import annotations

import io

from rich.console import Console

from vllm_pd.launcher.plan import DeploymentPlan, ProcessSpec
from vllm_pd.launcher.progress import LiveProgress, PlainProgress

PLAN = DeploymentPlan(
    model="m",
    served_model_name="m",
    device="cpu",
    router_url="http://127.0.0.1:8000",
    ready_url="http://127.0.0.1:8000/ready",
    processes=tuple(
        ProcessSpec(
            name=name, role=role, argv=(), url=url, ready_url=f"{url}/health", devices=devices
        )
        for name, role, url, devices in (
            ("prefill-0", "prefill", "http://127.0.0.1:8100", "CPU core 0"),
            ("router", "router", "http://127.0.0.1:8000", ""),
        )
    ),
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_plain_progress_is_a_line_for_each_change() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainProgress(PLAN, out, clock) as progress:
        progress.changed("prefill-0", "starting")
        clock.now_s += 27.4
        progress.changed("prefill-0", "ready")
    assert out.getvalue().splitlines() == [
        "prefill-0  port 8100  CPU core 0  starting",
        "router     port 8000              starting",
        "prefill-0  port 8100  CPU core 0  ready after 27 s",
    ]


def test_plain_progress_shows_every_ten_seconds_what_is_still_starting() -> None:
    out, clock = io.StringIO(), Clock()
    with PlainProgress(PLAN, out, clock) as progress:
        progress.changed("router", "ready")
        for _ in range(24):
            clock.now_s += 0.5
            progress.tick()
    assert out.getvalue().splitlines()[3:] == ["prefill-0  port 8100  CPU core 0  starting … 10 s"]


def test_live_progress_ends_with_the_result() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with LiveProgress(PLAN, console) as progress:
        progress.changed("prefill-0", "ready")
        progress.changed("router", "failed")
        progress.tick()
    last = out.getvalue()
    assert "ready" in last
    assert "failed" in last
