"""What a newcomer runs, word for word: the scripts of pd_example, and their bad days."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.deployment import REPO, get
from tests.ports import free_ports

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """This very environment, its own ports and its own folder for state."""
    venv = Path(sys.prefix)
    if not (venv / ".stamp-engine").exists():
        pytest.skip("this environment was not made by pd_example/setup_env.sh")
    router, prefill, decode = free_ports(3)
    return {
        **os.environ,
        "VENV": str(venv),
        "DEVICE": "cpu",
        "PORT": str(router),
        "PREFILL_PORT": str(prefill),
        "DECODE_PORT": str(decode),
        "VLLM_PD_RUN_DIR": str(tmp_path / "run"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def run_script(
    name: str, *args: str, env: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPO / "pd_example" / name), *args],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def alive_in(run_dir: Path) -> list[str]:
    """Return the processes whose output goes to a log of this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            target = os.readlink(process / "fd" / "1")
        except OSError:
            continue
        if target.startswith(str(run_dir)):
            found.append(process.name)
    return found


def test_start_try_and_stop(env: dict[str, str], tmp_path: Path) -> None:
    run_dir = Path(env["VLLM_PD_RUN_DIR"])
    try:
        started = run_script("disaggregated_prefill.sh", env=env, cwd=tmp_path)
        assert started.returncode == 0, started.stdout + started.stderr
        assert "installing" not in started.stdout
        assert "curl http://127.0.0.1" in started.stdout
        assert '"healthy": false' not in get(f"http://127.0.0.1:{env['PORT']}/ready")

        again = run_script("disaggregated_prefill.sh", env=env, cwd=tmp_path)
        assert again.returncode != 0
        assert "already up" in again.stderr

        tried = run_script("test_pd_online.sh", env=env, cwd=tmp_path)
        assert tried.returncode == 0, tried.stdout + tried.stderr
        assert "both requests succeeded" in tried.stdout
    finally:
        stopped = run_script("kill_server.sh", env=env, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert alive_in(run_dir) == []
    assert run_script("kill_server.sh", env=env, cwd=tmp_path).returncode == 0

    without = run_script("test_pd_online.sh", env=env, cwd=tmp_path)
    assert without.returncode != 0


def test_instance_that_dies_while_starting_is_shown_and_nothing_is_left(
    env: dict[str, str], tmp_path: Path
) -> None:
    done = run_script(
        "disaggregated_prefill.sh", "--", "--max-model-len", "999999", env=env, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "max_model_len" in done.stdout + done.stderr  # vLLM's own last words
    assert "ended while starting" in done.stderr
    assert alive_in(Path(env["VLLM_PD_RUN_DIR"])) == []
    status = subprocess.run(
        [sys.executable, "-m", "vllm_pd.cli", "status"], env=env, capture_output=True, check=False
    )
    assert status.returncode == 3


def test_offline_example_hands_the_prompts_over(env: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "pd_example" / "disaggregated_prefill.py")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    match = re.search(r"(\d+) of (\d+) prompt tokens came from the other process", done.stdout)
    assert match, done.stdout[-3000:]
    assert int(match[1]) == int(match[2]) > 0
    assert done.stdout.count("answer:") == 3
