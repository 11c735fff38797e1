from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.launcher.bench import Bench
from vllm_pd.launcher.stop import stop_by_logs


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A deployment that is cleaned up whatever the test does to it."""
    bench = Bench(tmp_path / "run")
    yield bench
    stop_by_logs(bench.run_dir, timeout_s=0.0)
    for supervisor in bench.supervisors:
        supervisor.wait()


@pytest.fixture
def up(bench: Bench) -> Bench:
    """A deployment of one prefill instance, one decode instance and a router, that is up."""
    bench.launch(bench.plan(bench.spec("prefill-0"), bench.spec("decode-0")))
    return bench
