"""All instances are replaced, one after the other, while clients ask: nobody notices."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.engine.conftest import Reference
from tests.engine.deployment import metric, routed
from tests.engine.instances import Instance, enter_side_by_side, started
from tests.engine.workload import VOCAB, Answer, Case, ask, ask_all, completion

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ADMIN_KEY = "an-admin-key"
INTERVAL_S = 0.4
MAX_OPEN = 8  # so that a slow machine does not queue until requests time out
EVERY_LONG = 6  # one request in so many is a long stream
NUM_LONG_TOKENS = 240
DRAIN_TIMEOUT_S = 90.0
KV_TRANSFER: dict[str, Any] = {
    "kv_connector": "PDConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "fail",  # a hand-over that fails is to be seen
    "kv_connector_extra_config": {"lease_s": 10.0},
}


@dataclass
class Load:
    """Clients that ask at a steady rate, if the answers keep up, until told to stop."""

    url: str
    pairs: Iterator[tuple[Case, Answer]]
    failures: list[str] = field(default_factory=list)
    num_right: int = 0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_OPEN))

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            asyncio.TaskGroup() as requests,
        ):
            while not self.stopped.is_set():
                await self.slots.acquire()
                requests.create_task(self._one(session, *next(self.pairs)))
                await asyncio.sleep(INTERVAL_S)

    async def _one(self, session: aiohttp.ClientSession, case: Case, wanted: Answer) -> None:
        try:
            found = await ask(session, self.url, case)
        except (AssertionError, aiohttp.ClientError, OSError, ValueError) as exc:
            self.failures.append(f"{type(exc).__name__}: {exc}"[:500])
            return
        finally:
            self.slots.release()
        if found == wanted:
            self.num_right += 1
        else:
            self.failures.append(f"{found} instead of {wanted}"[:500])


@dataclass(frozen=True)
class Admin:
    """What an operator does to the router."""

    url: str
    session: aiohttp.ClientSession

    async def register(self, instance: Instance, role: str) -> None:
        await self._send("POST", "/admin/instances", {"url": instance.url, "role": role})

    async def drain(self, instance: Instance) -> None:
        found = await self.find(instance)
        assert found is not None
        await self._send("POST", f"/admin/instances/{found['id']}/drain")

    async def find(self, instance: Instance) -> dict[str, Any] | None:
        """Return what the router knows of an instance, or None if it has forgotten it."""
        answer = await self._send("GET", "/admin/instances")
        return next((one for one in answer["instances"] if one["url"] == instance.url), None)

    async def _send(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with self.session.request(
            method, self.url + path, json=body, headers=headers
        ) as response:
            answer = await response.json()
            assert response.status < 300, answer
            return answer


def start(folder: Path, model: Path, name: str, core: int) -> Any:
    args = ("--shutdown-timeout", "60")
    return started(folder, model, name, core=core, args=args, **KV_TRANSFER)


def test_instances_are_replaced_one_by_one_without_a_failed_request(
    model: Path, reference: Reference, tmp_path: Path
) -> None:
    key_file = tmp_path / "admin.key"
    key_file.write_text(ADMIN_KEY)
    key_file.chmod(0o600)
    names = ("prefill-old", "decode-old", "prefill-new", "decode-new")
    with ExitStack() as stack:
        # All before the load: on two cores, engines that serve leave little to those that start.
        instances = enter_side_by_side(
            stack, *(start(tmp_path, model, name, core % 2) for core, name in enumerate(names))
        )
        old, new = instances[:2], instances[2:]
        router = stack.enter_context(
            routed(tmp_path, old[0].url, old[1].url, admin_key_file=str(key_file))
        )
        load = asyncio.run(upgrade(router, old, new, reference.load))
        assert load.failures == []
        assert load.num_right >= 4 * EVERY_LONG
        for instance in new:
            assert metric(instance.url, "vllm:request_success_total") > 0
        name = "vllm:prompt_tokens_by_source_total"
        assert metric(new[1].url, name, source="external_kv_transfer") > 0
        assert [one.errors() for one in instances] == [[]] * 4


async def upgrade(
    router: str, old: list[Instance], new: list[Instance], short: list[tuple[Case, Answer]]
) -> Load:
    """Replace instances under load; return what the clients saw."""
    long = await long_requests(old[0].url)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        admin = Admin(router, session)
        load = Load(router, mixed(short, long))
        group.create_task(load.run())
        try:
            await until(lambda: load.num_right >= 2 * EVERY_LONG)
            for role, before, after in zip(("prefill", "decode"), old, new, strict=True):
                await replace(admin, role, before, after)
            num_right = load.num_right
            await until(lambda: load.num_right >= num_right + 2 * EVERY_LONG)
        finally:
            load.stopped.set()
    return load


async def replace(admin: Admin, role: str, old: Instance, new: Instance) -> None:
    """Put one instance in the place of another."""

    async def is_healthy() -> bool:
        found = await admin.find(new)
        return found is not None and found["state"] == "healthy"

    async def is_busy() -> bool:
        found = await admin.find(old)
        return found is not None and found["in_flight"] > 0

    async def is_forgotten() -> bool:
        return await admin.find(old) is None

    await admin.register(new, role)
    await until(is_healthy)
    await until(is_busy)  # or there would be nothing to wait for
    await admin.drain(old)
    await until(is_forgotten)
    old.terminate()
    assert await asyncio.to_thread(old.wait_exit, DRAIN_TIMEOUT_S) == 0


async def until(is_so: Callable[[], Any]) -> None:
    """Wait until a condition holds; it may be a coroutine function."""
    async with asyncio.timeout(DRAIN_TIMEOUT_S):
        while True:
            found = is_so()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.02)


async def long_requests(url: str) -> list[tuple[Case, Answer]]:
    """Return long streams and what an instance answers to them by itself."""
    rng = random.Random(17)
    prompts = [rng.choices(VOCAB, k=300) for _ in range(3)]
    cases = [completion(p, stream=True, max_tokens=NUM_LONG_TOKENS) for p in prompts]
    return list(zip(cases, await ask_all(url, cases, concurrency=3), strict=True))


def mixed(
    short: list[tuple[Case, Answer]], long: list[tuple[Case, Answer]]
) -> Iterator[tuple[Case, Answer]]:
    """Yield requests for ever; the short ones are streamed or not, with and without text."""
    shorts, longs = itertools.cycle(short), itertools.cycle(long)
    for number in itertools.count():
        yield next(longs if number % EVERY_LONG == 0 else shorts)
