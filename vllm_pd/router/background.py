"""Waiting for what may block, without ever being stuck with it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable


async def finish(work: Callable[[], object], *, timeout_s: float, name: str) -> bool:
    """Run ``work`` in a thread of its own; return whether it has ended in time.

    Unlike one of the loop's own threads, it does not keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            await done.wait()
    except TimeoutError:
        return False
    return True
