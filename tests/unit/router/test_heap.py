from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os
from vllm_pd.router.heap import return_large_blocks
assert return_large_blocks()
bytearray(2**24)  # freed at once: from here on, the C library would keep such blocks
blocks, pins = [], []
for _ in range(8):
    blocks.append(bytearray(2**24))
    pins.append(bytearray(100_000))  # behind each of them, so that a heap could not shrink
del blocks
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""


def test_large_blocks_go_back_to_the_system() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not the GNU C library")

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 2**20
