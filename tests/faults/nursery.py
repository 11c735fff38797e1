"""Engine processes for tests, forked from one process that has imported everything.

Run as a program it is that process. Each engine process holds one end of a socket;
it ends when the other end is closed, so that none outlives the tests.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from tests.faults.engine import (
    NUM_BLOCKS,
    NUM_REGIONS,
    WAIT_S,
    Address,
    Engine,
    content,
    make_engine,
)
from tests.faults.stages import watch
from vllm_pd.config import ConnectorConfig

REPO = Path(__file__).resolve().parents[2]
_MAX_LEN = 64 * 1024


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is to be.

    Attributes:
        kind: of transport.
        role: ``producer`` or ``consumer``.
        config: its durations.
        stage: when to signal itself; None for never.
        signal: with what.
    """

    kind: str
    role: str
    config: ConnectorConfig = ConnectorConfig()
    stage: str | None = None
    signal: int = signal.SIGKILL


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is to do; it answers each with an ``Answer``."""

    grant: str | None = None
    fetch: str | None = None
    producer: Address | None = None
    wait: bool = False  # for the fetch


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process says.

    Attributes:
        address: where it is.
        error: of the fetch that was waited for; None: it is here.
        is_right: whether the fetched blocks, and all others, hold what they should.
    """

    address: Address
    error: str | None = None
    is_right: bool = True


@dataclass
class EngineProcess:
    """An engine in another process."""

    pid: int
    setup: Setup
    sock: socket.socket
    pidfd: int = field(init=False)
    address: Address = field(init=False)

    def __post_init__(self) -> None:
        self.pidfd = os.pidfd_open(self.pid)
        self.address = self.receive().address

    def ask(self, **command: Any) -> Answer:
        """Give a command and return the answer."""
        self.tell(**command)
        return self.receive()

    def tell(self, **command: Any) -> None:
        """Give a command to a process that may not live to answer."""
        self.sock.send(msgspec.json.encode(Command(**command)))

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def wait_gone(self) -> None:
        """Wait until the process has ended."""
        poller = select.poll()  # not select: descriptors may be many
        poller.register(self.pidfd, select.POLLIN)
        assert poller.poll(WAIT_S * 1000), f"{self.setup} did not get to its stage"

    def wait_stopped(self) -> None:
        """Wait until the process stands still."""
        deadline = time.monotonic() + WAIT_S
        stat = Path(f"/proc/{self.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"{self.setup} did not get to its stage"
            time.sleep(0.002)

    def stop(self) -> None:
        """Let the process stand still."""
        self.signal(signal.SIGSTOP)
        self.wait_stopped()

    def wait_kill(self) -> None:
        """Wait until another thread has called ``kill``."""
        deadline = time.monotonic() + WAIT_S
        while self.pidfd >= 0:
            assert time.monotonic() < deadline, f"{self.setup} did not get to its stage"
            time.sleep(0.002)

    def kill(self) -> None:
        """End the process and close what belongs to it; idempotent."""
        if self.pidfd >= 0:
            try:
                self.signal(signal.SIGKILL)
                self.wait_gone()
            except ProcessLookupError:
                pass
            os.close(self.pidfd)
            self.pidfd = -1
            self.sock.close()

    def receive(self) -> Answer:
        """Return the answer to the oldest command that was told."""
        self.sock.settimeout(WAIT_S)
        return msgspec.json.decode(self.sock.recv(_MAX_LEN), type=Answer)


class Nursery:
    """Starts engine processes; all of them end with it."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=REPO,
                start_new_session=True,
            )

    def start(self, setup: Setup) -> EngineProcess:
        """Start an engine process and wait until it is there."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._sock, [msgspec.json.encode(setup)], [theirs.fileno()])
        pid = int(self._sock.recv(_MAX_LEN))
        return EngineProcess(pid, setup, ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        self._process.wait(WAIT_S)


def main() -> None:
    """Fork an engine process for every setup that comes, until the socket is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for owner in ("producer", "consumer"):  # once, not in every process
        for region in range(NUM_REGIONS):
            for block_id in range(NUM_BLOCKS):
                content(owner, region, block_id)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        while True:
            data, fds, _, _ = socket.recv_fds(sock, _MAX_LEN, 1)
            if not data:
                return
            pid = os.fork()
            if pid == 0:
                sock.close()
                _run(msgspec.json.decode(data, type=Setup), socket.socket(fileno=fds[0]))
            os.close(fds[0])
            sock.send(str(pid).encode())


def _run(setup: Setup, sock: socket.socket) -> None:
    """Be an engine until the socket is closed; does not return."""
    engine = make_engine(setup.kind, setup.role, setup.config)
    if setup.stage is not None:
        once = [setup.signal]
        watch(setattr, setup.role, setup.stage, setup.kind, lambda: _signal_self(once))
    sock.send(msgspec.json.encode(Answer(address=engine.address)))
    while data := sock.recv(_MAX_LEN):
        answer = _obey(engine, msgspec.json.decode(data, type=Command))
        sock.send(msgspec.json.encode(answer))
    os._exit(0)


def _signal_self(numbers: list[int]) -> None:
    """Send this process the next signal, if there is one left.

    It is sent to this thread, which takes it before it does anything else.
    """
    if numbers:
        signal.pthread_kill(threading.get_ident(), numbers.pop())


def _obey(engine: Engine, command: Command) -> Answer:
    if command.grant is not None:
        engine.grant(command.grant)
    if command.fetch is not None:
        assert command.producer is not None
        engine.fetch(command.producer, command.fetch)
    if not command.wait:
        return Answer(address=engine.address)
    error = engine.wait_fetched().error
    return Answer(
        address=engine.address,
        error=None if error is None else f"{type(error).__name__}: {error}",
        is_right=not engine.wrong_blocks(None if error else "producer"),
    )


if __name__ == "__main__":
    main()
