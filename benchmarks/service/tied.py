"""Run a program that is told to stop when its parent ends, however that ends.

    python tied.py PARENT_PID PROGRAM [ARGUMENT ...]

The program replaces this one and keeps its process id. It gets SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> NoReturn:
    """Tie this process to its parent and become the program."""
    parent_pid, *program = argv
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent_pid):  # it ended before the call
        sys.exit(1)
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
