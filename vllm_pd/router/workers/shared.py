"""What a worker shares with the others: counts, news, questions. The worker's side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import msgspec

from vllm_pd.config import Role
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.router.admission import Stage
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.instances_file import InstancesFile
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.reports import Report, report_of
from vllm_pd.router.workers import changes
from vllm_pd.router.workers.board import Board, News, Row, key_of
from vllm_pd.router.workers.merge import Page, merge, render
from vllm_pd.router.workers.messages import (
    Answer,
    Answers,
    Ask,
    Asked,
    Doubt,
    Failed,
    FileChanged,
    Join,
    MakeChange,
    Question,
    Ready,
    ShowMetrics,
    ShowReports,
    Start,
    ToParent,
    ToWorker,
    Welcome,
    framed,
    read_frame,
)
from vllm_pd.router.workers.siblings import Siblings

logger = logging.getLogger(__name__)

METRICS_INTERVAL_S = 1.0
"""Pause between two copies of the metrics for the parent: what a worker counted after the
last one is lost if it is killed."""

_decoder = msgspec.msgpack.Decoder(ToWorker)
_report_decoder = msgspec.msgpack.Decoder(Report)


class Shared:
    """The link to the parent and the board, for the time of one worker.

    Args:
        reader: of what the parent writes.
        writer: to the parent.
        stop: set when the parent is gone.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._stop = stop
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[int, asyncio.Future[Answers]] = {}
        self._next_number = 0
        self._urls: dict[int, str] = {}  # of instances, by key
        self._board: Board
        self._pool: InstancePool
        self._metrics: Metrics
        self._stages: Mapping[Role, Stage]
        self._file: InstancesFile | None

    async def start(self) -> Start:
        """Return what the parent wants this worker to be.

        Raises:
            RemoteProtocolError: the parent is gone.
        """
        message = await self._next()
        if not isinstance(message, Start):
            raise RemoteProtocolError("the router's parent process is gone")
        return message

    def use_board(self, board: Board) -> None:
        """Count on this board; before anything is counted."""
        self._board = board

    async def join(
        self,
        pool: InstancePool,
        metrics: Metrics,
        stages: Mapping[Role, Stage],
        file: InstancesFile | None = None,
    ) -> None:
        """Become one of the workers that are asked, and make the changes that were missed.

        Questions are answered from then on, until ``leave``.

        Args:
            pool: what changes are made in.
            metrics: of this worker.
            stages: its queues.
            file: that the instances are from, if there is one; to be watched from now on.

        Raises:
            RemoteProtocolError: the parent is gone.
        """
        self._pool, self._metrics, self._stages, self._file = pool, metrics, stages, file
        pool.subscribe(self._forget)
        pool.subscribe_doubts(self._tell_doubt)
        self._send(Join(file.names if file else ()))
        message = await self._next()
        if not isinstance(message, Welcome):
            raise RemoteProtocolError("the router's parent process is gone")
        for change in message.changes:
            changes.make(change, pool)
        self._tasks = [
            asyncio.create_task(self._follow()),
            asyncio.create_task(self._copy_metrics()),
        ]

    def ready(self) -> None:
        """Tell the parent that requests are served."""
        self._send(Ready())

    async def fail(self, message: str) -> None:
        """Tell the parent why this worker ends."""
        self._send(Failed(message))
        await self._writer.drain()

    async def leave(self) -> None:
        """Answer no more questions."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def make(self, change: changes.Change) -> None:
        """Make a change in all workers; returns when it holds everywhere."""
        await self._ask(MakeChange(change))

    def tell_file(self, wanted: tuple[changes.Change, ...]) -> None:
        """Have all workers, this one included, do what the file of instances says now."""
        self._tell(FileChanged(wanted))

    async def page(self) -> bytes:
        """Return the metrics of all workers together."""
        answers = await self._ask(ShowMetrics())
        return render(merge(answers.pages, least_of=Metrics.LEAST_OF))

    async def reports(self) -> list[Report]:
        """Return what the workers say of themselves; one that hangs is left out."""
        answers = await self._ask(ShowReports())
        return [_report_decoder.decode(report) for report in answers.reports]

    # Counts and news.

    def row(self, kind: str, name: str) -> Row:
        """Return the counts of something that all workers know by this name."""
        return self._board.row(key_of(kind, name))

    def siblings(self, role: Role) -> Siblings:
        """Return the other workers' parts of a stage."""
        return Siblings(self.row("stage", role.value))

    def tell_seen(self, base_url: str, digest: int, tokens: int) -> None:
        """Tell the others that an instance has seen the beginning of a prompt."""
        self._board.tell(News(key_of("instance", base_url), digest, tokens))

    def seen(self) -> list[tuple[str, int, int]]:
        """Return what the others have told since the last time, of instances known here."""
        news = list(self._board.news())
        if any(one.key not in self._urls for one in news):
            self._urls = {key_of("instance", one.base_url): one.base_url for one in self._pool}
        urls = self._urls
        return [(urls[key], digest, tokens) for key, digest, tokens in news if key in urls]

    def _forget(self, instance: Instance) -> None:
        """Take no more news of an instance, unless it is found in the pool again."""
        self._urls.pop(key_of("instance", instance.base_url), None)

    # The link.

    async def _next(self) -> ToWorker | None:
        data = await read_frame(self._reader)
        return None if data is None else _decoder.decode(data)

    async def _follow(self) -> None:
        try:
            while (message := await self._next()) is not None:
                if isinstance(message, Asked):
                    self._respond(message)
                elif isinstance(message, Answers):
                    future = self._waiting.pop(message.number, None)
                    if future is not None and not future.done():
                        future.set_result(message)
            logger.error("the router's parent process is gone: this worker stops")
        except Exception:
            logger.exception("what the router's parent process said failed: this worker stops")
        finally:  # nobody would restart a worker that does not hear what changes
            self._stop.set()
            for future in self._waiting.values():
                future.cancel()

    def _respond(self, asked: Asked) -> None:
        page: Page = ()
        report = b""
        match asked.question:
            case MakeChange(change):
                changes.make(change, self._pool)
            case FileChanged(wanted):
                if self._file is not None:
                    self._file.make(wanted)
                return
            case ShowMetrics():
                page = self._metrics.page(self._pool)
            case ShowReports():
                found = report_of(self._pool, self._metrics, self._stages)
                report = msgspec.msgpack.encode(found)
            case Doubt(url, tripped):
                self._pool.doubt(url, tripped=tripped)
                return
        self._send(Answer(asked.number, page, report))

    async def _copy_metrics(self) -> None:
        while True:
            await asyncio.sleep(METRICS_INTERVAL_S)
            self._send(Answer(None, self._metrics.page(self._pool)))

    def _tell_doubt(self, base_url: str, tripped: bool) -> None:  # noqa: FBT001 - a callback
        self._tell(Doubt(base_url, tripped))

    async def _ask(self, question: Question) -> Answers:
        future: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        number = self._tell(question)
        self._waiting[number] = future
        try:
            return await future
        finally:
            self._waiting.pop(number, None)

    def _tell(self, question: Question) -> int:
        self._next_number += 1
        self._send(Ask(self._next_number, question))
        return self._next_number

    def _send(self, message: ToParent) -> None:
        if not self._writer.is_closing():
            self._writer.write(framed(message))
