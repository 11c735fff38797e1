"""Connections of clients, as long as they are open and not much longer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from vllm_pd.router.newcomers import Newcomers

if TYPE_CHECKING:
    from aiohttp import web


@dataclass(eq=False)
class FakeConnection:
    """A connection of a client."""

    transport: asyncio.Transport | None = field(default_factory=asyncio.Transport)


@dataclass
class FakeRequest:
    """A request on a connection."""

    protocol: FakeConnection = field(default_factory=FakeConnection)


def note(newcomers: Newcomers, request: FakeRequest) -> None:
    newcomers.note(cast("web.Request", request))


def test_connections_that_are_closed_are_not_kept_however_many_there_were() -> None:
    newcomers = Newcomers()
    for _ in range(10_000):
        request = FakeRequest()
        note(newcomers, request)
        request.protocol.transport = None
    assert newcomers.num_known < 1_000


def test_connections_that_are_open_are_kept_however_many_there_are() -> None:
    newcomers = Newcomers()
    for _ in range(5_000):
        note(newcomers, FakeRequest())
    assert newcomers.num_known == 5_000
