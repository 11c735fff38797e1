"""Instances that are killed at random and come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.service.servers import free_ports
from benchmarks.transfer.pair import REPO, BenchError

PREFILL, DECODE = "prefill", "decode"

_TIED = REPO / "benchmarks" / "service" / "tied.py"
_START_TIMEOUT_S = 20.0
_DEAD_S = (0.2, 2.0)
_ROUND_S = 1.0

UsableUrls = Callable[[], Awaitable[set[str]]]
"""Asks the router which instances it sends requests to."""


@dataclass(slots=True, eq=False)
class _Member:
    role: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0
    is_up: bool = False

    @property
    def name(self) -> str:
        """Name of its process; the next one has another."""
        return f"{self.port}-{self.num_starts}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(slots=True)
class Fleet:
    """Running instances.

    Attributes:
        members: all of them.
        kills: role of each process that was killed, by its name.
    """

    members: Sequence[_Member]
    kills: dict[str, str] = field(default_factory=dict)

    def urls(self, role: str) -> list[str]:
        """Return the addresses of a role's instances."""
        return [one.url for one in self.members if one.role == role]

    async def kill_at_random(
        self, chance_per_s: float, until: float, rng: random.Random, usable: UsableUrls
    ) -> None:
        """Kill instances, each with a chance per second, and start them again.

        Never the last one of its role that the router uses: then requests are refused, as
        they should be, and it would not be known which of them are lost.

        Args:
            chance_per_s: of one instance.
            until: when to stop, by the monotonic clock.
            rng: decides.
            usable: asks the router.
        """
        async with asyncio.TaskGroup() as restarts:
            while time.monotonic() < until:
                await asyncio.sleep(_ROUND_S)
                for member in self.members:
                    if not member.is_up or rng.random() >= chance_per_s:
                        continue
                    if self._others_up(member) & await usable():
                        self._kill(member)
                        restarts.create_task(_restart(member, rng.uniform(*_DEAD_S)))

    def _others_up(self, member: _Member) -> set[str]:
        """Return who could do a member's work; the router may not know yet who is dead."""
        return {
            one.url
            for one in self.members
            if one.is_up and one.role == member.role and one is not member
        }

    def _kill(self, member: _Member) -> None:
        assert member.process is not None
        self.kills[member.name] = member.role  # first: its clients may notice at once
        member.process.kill()
        member.process.wait()
        member.is_up = False


@contextlib.asynccontextmanager
async def running(num_prefill: int, num_decode: int) -> AsyncIterator[Fleet]:
    """Run instances until the end of the block.

    Raises:
        BenchError: one does not start.
    """
    roles = [PREFILL] * num_prefill + [DECODE] * num_decode
    ports = free_ports(len(roles))
    fleet = Fleet([_Member(role, port) for role, port in zip(roles, ports, strict=True)])
    try:
        await asyncio.gather(*(_start(member) for member in fleet.members))
        yield fleet
    finally:
        for member in fleet.members:
            if member.process is not None:
                member.process.kill()
                member.process.wait()


async def _restart(member: _Member, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    await _start(member)


async def _start(member: _Member) -> None:
    member.num_starts += 1
    command = [sys.executable, str(_TIED), str(os.getpid()), sys.executable]
    command += ["-m", "benchmarks.endurance.instance", str(member.port), member.name]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, process_group=0)  # noqa: ASYNC220  # returns at once
    member.process = process
    async with asyncio.timeout(_START_TIMEOUT_S):
        while not await _listens(member.port):
            if process.poll() is not None:
                raise BenchError(f"an instance ended while starting, with {process.returncode}")
            await asyncio.sleep(0.05)
    member.is_up = True


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
