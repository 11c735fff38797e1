"""Real vLLM under faults: every answer right or cleanly refused, every block free again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.engine.conftest import Reference
from tests.engine.deployment import Deployment, answers, deployed, metric
from tests.engine.test_serving import check_equal, log_of, wait_for
from tests.engine.workload import VOCAB, Answer, Case, ask, completion

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

FAULTS = "corrupt=0.2,drop=0.03,cut=0.05,delay=0.1:20ms,reorder=0.1,seed=7"
OUTCOMES = ("ok", "corrupt", "timeout", "peer_lost", "error", "incompatible")
LEASE_S = 5.0
NUM_ABORTED = 1000
CONCURRENCY = 32


def num_fetches(deployment: Deployment, outcome: str) -> float:
    (decode,) = deployment.decode
    return metric(decode, "vllm_pd:kv_fetches_total", outcome=outcome)


def check_accounts(deployment: Deployment) -> None:
    """All blocks are free, and every lease has ended."""
    deployment.wait_until_no_block_is_used(timeout_s=30)
    (prefill,) = deployment.prefill
    granted = metric(prefill, "vllm_pd:kv_leases_granted_total")
    assert metric(prefill, "vllm_pd:kv_leases_ended_total") == granted
    assert metric(prefill, "vllm_pd:kv_leases") == 0
    assert metric(prefill, "vllm_pd:kv_blocks_held") == 0


@pytest.fixture(scope="class")
def deployment(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    connector = {"digests": "always", "transfer_timeout_s": 1.5, "lease_s": LEASE_S}
    env = {"VLLM_PD_FAULTS": FAULTS}
    folder = tmp_path_factory.mktemp("run")
    with deployed(folder, model, connector=connector, env=env) as deployment:
        yield deployment


class TestFaultsInEveryTransfer:
    """One deployment whose transfers are dropped, delayed, cut and damaged all the while."""

    def test_all_answers_are_right_and_the_metrics_say_what_failed(
        self, deployment: Deployment, reference: Reference
    ) -> None:
        for name in ("prefill-0", "decode-0"):
            assert "faults are injected into all transfers" in log_of(deployment, name)
        expected = [*reference.equality[:30], *reference.load[:30]]
        check_equal(expected, deployment.router, concurrency=8)
        outcomes = {name: num_fetches(deployment, name) for name in OUTCOMES}
        assert outcomes["ok"] > 0, outcomes
        assert outcomes["corrupt"] > 0, outcomes
        assert outcomes["timeout"] + outcomes["peer_lost"] > 0, outcomes
        assert outcomes["incompatible"] == 0, outcomes
        check_accounts(deployment)

    def test_1000_aborted_requests_leak_nothing(
        self, deployment: Deployment, reference: Reference
    ) -> None:
        done = asyncio.run(abort_many(deployment.router, NUM_ABORTED))
        assert done.total() == NUM_ABORTED
        assert done["early"] > 100, done
        assert done["first byte"] > 100, done
        check_accounts(deployment)
        check_equal(reference.equality[:8], deployment.router, concurrency=4)
        check_accounts(deployment)

    def test_killed_decode_instance_costs_its_streams_and_nothing_else(
        self, deployment: Deployment, reference: Reference
    ) -> None:
        (prefill,) = deployment.prefill
        prefill_pid = deployment.status()["prefill-0"]["pid"]
        ends = asyncio.run(kill_decode_under_load(deployment, reference.load[:40]))
        assert ends["wrong"] == 0, ends
        assert ends["right"] > 0, ends
        # What it had not fetched is free again when its lease is over, at the latest.
        wait_for(lambda: metric(prefill, "vllm:kv_cache_usage_perc") == 0, timeout_s=LEASE_S + 10)
        wait_for(
            lambda: (
                deployment.status()["decode-0"]["num_restarts"] == 1
                and deployment.status()["decode-0"]["state"] == "ready"
            ),
            timeout_s=120,
        )
        wait_for(lambda: answers(f"{deployment.router}/ready"))
        # Enough, so that not all of them share a session that a fault cuts.
        check_equal(reference.equality[:32], deployment.router, concurrency=2)
        assert num_fetches(deployment, "ok") > 0
        assert deployment.status()["prefill-0"]["pid"] == prefill_pid
        check_accounts(deployment)


async def abort_many(url: str, count: int) -> Counter[str]:
    """Send requests and leave before they are answered; return how many left when."""
    rng = random.Random(31)
    gate = asyncio.Semaphore(CONCURRENCY)
    left: Counter[str] = Counter()

    async def one(session: aiohttp.ClientSession, case: Case, patience_s: float | None) -> None:
        async with gate:
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(patience_s),
                    session.post(url + case.path, json=case.body) as response,
                ):
                    assert response.status == 200, await response.text()
                    await response.content.readany()
                    left["first byte"] += 1
                    return
            left["early"] += 1

    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for number in range(count):
            prompt = rng.choices(VOCAB, k=rng.choice((20, 140, 260)))
            case = completion(prompt, stream=True, max_tokens=200)
            patience_s = None if number % 3 == 0 else rng.random() * 0.3
            group.create_task(one(session, case, patience_s))
    return left


async def kill_decode_under_load(
    deployment: Deployment, expected: list[tuple[Case, Answer]]
) -> Counter[str]:
    """Kill the decode instance while requests are in all stages; return how they ended."""
    ends: Counter[str] = Counter()

    async def one(session: aiohttp.ClientSession, case: Case, wanted: Answer) -> None:
        try:
            ends["right" if await ask(session, deployment.router, case) == wanted else "wrong"] += 1
        except AssertionError as exc:
            ends["clean" if is_clean(str(exc)) else "wrong"] += 1
            if not is_clean(str(exc)):
                print(exc)  # noqa: T201 - shown if the test fails

    async with aiohttp.ClientSession() as session:
        tasks = []
        for number, (case, wanted) in enumerate(expected):
            tasks.append(asyncio.create_task(one(session, case, wanted)))
            await asyncio.sleep(0.02)
            if number == len(expected) // 2:
                await asyncio.to_thread(deployment.cli, "fault", "kill", "decode-0")
        await asyncio.gather(*tasks)
    return ends


def is_clean(text: str) -> bool:
    """Return whether an answer says by itself that it is an error of the service."""
    return bool(re.search(r"""['"]code['"]: ?50\d""", text))
