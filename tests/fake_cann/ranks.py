"""Ranks in processes of their own: each runs one function of ``scenarios`` and reports.

    python -m tests.fake_cann.ranks FOLDER SCENARIO RANK SIZE

The root info goes from rank 0 to the others through the parent, as a line in hexadecimal
digits; the last line of a rank is its result, in JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from ctypes import byref, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.fake_cann.abi import CannError, Libraries, check
from tests.fake_cann.build import environment

REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Rank:
    """What a scenario works with: the libraries, its number, and its peer's where it has one."""

    def __init__(self, libraries: Libraries, rank: int, size: int) -> None:
        self.lib = libraries
        self.rank = rank
        self.size = size
        self.peer = 1 - rank

    def communicator(self, config: bytes | None = None) -> c_void_p:
        """Return a communicator of all ranks.

        Raises:
            CannError: it was refused.
        """
        if self.rank == 0:
            root_info = self.lib.root_info()
            say(root_info.hex())
        else:
            root_info = bytes.fromhex(hear())
        communicator = c_void_p()
        call = self.lib.hccl.HcclCommInitRootInfoConfig
        check(call(self.size, root_info, self.rank, config, byref(communicator)))
        return communicator

    def send(self, address: int, num_bytes: int, comm: c_void_p, stream: c_void_p) -> int:
        """Return the code of HcclSend to the peer."""
        return int(self.lib.hccl.HcclSend(address, num_bytes, 0, self.peer, comm, stream))

    def recv(self, address: int, num_bytes: int, comm: c_void_p, stream: c_void_p) -> int:
        """Return the code of HcclRecv from the peer."""
        return int(self.lib.hccl.HcclRecv(address, num_bytes, 0, self.peer, comm, stream))

    def synchronize(self, stream: c_void_p) -> int:
        """Return the code of aclrtSynchronizeStream."""
        return int(self.lib.acl.aclrtSynchronizeStream(stream))

    def warm_up(self, comm: c_void_p, stream: c_void_p) -> None:
        """Set up the link with one byte from rank 0 to rank 1."""
        move = self.send if self.rank == 0 else self.recv
        check(move(self.lib.device_memory(b"w"), 1, comm, stream))
        check(self.synchronize(stream))


def say(line: str) -> None:
    """Give the parent a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def hear() -> str:
    """Wait for a line of the parent."""
    return sys.stdin.readline().strip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended; its last line of output is the result, in JSON."""

    status: int
    result: Any
    stderr: str


class Child:
    """A process whose standard input and output are lines, seen from the test."""

    def __init__(self, *arguments: str, env: Mapping[str, str]) -> None:
        self._outcome: Outcome | None = None
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in outcome
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def tell(self, line: str) -> None:
        """Give the process a line."""
        stdin = self._stream(self._process.stdin)
        stdin.write(line + "\n")
        stdin.flush()

    def hear(self) -> str:
        """Wait for a line of the process."""
        return self._stream(self._process.stdout).readline().strip()

    def kill(self) -> None:
        """End the process as a crash would."""
        self._process.kill()

    def outcome(self) -> Outcome:
        """Wait for the end, at most half a minute; later calls return the same."""
        if self._outcome is None:
            # Not communicate(): it loses what hear() has read ahead.
            watchdog = threading.Timer(30, self._process.kill)
            watchdog.start()
            lines = self._stream(self._process.stdout).read().strip().splitlines()
            status = self._process.wait()
            watchdog.cancel()
            self._outcome = Outcome(
                status,
                json.loads(lines[-1]) if lines and status == 0 else None,
                self._close(),
            )
        return self._outcome

    def _close(self) -> str:
        """Close all files and return what the process wrote to standard error."""
        self._stream(self._process.stdout).close()
        with contextlib.suppress(BrokenPipeError):
            self._stream(self._process.stdin).close()
        with self._stderr:
            self._stderr.seek(0)
            return self._stderr.read()

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def rank_process(
    folder: Path, scenario: str, rank: int, hooks: Mapping[str, str], size: int = 2
) -> Child:
    """Start one rank, on a device of its own."""
    env = environment(folder, **{"ASCEND_RT_VISIBLE_DEVICES": str(rank), **hooks})
    arguments = (str(folder), scenario, str(rank), str(size))
    return Child("-m", "tests.fake_cann.ranks", *arguments, env=env)


class Ranks:
    """All ranks of a scenario, two unless hooks are given for more; a context manager.

    Hooks are for all ranks, or one set for each.
    """

    def __init__(self, folder: Path, scenario: str, *hooks: Mapping[str, str]) -> None:
        each = hooks if len(hooks) > 1 else (hooks or ({},)) * 2
        self.ranks = [
            rank_process(folder, scenario, rank, of_rank, len(each))
            for rank, of_rank in enumerate(each)
        ]

    def __enter__(self) -> Ranks:
        root_info = self.ranks[0].hear()
        for rank in self.ranks[1:]:
            rank.tell(root_info)
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.outcome()

    def outcomes(self) -> list[Outcome]:
        """Wait for all ranks."""
        return [rank.outcome() for rank in self.ranks]


def main(folder: str, scenario: str, rank: str, size: str) -> None:
    """Run one rank."""
    from tests.fake_cann import scenarios

    libraries = Libraries(Path(folder))
    check(libraries.acl.aclrtSetDevice(0))
    try:
        result = getattr(scenarios, scenario)(Rank(libraries, int(rank), int(size)))
    except CannError as error:
        result = {"error": error.code}
    say(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
