"""Two pinned child processes, seen from the parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.transfer.child import CONSUMER, PRODUCER
from benchmarks.transfer.wire import Wire, WireClosedError

REPO = Path(__file__).resolve().parents[2]
CALL_TIMEOUT_S = 90.0

_LAST_WORDS_LEN = 300


class BenchError(Exception):
    """The benchmark cannot go on; the message is one line."""


@dataclass(frozen=True, slots=True)
class Command:
    """How to start the children of one transport.

    Attributes:
        name: the transport, as ``child`` knows it.
        python: interpreter with what the transport needs.
        env: environment variables on top of the parent's.
        roles: one child each.
    """

    name: str
    python: str
    env: Mapping[str, str]
    roles: Sequence[str] = (PRODUCER, CONSUMER)


class Child:
    """One child process; stopped (SIGSTOP) and continued by the pair.

    Raises:
        BenchError: it cannot be started.
    """

    def __init__(self, command: Command, role: str, core: int, link: socket.socket) -> None:
        self.title = f"{command.name} ({role})" if len(command.roles) > 1 else command.name
        ours, theirs = socket.socketpair()
        self._control = Wire(ours)
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close
        argv = [command.python, "-P", "-m", "benchmarks.transfer.child", command.name, role]
        argv += [str(n) for n in (core, os.getpid(), theirs.fileno(), link.fileno())]
        try:
            self._popen = subprocess.Popen(
                argv,
                env={**os.environ, "PYTHONPATH": str(REPO), **command.env},
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=(theirs.fileno(), link.fileno()),
                process_group=0,  # Ctrl-C is for the parent, which ends us
            )
        except OSError as exc:
            self._control.close()
            self._words.close()
            raise BenchError(f"{self.title}: {exc}") from exc
        finally:
            theirs.close()
        self.pid = self._popen.pid

    def order(self, method: str, **args: Any) -> None:
        """Have a method called, without waiting for its end; ``""``: only get ready."""
        with contextlib.suppress(WireClosedError):  # ``result`` tells
            self._control.send({"do": method, "args": args})

    def result(self) -> Any:
        """Wait for what the method of the last order returns.

        Raises:
            BenchError: it failed, or the child ended or hangs.
        """
        try:
            answer = self._control.receive(CALL_TIMEOUT_S)
        except WireClosedError as exc:
            raise BenchError(f"{self.title} ended: {self._last_words()}") from exc
        except TimeoutError as exc:
            raise BenchError(f"{self.title} does not answer") from exc
        if "error" in answer:
            raise BenchError(f"{self.title}: {' '.join(str(answer['error']).split())}")
        return answer["value"]

    def call(self, method: str, **args: Any) -> Any:
        """Call a method and return its result."""
        self.order(method, **args)
        return self.result()

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self._popen.poll() is None:
            self._popen.send_signal(number)

    def close(self) -> None:
        """End it for good."""
        self._popen.kill()
        self._popen.wait()
        self._control.close()
        self._words.close()

    def _last_words(self) -> str:
        """Return the end of what it wrote, and how it ended."""
        status = self._popen.wait()
        self._words.seek(0)
        text = self._words.read().decode(errors="replace").strip()
        last = text.splitlines()[-1][-_LAST_WORDS_LEN:] if text else "no output"
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        return f"{how}: {last}"


class Pair:
    """Producer and consumer of one transport, or a lone consumer; stopped while not in use.

    Args:
        command: how to start them.
        cores: of the producer and of the consumer.

    Raises:
        BenchError: they cannot be started.
    """

    def __init__(self, command: Command, cores: tuple[int, int]) -> None:
        self.name = command.name
        self._by_role: dict[str, Child] = {}
        ends = dict(zip((PRODUCER, CONSUMER), socket.socketpair(), strict=True))
        of_role = dict(zip((PRODUCER, CONSUMER), cores, strict=True))
        try:
            for role in command.roles:
                self._by_role[role] = Child(command, role, of_role[role], ends[role])
            self.call("")
        except BaseException:
            self.close()
            raise
        finally:
            for end in ends.values():
                end.close()

    @property
    def children(self) -> list[Child]:
        """All of them."""
        return list(self._by_role.values())

    @property
    def producer(self) -> Child:
        """The child that has the blocks."""
        return self._by_role[PRODUCER]

    @property
    def consumer(self) -> Child:
        """The child that wants the blocks."""
        return self._by_role[CONSUMER]

    def call(self, method: str, **args: Any) -> Any:
        """Call a method of all children at once; return the consumer's result.

        Raises:
            BenchError: one of them failed.
        """
        for child in self.children:
            child.order(method, **args)
        return [child.result() for child in self.children][-1]

    def pause(self) -> None:
        """Stop the processes, so that threads of theirs that spin disturb nobody."""
        for child in self.children:
            child.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        for child in self.children:
            child.signal(signal.SIGCONT)

    def close(self) -> None:
        """End the processes."""
        for child in self.children:
            child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
