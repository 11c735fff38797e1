"""Single instances, for tests that start, stop and replace them one by one."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.engine.deployment import served

T = TypeVar("T")


@dataclass(frozen=True)
class Instance:
    """One ``vllm serve``, started by hand."""

    url: str
    log: Path
    pid: int  # a child of this process, and leader of its group

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its processes as a power cut would."""
        os.killpg(self.pid, signal.SIGKILL)

    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def errors(self) -> list[str]:
        """Return what engine and worker logged as errors; the API server's are vLLM's own."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if re.match(r"\((EngineCore|Worker).*\) ERROR", line)]

    def wait_exit(self, timeout_s: float) -> int:
        """Wait until it ends by itself; return the exit code."""
        deadline = time.monotonic() + timeout_s
        while self.is_running():
            assert time.monotonic() < deadline, f"still running: {self.log.read_text()[-3000:]}"
            time.sleep(0.05)
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert ended.si_code == os.CLD_EXITED, f"killed by signal {ended.si_status}"
        return ended.si_status


@contextmanager
def started(
    folder: Path,
    model: Path,
    name: str,
    *,
    core: int,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    **kv_transfer: Any,
) -> Iterator[Instance]:
    """Start an instance; it ends with the block, whatever happens.

    Args:
        folder: where its log goes.
        model: the checkpoint.
        name: of its log.
        core: which of this process's cores it computes on.
        args: further arguments of ``vllm serve``.
        env: further environment variables.
        kv_transfer: its ``--kv-transfer-config``.
    """
    with served(folder, model, name=name, core=core, args=args, env=env, **kv_transfer) as url:
        log = folder / f"{name}.log"
        found = re.search(r"APIServer pid=(\d+)", log.read_text())
        assert found
        yield Instance(url, log, int(found[1]))


def enter_side_by_side(stack: ExitStack, *contexts: AbstractContextManager[T]) -> list[T]:
    """Enter contexts at the same time, each in a thread of its own; ``stack`` leaves them."""
    with ThreadPoolExecutor(len(contexts)) as pool:
        return list(pool.map(stack.enter_context, contexts))
