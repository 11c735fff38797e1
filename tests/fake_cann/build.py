"""Builds the double of CANN with the system's C compiler.

``build(folder)`` leaves ``libascendcl.so``, ``libhccl.so`` and the rest in ``folder``; a process
that shall find them gets ``environment(folder)``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
ASCENDCL = "libascendcl.so"
# Every library beside libascendcl links against it.
LIBRARIES = {
    ASCENDCL: ["hooks.c", "device.c", "memory.c", "stream.c", "event.c", "capture.c", "compat.c"],
    # torch_npu names these, too; the double keeps all of AscendCL in one library.
    "libacl_op_compiler.so": [],
    "libacl_tdt_channel.so": [],
    "libge_runner.so": [],
    "libgraph.so": [],
    "libopapi.so": ["opapi.c", "tensors.c"],
    "libhccl.so": [
        "comms.c",
        "operations.c",
        "serial.c",
        "config.c",
        "rendezvous.c",
        "links.c",
        "sockets.c",
    ],
}
FLAGS = ["-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]


class BuildError(RuntimeError):
    """The double could not be built."""


def find_compiler() -> str:
    """Return the C compiler: ``CC``, else ``cc``, else ``gcc``.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CC"), "cc", "gcc"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("the double of CANN needs a C compiler: apt-get install gcc libc6-dev")


def build(folder: Path) -> Path:
    """Build all libraries into ``folder`` and return it.

    Raises:
        BuildError: no compiler, or it failed; with what it printed.
    """
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    for library, sources in LIBRARIES.items():
        command = [compiler, *FLAGS, f"-Wl,-soname,{library}", "-o", str(folder / library)]
        command += [str(SOURCES / source) for source in sources or ["nothing.c"]]
        if library != ASCENDCL:
            command += ["-Wl,--no-as-needed", f"-L{folder}", "-lascendcl"]
            command += ["-Wl,-rpath,$ORIGIN", "-Wl,-z,defs"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{library} does not build:\n{done.stderr}")
    return folder


def environment(folder: Path, **hooks: str) -> dict[str, str]:
    """Return this process's environment for one that uses the libraries in ``folder``.

    ``hooks`` are further variables; README.md lists those of the double.
    """
    others = os.environ.get("LD_LIBRARY_PATH")
    path = f"{folder}:{others}" if others else str(folder)
    return {**os.environ, "LD_LIBRARY_PATH": path, **hooks}
