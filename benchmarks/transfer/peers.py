"""The environment of the peers that are compared with: made on first use, beside the engine's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.transfer.pair import BenchError

_BENCHMARKS = Path(__file__).resolve().parents[1]
REQUIREMENTS = _BENCHMARKS / "requirements.txt"
FOLDER = _BENCHMARKS / ".venv-peers"

_INSTALL_TIMEOUT_S = 900.0


def find_environment(folder: Path = FOLDER) -> Path | None:
    """Return the Python of a complete and current environment, if there is one."""
    try:
        is_current = _marker(folder).read_text() == _describe()
    except OSError:
        return None
    python = folder / "bin" / "python"
    return python if is_current and python.exists() else None


def describe_packages() -> str:
    """Return what the environment is made of."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return ", ".join(line.replace("==", " ") for line in lines if line)


def make_environment(folder: Path = FOLDER) -> Path:
    """Make the environment; an old or incomplete one is replaced.

    Raises:
        BenchError: the packages cannot be installed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--no-deps", "-r", str(REQUIREMENTS)])
        _run([str(python), "-c", "import nixl._api"])
        _marker(folder).write_text(_describe())
    except OSError as exc:
        raise BenchError(f"the peers' environment cannot be made: {exc}") from exc
    return python


def _marker(folder: Path) -> Path:
    """Return the file whose content says what is installed; written last."""
    return folder / "installed"


def _describe() -> str:
    return f"{sys.version}\n{REQUIREMENTS.read_text()}"


def _run(argv: list[str]) -> None:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    try:
        done = subprocess.run(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise BenchError(f"{' '.join(argv[1:4])} takes too long") from exc
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise BenchError((errors or lines)[-1].removeprefix("ERROR: "))
