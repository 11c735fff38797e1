"""Stop a deployment when standard input ends: at the end of the benchmark, however it ends.

    python guard.py RUN_DIR

``vllm-pd up`` leaves its processes in the background, by design. This one stays with
the benchmark, holds the other end of a pipe, and runs ``vllm-pd down``.
"""

from __future__ import annotations

import subprocess
import sys
import time

_NUM_TRIES = 20
_PAUSE_S = 3.0


def main(argv: list[str]) -> int:
    """Wait, then stop the deployment; return the exit status of ``vllm-pd down``."""
    (run_dir,) = argv
    sys.stdin.buffer.read()
    command = [sys.executable, "-P", "-m", "vllm_pd.cli", "down", "--run-dir", run_dir]
    for _ in range(_NUM_TRIES):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return 0
        time.sleep(_PAUSE_S)  # a start that was interrupted may still be stopping
    return subprocess.run([*command, "--force"], stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
