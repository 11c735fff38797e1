"""The environments of the peers that are compared with: made on first use, beside the engine's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.transfer.pair import BenchError

_BENCHMARKS = Path(__file__).resolve().parents[1]
REQUIREMENTS = _BENCHMARKS / "requirements.txt"
FOLDER = _BENCHMARKS / ".venv-peers"

_INSTALL_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Packages:
    """What an environment is made of.

    Attributes:
        folder: where it is made.
        requirements: everything that is installed, without dependencies.
        modules: what must be importable then.
    """

    folder: Path = FOLDER
    requirements: Path = REQUIREMENTS
    modules: Sequence[str] = ("nixl._api",)


NIXL = Packages()


def find_environment(packages: Packages = NIXL) -> Path | None:
    """Return the Python of a complete and current environment, if there is one."""
    try:
        is_current = _marker(packages).read_text() == _describe(packages)
    except OSError:
        return None
    python = packages.folder / "bin" / "python"
    return python if is_current and python.exists() else None


def describe_packages(packages: Packages = NIXL) -> str:
    """Return what the environment is made of."""
    lines = packages.requirements.read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return ", ".join(line.replace("==", " ") for line in lines if line)


def make_environment(packages: Packages = NIXL) -> Path:
    """Make the environment; an old or incomplete one is replaced.

    Raises:
        BenchError: the packages cannot be installed.
    """
    folder = packages.folder
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--no-deps"]
        _run([*pip, "-r", str(packages.requirements)])
        _run([str(python), "-c", f"import {', '.join(packages.modules)}"])
        _marker(packages).write_text(_describe(packages))
    except OSError as exc:
        raise BenchError(f"the peers' environment cannot be made: {exc}") from exc
    return python


def _marker(packages: Packages) -> Path:
    """Return the file whose content says what is installed; written last."""
    return packages.folder / "installed"


def _describe(packages: Packages) -> str:
    return f"{sys.version}\n{packages.requirements.read_text()}"


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
