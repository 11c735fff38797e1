"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Ends the program with one line if an option is wrong."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        self.exit(2, f"error: {message}\n")


def positive(text: str) -> int:
    """Read a number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def read_number(text: str) -> float:
    """Read a number; what is none becomes nan, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan
