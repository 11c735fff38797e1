"""Main program of a child process: one end of one transport, under the parent's orders.

    python -m benchmarks.transfer.child NAME ROLE CORE PARENT CONTROL_FD LINK_FD

It answers ``{"do": METHOD, "args": {...}}`` with ``{"value": ...}`` or ``{"error": ...}``
and ends when the parent does, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
from typing import Any

from benchmarks.transfer.wire import Wire, WireClosedError

PRODUCER, CONSUMER = "producer", "consumer"

_PR_SET_PDEATHSIG = 1

# By name, because each imports what only its own environment has.
_ENDS = {
    ("memmove", CONSUMER): ("reference", "Memmove"),
    ("socket", PRODUCER): ("reference", "SocketProducer"),
    ("socket", CONSUMER): ("reference", "SocketConsumer"),
    ("nixl", PRODUCER): ("nixl_peer", "NixlProducer"),
    ("nixl", CONSUMER): ("nixl_peer", "NixlConsumer"),
    ("ucx-tcp", PRODUCER): ("nixl_peer", "NixlProducer"),
    ("ucx-tcp", CONSUMER): ("nixl_peer", "NixlConsumer"),
    ("shm", PRODUCER): ("ours", "OurProducer"),
    ("shm", CONSUMER): ("ours", "OurConsumer"),
    ("tcp", PRODUCER): ("ours", "OurProducer"),
    ("tcp", CONSUMER): ("ours", "OurConsumer"),
    ("worker", PRODUCER): ("workers", "Worker"),
    ("worker", CONSUMER): ("workers", "Worker"),
}


def make_end(name: str, role: str, link: Wire) -> Any:
    """Load and make one end of a transport."""
    module, kind = _ENDS[name.partition("+")[0], role]
    factory = getattr(importlib.import_module(f"benchmarks.transfer.{module}"), kind)
    return factory(link, name)


def main(argv: list[str]) -> int:
    """Serve the parent until it hangs up."""
    name, role = argv[0], argv[1]
    core, parent_pid, control_fd, link_fd = map(int, argv[2:])
    _die_with(parent_pid)
    os.sched_setaffinity(0, {core})
    control = Wire(socket.socket(fileno=control_fd))
    link = Wire(socket.socket(fileno=link_fd))
    end: Any = None
    with contextlib.suppress(WireClosedError):
        while True:
            order = control.receive()
            try:
                if end is None:
                    end = make_end(name, role, link)
                value = getattr(end, order["do"])(**order["args"]) if order["do"] else None
            except Exception as exc:  # noqa: BLE001 - whatever it is, the parent must know
                control.send({"error": f"{type(exc).__name__}: {exc}"})
            else:
                control.send({"value": value})
    if end is not None:
        end.close()
    return 0


def _die_with(parent_pid: int) -> None:
    """End this process when its parent ends, even if it is stopped or blocked then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the call
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
