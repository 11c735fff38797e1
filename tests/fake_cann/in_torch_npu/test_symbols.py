"""The names of CANN that torch_npu's libraries are linked against."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch_npu

FOLDER = Path(torch_npu.__file__).parent
LIBRARIES = sorted([*FOLDER.glob("lib/*.so"), *FOLDER.glob("_C*.so")])


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_the_double_has_every_name_that_a_library_needs(library: Path) -> None:
    command = ["nm", "-D", "--undefined-only", str(library)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r" U ((?:acl|rt|Msprof|Hccl)\w+)", table)
    acl = ctypes.CDLL("libascendcl.so")
    assert [name for name in names if not hasattr(acl, name)] == []
