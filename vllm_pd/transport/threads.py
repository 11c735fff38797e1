"""Names of our threads, as ``top -H`` and ``/proc`` show them."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

PREFIX = "vllm-pd-"


def name_thread(thread: threading.Thread, name: str) -> None:
    """Give a running thread a name that the kernel shows, of at most 15 characters."""
    path = Path(f"/proc/self/task/{thread.native_id}/comm")
    with contextlib.suppress(OSError):  # not Linux, or no /proc: a name is a nicety
        path.write_text(f"{PREFIX}{name}"[:15])


def name_this_thread(name: str) -> None:
    """Name the calling thread."""
    name_thread(threading.current_thread(), name)
