"""A router of several processes, and connections to a worker of one's choice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ports import free_ports
from tests.unit.router.fakes import FakeInstance

REPO = Path(__file__).resolve().parents[4]
NUM_WORKERS = 2


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for something that other processes do; bounded by the test's timeout."""
    while True:
        result = holds()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(0.005)


class Connection:
    """One connection to a worker; speaks HTTP over it by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def port(self) -> int:
        port: int = self._writer.get_extra_info("sockname")[1]
        return port

    def send(self, method: str, path: str, body: Any = None, key: str = "") -> None:
        raw = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: r\r\nContent-Length: {len(raw)}\r\n"
        head += f"Authorization: Bearer {key}\r\n" if key else ""
        self._writer.write(head.encode() + b"\r\n" + raw)

    async def answer(self) -> tuple[int, bytes]:
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 204:
            return status, b""
        if found := re.search(rb"(?i)content-length: (\d+)", head):
            return status, await self._reader.readexactly(int(found[1]))
        body = b""
        while size := int(await self._reader.readline(), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()
        return status, body

    async def ask(self, *args: Any, **options: Any) -> tuple[int, bytes]:
        self.send(*args, **options)
        return await self.answer()

    def close(self) -> None:
        self._writer.close()


@dataclass
class Router:
    """The processes.

    Attributes:
        process: the parent.
        port: of the router.
        log: what they write.
        num_instances: that it begins with.
    """

    process: asyncio.subprocess.Process
    port: int
    log: Path
    num_instances: int
    connections: list[Connection] = field(default_factory=list)

    def workers(self) -> list[int]:
        """Return the process ids of the workers, oldest first."""
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def up(self) -> None:
        """Wait until every worker serves and has found every instance healthy.

        On a busy machine a worker may serve before its first probes are answered.
        """
        num_found = NUM_WORKERS * self.num_instances

        def is_up() -> bool:
            num_healthy = self.log.read_text().count(" is healthy")
            return self.num_served() >= NUM_WORKERS and num_healthy >= num_found

        await until(lambda: self.process.returncode is not None or is_up())

    def num_served(self) -> int:
        """Return how many workers have ever come up."""
        return self.log.read_text().count(" serves as process ")

    async def connect(self) -> Connection:
        """Connect to any worker."""
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        self.connections.append(connection)
        return connection

    async def connect_to(self, pid: int) -> Connection:
        """Connect until it is to a certain worker."""
        while True:
            connection = await self.connect()
            assert (await connection.ask("GET", "/health"))[0] == 200
            if _has_connection(pid, self.port, connection.port):
                return connection
            connection.close()


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    prefill: list[FakeInstance],
    decode: list[FakeInstance],
    **options: Any,
) -> AsyncIterator[Router]:
    """Run a router as the command does, until it is up; ends it if the test has not."""
    router = await launch(folder, prefill, decode, **options)
    try:
        await router.up()
        assert router.process.returncode is None, router.log.read_text()
        yield router
    finally:
        for connection in router.connections:
            connection.close()
        if router.process.returncode is None:
            router.process.send_signal(signal.SIGINT)
            router.process.send_signal(signal.SIGTERM)
        await router.process.wait()


async def launch(
    folder: Path, prefill: list[FakeInstance], decode: list[FakeInstance], **options: Any
) -> Router:
    """Start a router, without waiting."""
    (port,) = free_ports(1)
    settings = {"health_interval_s": 0.1, "workers": NUM_WORKERS, "port": port} | options
    argv = [sys.executable, "-m", "vllm_pd.cli", "router", "--port", str(settings.pop("port"))]
    for one in prefill:
        argv += ["--prefill", one.url]
    for one in decode:
        argv += ["--decode", one.url]
    log = folder / "router.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *argv,
            *("--options", json.dumps(settings)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )
    return Router(process, port, log, len(prefill) + len(decode))


def _has_connection(pid: int, port: int, client_port: int) -> bool:
    """Return whether a process has the other end of a connection to ``port``."""
    ends = f":{port:04X} 0100007F:{client_port:04X} "
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines():
        if ends in line:
            inode = line.split()[9]
            break
    else:
        return False
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if descriptor.readlink().name == f"socket:[{inode}]":
                return True
    return False
