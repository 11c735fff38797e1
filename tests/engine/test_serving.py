"""The main job, on real vLLM: prefill here, decode there, the same answer as anywhere.

Each class is one deployment, started once. The colocated instance of ``reference``
has no connector and no router.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.engine.conftest import BAD_REQUESTS, Reference, post_bad_requests
from tests.engine.deployment import Deployment, answers, deployed, get, metric, routed, served
from tests.engine.workload import VOCAB, Answer, Case, ask, ask_all, completion
from vllm_pd.transport.threads import PREFIX

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

HISTOGRAMS = (
    "fetch_seconds",
    "handshake_seconds",
    "transfer_seconds",
    "verify_seconds",
    "fetch_bytes",
    "fetch_bandwidth_bytes_per_second",
)
"""Of successful fetches, in the metrics of a decode instance."""


def check_equal(expected: list[tuple[Case, Answer]], url: str, *, concurrency: int) -> None:
    answers = asyncio.run(ask_all(url, [case for case, _ in expected], concurrency=concurrency))
    different = [
        f"{case.path} of {wanted.num_prompt_tokens} tokens: {answer} instead of {wanted}"
        for (case, wanted), answer in zip(expected, answers, strict=True)
        if answer != wanted
    ]
    assert not different, f"{len(different)} of {len(answers)} differ: {different}"


def check_that_kv_moved(
    deployment: Deployment, expected: list[tuple[Case, Answer]], before: dict[str, float]
) -> None:
    """All prompt tokens but the last came from outside, or from what came before."""
    after = deployment.tokens_by_source()
    moved = {source: after[source] - before[source] for source in after}
    total = sum(answer.num_prompt_tokens for _, answer in expected)
    assert sum(moved.values()) == total, moved
    assert moved["local_compute"] <= len(expected), moved
    # Prompts that repeat others' prefixes are partly cached on the decode side by now.
    assert moved["external_kv_transfer"] > 0.75 * total, moved


@pytest.fixture(scope="class")
def deployment(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("run"), model) as deployment:
        yield deployment


class TestOnePrefillOneDecode:
    """The default deployment; ``auto`` picks shared memory."""

    def test_answers_equal_those_of_a_colocated_instance(
        self, deployment: Deployment, reference: Reference
    ) -> None:
        assert len(reference.equality) >= 40
        before = deployment.tokens_by_source()
        check_equal(reference.equality, deployment.router, concurrency=8)
        check_that_kv_moved(deployment, reference.equality, before)
        assert "over shm" in log_of(deployment, "decode-0")
        deployment.wait_until_no_block_is_used()

    def test_metrics_tell_what_was_transferred(self, deployment: Deployment) -> None:
        (prefill,), (decode,) = deployment.prefill, deployment.decode
        num_fetches = metric(decode, "vllm_pd:kv_fetches_total", outcome="ok")
        num_bytes = metric(decode, "vllm_pd:kv_fetched_bytes_total", transport="shm")
        assert num_fetches > 0
        assert num_bytes > 0
        assert metric(decode, "vllm_pd:kv_fetches_total") == num_fetches, "some failed"
        for name in HISTOGRAMS:
            assert metric(decode, f"vllm_pd:kv_{name}_count") == num_fetches, name
        assert metric(decode, "vllm_pd:kv_saved_bytes_total") > 0, "prompts share prefixes"
        assert metric(decode, "vllm_pd:kv_transport_info", transport="shm", mode="memfd") == 1
        assert metric(prefill, "vllm_pd:kv_sent_bytes_total") == num_bytes
        num_granted = metric(prefill, "vllm_pd:kv_leases_granted_total")
        assert num_granted >= num_fetches
        assert metric(prefill, "vllm_pd:kv_leases_ended_total") == num_granted
        assert metric(prefill, "vllm_pd:kv_leases") == 0
        assert metric(prefill, "vllm_pd:kv_blocks_held") == 0

    def test_decode_instance_tells_where_the_time_went_if_asked(
        self, deployment: Deployment
    ) -> None:
        case = completion(random.Random(23).choices(VOCAB, k=700), stream=False, max_tokens=1)
        (prefill,), (decode,) = deployment.prefill, deployment.decode
        first = post(prefill, case, kv_transfer_params={"do_remote_decode": True})
        params = {**first["kv_transfer_params"], "timeline": True}
        second = post(decode, case, kv_transfer_params=params)
        assert second["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
        timeline = second["kv_transfer_params"]["timeline"]
        assert (timeline["outcome"], timeline["transport"]) == ("ok", "shm")
        assert timeline["num_bytes"] > 0
        stages = sum(timeline[stage] for stage in ("handshake_s", "queued_s", "transfer_s"))
        assert 0 < timeline["transfer_s"] <= stages <= timeline["total_s"] + 1e-5
        assert 0 <= timeline["verify_s"] <= timeline["transfer_s"]

    def test_200_requests_at_16_in_flight_lose_and_leak_nothing(
        self, deployment: Deployment, reference: Reference
    ) -> None:
        check_equal(reference.load, deployment.router, concurrency=16)
        deployment.wait_until_no_block_is_used()

    @pytest.mark.parametrize("name", list(BAD_REQUESTS))
    def test_bad_requests_are_answered_as_vllm_does(
        self, deployment: Deployment, reference: Reference, name: str
    ) -> None:
        found = asyncio.run(post_bad_requests(deployment.router))[name]
        assert found == reference.errors[name]

    def test_client_that_leaves_stops_both_legs(self, deployment: Deployment) -> None:
        case = completion([12] * 700, stream=True, max_tokens=2000)

        async def leave() -> None:
            async with (
                aiohttp.ClientSession() as session,
                session.post(deployment.router + case.path, json=case.body) as response,
            ):
                await response.content.readany()

        asyncio.run(leave())
        for url in deployment.prefill + deployment.decode:
            wait_for(lambda url=url: metric(url, "vllm:num_requests_running") == 0)
        deployment.wait_until_no_block_is_used()

    def test_idle_threads_use_no_cpu(self, deployment: Deployment) -> None:
        threads = our_threads(deployment)
        names = {name for name, _ in threads.values()}
        assert {f"{PREFIX}session"[:15], f"{PREFIX}inst", f"{PREFIX}auth"} <= names, names
        time.sleep(1)
        before, started = our_threads(deployment), time.monotonic()
        time.sleep(10)
        after, elapsed = our_threads(deployment), time.monotonic() - started
        used = {
            key: (name, (ticks - before[key][1]) / os.sysconf("SC_CLK_TCK") / elapsed)
            for key, (name, ticks) in after.items()
            if key in before
        }
        assert sum(share for _, share in used.values()) < 0.01, used

    def test_router_reports_itself(self, deployment: Deployment) -> None:
        assert '"m"' in get(f"{deployment.router}/v1/models")
        get(f"{deployment.router}/health")
        get(f"{deployment.router}/ready")


class TestTcp:
    """Shared memory is there, but not used."""

    def test_answers_equal_those_of_a_colocated_instance(
        self, model: Path, reference: Reference, tmp_path: Path
    ) -> None:
        with deployed(tmp_path, model, connector={"transport": "tcp"}) as deployment:
            before = deployment.tokens_by_source()
            check_equal(reference.equality, deployment.router, concurrency=8)
            check_that_kv_moved(deployment, reference.equality, before)
            assert "over tcp" in log_of(deployment, "decode-0")
            check_equal(reference.load, deployment.router, concurrency=16)
            deployment.wait_until_no_block_is_used()


class TestOnePrefillTwoDecodes:
    def test_answers_equal_those_of_a_colocated_instance(
        self, model: Path, reference: Reference, tmp_path: Path
    ) -> None:
        with deployed(tmp_path, model, num_decode=2) as deployment:
            before = deployment.tokens_by_source()
            check_equal(reference.equality, deployment.router, concurrency=8)
            check_that_kv_moved(deployment, reference.equality, before)
            for url in deployment.decode:
                assert metric(url, "vllm:request_success_total") > 0
            check_equal(reference.load, deployment.router, concurrency=16)
            deployment.wait_until_no_block_is_used()


class TestUnequalTensorParallelism:
    """Every decode rank fetches the heads it needs from the prefill ranks that hold them."""

    @pytest.mark.parametrize("tp", [(2, 1), (1, 2)], ids=["2 to 1", "1 to 2"])
    def test_answers_equal_those_of_a_colocated_instance(
        self, model: Path, reference: Reference, tmp_path: Path, tp: tuple[int, int]
    ) -> None:
        with deployed(tmp_path, model, tp=tp) as deployment:
            before = deployment.tokens_by_source()
            check_equal(reference.equality, deployment.router, concurrency=4)
            check_that_kv_moved(deployment, reference.equality, before)
            deployment.wait_until_no_block_is_used()


class TestByHand:
    """Plain ``vllm serve`` twice and ``vllm-pd router``, as the README shows it."""

    def test_flipped_bytes_change_the_answer(
        self, model: Path, reference: Reference, tmp_path: Path
    ) -> None:
        """The equality tests have teeth: damage in one block of a transfer shows."""
        case, wanted = next(
            (case, answer) for case, answer in reference.equality if answer.num_prompt_tokens == 512
        )
        plugin: dict[str, Any] = {"kv_connector": "PDConnector", "kv_role": "kv_both"}
        corrupting: dict[str, Any] = {
            "kv_connector": "CorruptingConnector",
            "kv_connector_module_path": "tests.engine.corrupting_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"digests": "off"},  # they would find it
        }
        with contextlib.ExitStack() as stack:
            prefill = stack.enter_context(served(tmp_path, model, name="prefill", core=0, **plugin))
            decode = stack.enter_context(
                served(tmp_path, model, name="decode", core=1, **corrupting)
            )
            router = stack.enter_context(routed(tmp_path, prefill, decode))
            wait_for(lambda: answers(f"{router}/ready"))
            (damaged,) = asyncio.run(ask_all(router, [case], concurrency=1))
            name = "vllm:prompt_tokens_by_source_total"
            assert metric(decode, name, source="external_kv_transfer") >= 511
            assert damaged.token_ids != wanted.token_ids
            # The same instance, asked alone, is right: it was the transfer.
            (alone,) = asyncio.run(ask_all(prefill, [case], concurrency=1))
            assert alone == wanted


class TestPrefillInstanceKilled:
    def test_requests_in_flight_are_answered_and_the_service_recovers(
        self, model: Path, reference: Reference, tmp_path: Path
    ) -> None:
        with deployed(tmp_path, model) as deployment:
            decode_pid = deployment.status()["decode-0"]["pid"]
            outcomes = asyncio.run(kill_under_load(deployment, reference.load[:40]))
            assert outcomes["wrong"] == []
            assert outcomes["right"]
            # Not a speed test: a request that hangs on the dead instance would show here.
            assert max(outcomes["right"] + outcomes["clean"]) < 10
            wait_for(
                lambda: (
                    deployment.status()["prefill-0"]["num_restarts"] == 1
                    and deployment.status()["prefill-0"]["state"] == "ready"
                ),
                timeout_s=120,
            )
            # The supervisor has seen it; so must the router, at its next probe.
            wait_for(lambda: answers(f"{deployment.router}/ready"))
            before = deployment.tokens_by_source()
            check_equal(reference.equality[:12], deployment.router, concurrency=4)
            moved = deployment.tokens_by_source()
            assert moved["external_kv_transfer"] > before["external_kv_transfer"]
            assert deployment.status()["decode-0"]["pid"] == decode_pid
            deployment.wait_until_no_block_is_used()


async def kill_under_load(
    deployment: Deployment, expected: list[tuple[Case, Answer]]
) -> dict[str, list[Any]]:
    """Kill the prefill instance's whole process group while requests are in all stages.

    Returns:
        Seconds from the kill to the end of each request that was right or got a
        clean 5xx, and what was neither.
    """
    outcomes: dict[str, list[Any]] = {"right": [], "clean": [], "wrong": []}
    pid = deployment.status()["prefill-0"]["pid"]
    killed = asyncio.Event()
    killed_at = 0.0

    async def one(session: aiohttp.ClientSession, case: Case, wanted: Answer) -> None:
        try:
            answer = await ask(session, deployment.router, case)
        except AssertionError as exc:
            kind = "clean" if re.search(r"""['"]code['"]: ?50\d""", str(exc)) else "wrong"
            outcomes[kind].append(str(exc) if kind == "wrong" else time.monotonic() - killed_at)
            return
        if killed.is_set():
            outcomes["right" if answer == wanted else "wrong"].append(
                time.monotonic() - killed_at if answer == wanted else answer
            )

    async with aiohttp.ClientSession() as session:
        tasks = []
        for index, (case, wanted) in enumerate(expected):
            tasks.append(asyncio.create_task(one(session, case, wanted)))
            await asyncio.sleep(0.02)
            if index == len(expected) // 2:
                os.killpg(pid, signal.SIGKILL)
                killed_at = time.monotonic()
                killed.set()
        await asyncio.gather(*tasks)
    return outcomes


def wait_for(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.1)


def post(url: str, case: Case, **extra: Any) -> dict[str, Any]:
    """Send one leg of a request by hand."""

    async def send() -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + case.path, json={**case.body, **extra}) as response,
        ):
            payload: dict[str, Any] = await response.json()
            assert response.status == 200, payload
            return payload

    return asyncio.run(send())


def log_of(deployment: Deployment, name: str) -> str:
    return (deployment.run_dir / "logs" / f"{name}.log").read_text()


def our_threads(deployment: Deployment) -> dict[tuple[int, int], tuple[str, int]]:
    """Return name and CPU ticks of our threads in all processes of the instances."""
    leaders = {entry["pid"] for entry in deployment.status().values()}
    threads: dict[tuple[int, int], tuple[str, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        pid = int(stat.parent.name)
        try:
            if os.getpgid(pid) not in leaders:
                continue
            for task in (stat.parent / "task").iterdir():
                name = (task / "comm").read_text().strip()
                if name.startswith(PREFIX):
                    fields = (task / "stat").read_text().rpartition(")")[2].split()
                    threads[pid, int(task.name)] = name, int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return threads
