"""The parent of the workers: starts them, replaces those that die or hang, stops all of them.

It serves no request. The workers notice by a socket that it is gone, and stop as well,
so that none is left behind whatever ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_pd.config import RouterConfig
from vllm_pd.errors import LaunchError
from vllm_pd.router import serving
from vllm_pd.router.addresses import base_url, instance_id
from vllm_pd.router.workers.board import Board, make_board
from vllm_pd.router.workers.hub import Hub, Outgoing
from vllm_pd.router.workers.messages import (
    Answer,
    Ask,
    Failed,
    Join,
    Ready,
    Start,
    ToParent,
    framed,
    read_frame,
)
from vllm_pd.router.workers.restarts import Restarts
from vllm_pd.router.workers.silence import LOOK_INTERVAL_S, MAX_LOOKS, Silence
from vllm_pd.router.workers.sockets import SharedPort

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_GRACE_S = 5.0
"""How long a worker may take to end beyond the time for its open requests."""

ANSWER_TIMEOUT_S = 2.0
"""Longest time that a worker is waited for which does not answer a question of another."""

COMMAND = (sys.executable, "-P", "-m", "vllm_pd.cli", "_route")

_decoder = msgspec.msgpack.Decoder(ToParent)


def run(config: RouterConfig) -> int:
    """Run ``config.workers`` processes until SIGINT or SIGTERM.

    A second signal does not wait for open requests.

    Returns:
        The process's exit code.

    Raises:
        ConfigError: the address cannot be used, or there are no instances.
        LaunchError: a worker does not start.
    """
    serving.check_instances(config)
    asyncio.run(_run(config))
    return 0


async def _run(config: RouterConfig) -> None:
    stop, now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    port = SharedPort(config.host, config.port)
    board_fd = make_board(config.workers)
    try:
        await Parent(config, port, board_fd).run(stop, now)
    finally:
        os.close(board_fd)
        port.close()


@dataclass(slots=True, eq=False)
class _Worker:
    """One process that runs."""

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    is_ready: bool = False
    failure: str | None = None
    silence: Silence = field(default_factory=Silence)


class Parent:
    """Keeps the workers of one router.

    Args:
        config: of the router.
        port: where they listen.
        board_fd: memory that they share.
    """

    def __init__(self, config: RouterConfig, port: SharedPort, board_fd: int) -> None:
        self._config = config
        self._port = port
        self._board_fd = board_fd
        self._board = Board(board_fd, config.workers)
        self._hub = Hub(_configured(config))
        self._workers: dict[int, _Worker] = {}  # by number
        self._sockets: dict[int, list[socket.socket]] = {}  # likewise
        self._stopping = asyncio.Event()

    async def run(self, stop: asyncio.Event, now: asyncio.Event) -> None:
        """Keep the workers running until ``stop``, then end them.

        Args:
            stop: lets them finish their open requests, within a limit.
            now: ends them at once.

        Raises:
            LaunchError: one did not start.
        """
        keepers = [asyncio.create_task(self._keep(index)) for index in range(self._config.workers)]
        told = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([told, *keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
            await self._end(keepers, now)
        failures = [failure for keeper in keepers if (failure := keeper.exception())]
        if failures:
            raise failures[0]  # the others are of the same kind, or follow from it

    async def _end(self, keepers: Sequence[asyncio.Task[None]], now: asyncio.Event) -> None:
        self._stopping.set()
        for index in self._sockets:
            self._close(index)  # else connections would wait here that nobody takes
        for worker in self._workers.values():
            _signal(worker.process, signal.SIGTERM)
        ended = asyncio.create_task(asyncio.wait(keepers))
        hurry = asyncio.create_task(now.wait())
        tasks: list[asyncio.Task[Any]] = [ended, hurry]
        await asyncio.wait(
            tasks,
            timeout=serving.SHUTDOWN_TIMEOUT_S + STOP_GRACE_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hurry.cancel()
        for worker in self._workers.values():
            _signal(worker.process, signal.SIGKILL)
        await ended

    async def _keep(self, index: int) -> None:
        """Run one worker after the other in one place.

        Raises:
            LaunchError: the first one does not start.
        """
        restarts = Restarts()
        loop = asyncio.get_running_loop()
        self._sockets[index] = []
        has_served = False
        try:
            while not self._stopping.is_set():
                began = loop.time()
                try:
                    self._sockets[index] = self._sockets[index] or self._port.bind()
                    was_ready, cause = await self._run_one(index)
                    has_served = has_served or was_ready
                except OSError as exc:  # no process, no descriptor, no memory
                    cause = f"could not be started: {exc}"
                if self._stopping.is_set():
                    return
                if not has_served:
                    raise LaunchError(f"router worker {index} did not start: {cause}")
                pause_s = restarts.pause_s(loop.time() - began)
                logger.error(
                    "router worker %d %s; the next one starts in %g s", index, cause, pause_s
                )
                if pause_s:
                    # Nobody would take the connections that come to these meanwhile.
                    self._close(index)
                    await wait_up_to(self._stopping, pause_s)
        finally:
            self._close(index)

    def _close(self, index: int) -> None:
        sockets, self._sockets[index] = self._sockets[index], []
        for one in sockets:
            one.close()

    async def _run_one(self, index: int) -> tuple[bool, str]:
        """Run a worker until it has ended; return whether it ever served, and why it ended."""
        reader, worker = await self._start(self._sockets[index])
        self._workers[index] = worker
        timer = asyncio.get_running_loop().call_later(START_TIMEOUT_S, _give_up, worker)
        watch = asyncio.create_task(self._watch(worker))
        try:
            if self._stopping.is_set():
                _signal(worker.process, signal.SIGTERM)
            worker.writer.write(framed(Start(self._config, index)))
            await self._follow(index, worker, reader)
            code = await _reap(worker.process)
        finally:
            timer.cancel()
            watch.cancel()
            worker.writer.close()
            del self._workers[index]
            self._board.clear(index)
            self._send(self._hub.lost(index))
        return worker.is_ready, worker.failure or _cause(code)

    async def _start(
        self, sockets: Sequence[socket.socket]
    ) -> tuple[asyncio.StreamReader, _Worker]:
        ours, theirs = socket.socketpair()
        with theirs:
            listening = [one.fileno() for one in sockets]
            argv = [*COMMAND, "--link", str(theirs.fileno()), "--board", str(self._board_fd)]
            for fd in listening:
                argv += ["--listen", str(fd)]
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._board_fd, *listening),
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return reader, _Worker(process, writer)

    async def _follow(self, index: int, worker: _Worker, reader: asyncio.StreamReader) -> None:
        """Take a worker's messages until it closes its end."""
        while (data := await read_frame(reader)) is not None:
            worker.silence.heard()
            message: ToParent = _decoder.decode(data)
            match message:
                case Join(in_file):
                    self._send(self._hub.join(index, in_file))
                case Ready():
                    worker.is_ready = True
                    logger.info("router worker %d serves as process %d", index, worker.process.pid)
                case Failed(text):
                    worker.failure = text
                case Ask():
                    self._ask(index, message)
                case Answer(number, page, report):
                    self._send(self._hub.answer(index, number, page, report))

    async def _watch(self, worker: _Worker) -> None:
        """End a worker that serves and hangs; one that stops may be silent."""
        while not self._stopping.is_set():
            await asyncio.sleep(LOOK_INTERVAL_S)
            if worker.is_ready and not self._stopping.is_set() and worker.silence.is_too_long():
                worker.failure = f"has hung for {MAX_LOOKS * LOOK_INTERVAL_S:g} s and was ended"
                _signal(worker.process, signal.SIGKILL)
                return

    def _ask(self, index: int, ask: Ask) -> None:
        number, outgoing = self._hub.ask(index, ask)
        self._send(outgoing)
        if number is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(ANSWER_TIMEOUT_S, self._give_up_question, number)

    def _give_up_question(self, number: int) -> None:
        silent, outgoing = self._hub.give_up(number)
        for index in sorted(silent):
            logger.warning("router worker %d does not answer", index)
        self._send(outgoing)

    def _send(self, outgoing: Outgoing) -> None:
        for index, message in outgoing:
            worker = self._workers.get(index)
            if worker is not None and not worker.writer.is_closing():
                worker.writer.write(framed(message))


def _configured(config: RouterConfig) -> Iterator[str]:
    """Yield the ids of the instances that the configuration names.

    Raises:
        ConfigError: an address is none.
    """
    others = (spec.url for spec in config.instances)
    for url in (*config.prefill_urls, *config.decode_urls, *others):
        yield instance_id(base_url(url))


async def wait_up_to(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but not longer than this."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _give_up(worker: _Worker) -> None:
    """End a worker that does not become ready."""
    if not worker.is_ready:
        worker.failure = f"was not ready within {START_TIMEOUT_S:g} s"
        _signal(worker.process, signal.SIGKILL)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


async def _reap(process: asyncio.subprocess.Process) -> int:
    """Return the exit code of a worker that has closed its end, or is about to be dead."""
    try:
        async with asyncio.timeout(STOP_GRACE_S):
            return await process.wait()
    except TimeoutError:
        _signal(process, signal.SIGKILL)
        return await process.wait()


def _cause(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
