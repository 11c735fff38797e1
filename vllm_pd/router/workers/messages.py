"""What parent and workers write to each other, over a socket pair that only they have."""

from __future__ import annotations

import asyncio

import msgspec

from vllm_pd.config import RouterConfig
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.router.workers.changes import Change
from vllm_pd.router.workers.merge import Page

_LENGTH_LEN = 4
MAX_LEN = 64 * 1024 * 1024


class MakeChange(msgspec.Struct, frozen=True, tag=True):
    """To all: change who belongs to the router. The answer says that it is done."""

    change: Change


class FileChanged(msgspec.Struct, frozen=True, tag=True):
    """To all: the file of instances says so now. Nobody waits for an answer."""

    changes: tuple[Change, ...]


class ShowMetrics(msgspec.Struct, frozen=True, tag=True):
    """To all: answer with your metrics."""


class ShowReports(msgspec.Struct, frozen=True, tag=True):
    """To all: answer with a report, for the dashboard."""


class Doubt(msgspec.Struct, frozen=True, tag=True):
    """To all: requests have failed on an instance.

    Attributes:
        url: its base URL.
        tripped: so many that it gets none for a while.
    """

    url: str
    tripped: bool


Question = MakeChange | FileChanged | ShowMetrics | ShowReports | Doubt


class Start(msgspec.Struct, frozen=True, tag=True):
    """Parent to worker, first of all: what to be."""

    config: RouterConfig
    index: int


class Join(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent: ready for questions.

    Attributes:
        in_file: ids of the instances that it has from the file of instances.
    """

    in_file: tuple[str, ...] = ()


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Parent to worker: what has changed since the configuration; questions follow."""

    changes: tuple[Change, ...]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent: requests are served."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent, last of all: it cannot serve."""

    message: str


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent: put a question to all workers, this one included."""

    number: int
    question: Question


class Asked(msgspec.Struct, frozen=True, tag=True):
    """Parent to worker: a question, in the same order to all."""

    number: int
    question: Question


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent: the question is answered, or done; also metrics without a question.

    Attributes:
        report: as the worker has written it, for the one that asked.
    """

    number: int | None
    page: Page = ()
    report: bytes = b""


class Answers(msgspec.Struct, frozen=True, tag=True):
    """Parent to worker: what all workers answered to its question.

    Attributes:
        reports: of those that have answered.
    """

    number: int
    pages: tuple[Page, ...] = ()
    reports: tuple[bytes, ...] = ()


ToWorker = Start | Welcome | Asked | Answers
ToParent = Join | Ready | Failed | Ask | Answer


def framed(message: ToWorker | ToParent) -> bytes:
    """Return a message as it is written."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(_LENGTH_LEN, "big") + data


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Return the next message, not decoded; None if there will be no more.

    Raises:
        RemoteProtocolError: what comes is no message.
    """
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_LEN), "big")
        if length > MAX_LEN:
            raise RemoteProtocolError(f"a message of {length} bytes between router processes")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
