"""Questions of one worker to all of them, as the parent passes them on. Pure.

All workers get all questions in the same order, so that changes of who belongs to the
router end the same everywhere. Whoever asked hears of it when everybody has answered,
has died or has been given up, so that a change that was confirmed holds everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_pd.router.workers.changes import Add, Change, with_change
from vllm_pd.router.workers.merge import Page, merge, what_stays
from vllm_pd.router.workers.messages import (
    Answers,
    Ask,
    Asked,
    Doubt,
    FileChanged,
    MakeChange,
    ShowMetrics,
    ToWorker,
    Welcome,
)

Outgoing = list[tuple[int, ToWorker]]
"""Messages, each with the number of the worker that is to get it."""


@dataclass(slots=True)
class _Open:
    """A question that is not answered by all.

    Attributes:
        origin: who asked.
        its_number: of the question, as the origin counts.
        waits_for: who has not answered.
        is_metrics: whether it asks for the metrics.
        reports: that have come, if it asks for them.
    """

    origin: int
    its_number: int
    waits_for: set[int]
    is_metrics: bool = False
    reports: list[bytes] = field(default_factory=list)


class Hub:
    """The members, the questions that are open, and what has to be remembered of both.

    Args:
        configured: ids of the instances that every worker begins with.
    """

    def __init__(self, configured: Iterable[str] = ()) -> None:
        self._configured = frozenset(configured)
        self._in_file: set[str] = set()
        self._members: set[int] = set()
        self._history: tuple[Change, ...] = ()
        self._open: dict[int, _Open] = {}
        self._next_number = 0
        self._last: dict[int, Page] = {}  # metrics of the members
        self._gone: Page = ()  # metrics of those that were, together

    def join(self, worker: int, in_file: Iterable[str] = ()) -> Outgoing:
        """Take a worker in, with what it has from the file; from now on it gets all questions."""
        self._members.add(worker)
        self._in_file = set(in_file)
        return [(worker, Welcome(self._history))]

    def ask(self, origin: int, ask: Ask) -> tuple[int | None, Outgoing]:
        """Put a worker's question to all; return its number, by which it can be given up."""
        question = ask.question
        if isinstance(question, MakeChange):
            self._remember(question.change)
        if isinstance(question, FileChanged):
            for change in question.changes:
                self._note_in_file(change)
                self._remember(change)
            return None, [(worker, Asked(0, question)) for worker in sorted(self._members)]
        if isinstance(question, Doubt):  # nobody waits for an answer
            others = sorted(self._members - {origin})
            return None, [(worker, Asked(0, question)) for worker in others]
        self._next_number += 1
        number = self._next_number
        self._open[number] = _Open(
            origin, ask.number, set(self._members), isinstance(question, ShowMetrics)
        )
        return number, [(worker, Asked(number, question)) for worker in sorted(self._members)]

    def answer(self, worker: int, number: int | None, page: Page, report: bytes = b"") -> Outgoing:
        """Take an answer; an unknown number is that of a question that was given up."""
        if page:
            self._last[worker] = page
        if number is None:
            return []
        question = self._open.get(number)
        if report and question is not None and worker in question.waits_for:
            question.reports.append(report)
        return self._done(number, worker)

    def lost(self, worker: int) -> Outgoing:
        """Take a worker out; nobody waits for it any more."""
        self._members.discard(worker)
        if page := self._last.pop(worker, None):
            self._gone = merge([self._gone, what_stays(page)])
        outgoing: Outgoing = []
        for number, question in list(self._open.items()):
            if question.origin == worker:
                del self._open[number]
            else:
                outgoing += self._done(number, worker)
        return outgoing

    def give_up(self, number: int) -> tuple[set[int], Outgoing]:
        """End a question that takes too long; return who has not answered."""
        question = self._open.get(number)
        if question is None:
            return set(), []
        silent = set(question.waits_for)
        outgoing: Outgoing = []
        for worker in silent:
            outgoing += self._done(number, worker)
        return silent, outgoing

    def _note_in_file(self, change: Change) -> None:
        if isinstance(change, Add):
            self._in_file.add(change.name)
        else:
            self._in_file.discard(change.name)

    def _remember(self, change: Change) -> None:
        known = self._configured | self._in_file
        self._history = with_change(self._history, change, known=known)

    def _done(self, number: int, worker: int) -> Outgoing:
        question = self._open.get(number)
        if question is None or worker not in question.waits_for:
            return []
        question.waits_for.discard(worker)
        if question.waits_for:
            return []
        del self._open[number]
        pages = (*self._last.values(), self._gone) if question.is_metrics else ()
        return [(question.origin, Answers(question.its_number, pages, tuple(question.reports)))]
