"""Another connector behind our router: vLLM's NixlConnector, between two CPU instances.

``tests/run.sh`` installs NIXL beside the engine's packages.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.engine.conftest import Reference
from tests.engine.deployment import REPO, get, metric, routed
from tests.engine.instances import Instance, enter_side_by_side, started
from tests.engine.test_faults import abort_many
from tests.engine.test_serving import check_equal, wait_for
from tests.engine.workload import Answer, Case, ask
from tests.ports import free_ports

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

PACKAGES = Path(sys.prefix) / "nixl"
LEASE_S = 6
NUM_ABORTED = 90
KV_TRANSFER: dict[str, Any] = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"kv_lease_duration": LEASE_S},
}


@dataclass(frozen=True)
class Service:
    """Two instances with NixlConnector, and our router."""

    router: str
    prefill: Instance
    decode: Instance

    def prompt_tokens(self, source: str) -> float:
        return metric(self.decode.url, "vllm:prompt_tokens_by_source_total", source=source)

    def served_by(self, path: str) -> float:
        text = get(f"{self.router}/metrics")
        name = "vllm_pd:router_requests_total{"
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines if f'path="{path}"' in line)

    def wait_until_no_block_is_used(self, timeout_s: float) -> None:
        urls = (self.prefill.url, self.decode.url)
        name = "vllm:kv_cache_usage_perc"
        wait_for(lambda: not any(metric(url, name) for url in urls), timeout_s=timeout_s)


def nixl_env(port: int) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join((str(PACKAGES), str(REPO))),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
        "NIXL_LOG_LEVEL": "WARN",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }


@pytest.fixture(scope="module")
def service(
    model: Path,
    reference: Reference,  # noqa: ARG001 - made first: idle NIXL instances take a core each
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    if not PACKAGES.exists():
        pytest.skip(f"no NIXL in {PACKAGES}: bash tests/run.sh installs it")
    folder = tmp_path_factory.mktemp("nixl")
    ports = free_ports(2)
    with ExitStack() as stack:
        prefill, decode = enter_side_by_side(
            stack,
            *(
                started(folder, model, name, core=core, env=nixl_env(ports[core]), **KV_TRANSFER)
                for core, name in enumerate(("prefill", "decode"))
            ),
        )
        # Room to prefill for all that it may have to when the prefill instance is gone.
        options = {"max_local_prefill_tokens": 100_000}
        router = stack.enter_context(routed(folder, prefill.url, decode.url, **options))
        yield Service(router, prefill, decode)


def sample(reference: Reference) -> list[tuple[Case, Answer]]:
    """Every third case: token ids, text and chat, streamed and not, of all lengths."""
    cases = [*reference.equality[::3], *reference.equality[-6:]]
    assert {case.body["stream"] for case, _ in cases} == {True, False}
    assert len({case.path for case, _ in cases}) == 2
    return cases


def test_answers_equal_those_of_a_colocated_instance_and_the_kv_cache_came_over_nixl(
    service: Service, reference: Reference
) -> None:
    expected = sample(reference)
    check_equal(expected, service.router, concurrency=4)
    total = sum(answer.num_prompt_tokens for _, answer in expected)
    # Some prompts share prefixes, which are cached by then. Of every prompt the last token is
    # computed where it is decoded, and a prompt of one block or less may be all of that.
    assert service.prompt_tokens("external_kv_transfer") > 0.75 * total
    assert service.prompt_tokens("local_compute") <= len(expected)
    assert service.served_by("disaggregated") == len(expected)
    assert service.served_by("decode-only") == 0
    assert metric(service.decode.url, "vllm:nixl_bytes_transferred_sum") > 0


def test_clients_that_leave_at_any_time_do_no_harm(service: Service, reference: Reference) -> None:
    left = asyncio.run(abort_many(service.router, NUM_ABORTED))
    assert left.total() == NUM_ABORTED
    assert left["early"] > 10, left
    assert left["first byte"] > 10, left
    # What was prefilled for nobody is free once NIXL's own lease is over: it has no release.
    service.wait_until_no_block_is_used(timeout_s=3 * LEASE_S)
    check_equal(sample(reference)[:6], service.router, concurrency=2)


def test_prefill_that_cannot_be_fetched_is_recomputed_by_the_decode_instance(
    service: Service, reference: Reference
) -> None:
    case, wanted = next(
        (case, answer)
        for case, answer in reference.load
        if answer.num_prompt_tokens > 400 and not case.body["stream"]
    )
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[1, 2, 3, 4]],
        "remote_engine_id": "gone",
        "remote_request_id": "cmpl-gone",
        "remote_host": "127.0.0.1",
        "remote_port": free_ports(1)[0],
        "remote_num_tokens": wanted.num_prompt_tokens,
        "tp_size": 1,
    }
    before = service.prompt_tokens("local_compute")
    direct = Case(case.path, {**case.body, "kv_transfer_params": params})

    async def send() -> Answer:
        async with aiohttp.ClientSession() as session:
            return await ask(session, service.decode.url, direct)

    assert asyncio.run(send()) == wanted
    assert service.prompt_tokens("local_compute") > before + 100


def test_killed_prefill_instance_costs_no_request(service: Service, reference: Reference) -> None:
    """The last test: nobody starts it again."""
    expected = [pair for pair in reference.load[:60] if pair[1].num_prompt_tokens > 100]

    async def send() -> list[Answer]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=200)) as session:
            tasks = []
            for number, (case, _) in enumerate(expected):
                tasks.append(asyncio.create_task(ask(session, service.router, case)))
                await asyncio.sleep(0.05)
                if number == len(expected) // 2:
                    service.prefill.kill()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(send())
    assert answers == [answer for _, answer in expected]
    assert service.served_by("decode-only") > 0
