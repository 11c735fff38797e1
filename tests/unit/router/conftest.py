from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.unit.router.fakes import (
    Behaviour,
    Client,
    FakeInstance,
    completes,
    prefills,
    start_client,
)

StartInstance = Callable[[Behaviour], Awaitable[FakeInstance]]
StartRouter = Callable[..., Awaitable[Client]]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def start_instance(stack: AsyncExitStack) -> StartInstance:
    async def start(behave: Behaviour) -> FakeInstance:
        return await stack.enter_async_context(FakeInstance(behave))

    return start


@pytest.fixture
def start_router(stack: AsyncExitStack) -> StartRouter:
    async def start(*args: object, **options: object) -> Client:
        client = await start_client(*args, **options)  # type: ignore[arg-type]
        stack.push_async_callback(client.close)
        return client

    return start


@pytest.fixture
async def prefill(start_instance: StartInstance) -> FakeInstance:
    return await start_instance(prefills)


@pytest.fixture
async def decode(start_instance: StartInstance) -> FakeInstance:
    return await start_instance(completes)


@pytest.fixture
async def router(start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance) -> Client:
    return await start_router([prefill], [decode])
