"""The state that the dashboard shows, and how it is served."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import KV_PARAMS, Client, FakeInstance, Streams, answers, drops
from vllm_pd.router.activity import NUM_SLICES

BODY = {"model": "m", "prompt": "hi"}


async def state(router: Client) -> dict[str, Any]:
    async with router.get("/dashboard/state") as response:
        assert response.status == 200
        assert response.headers["Cache-Control"] == "no-store"
        found: dict[str, Any] = await response.json()
        return found


async def post(router: Client, **fields: Any) -> int:
    async with router.post("/v1/completions", json=BODY | fields) as response:
        await response.read()
        return response.status


def stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [one for one in found["stages"] if one["name"] == name]
    return dict(one)


async def test_the_page_may_run_its_own_script_and_nothing_else(router: Client) -> None:
    async with router.get("/dashboard") as response:
        assert response.content_type == "text/html"
        page, policy = await response.text(), response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()) for one in scripts]
    assert [f"script-src 'sha256-{digest.decode()}'" in policy for digest in digests] == [True]


async def test_the_page_names_no_other_place(router: Client) -> None:
    async with router.get("/dashboard") as response:
        page = await response.text()
    addresses = set(re.findall(r"https?://[\w.]+", page))
    assert addresses == {"http://www.w3.org"}  # of a namespace, which nobody fetches
    assert not re.findall(r"\sstyle=|\son\w+=|innerHTML|@import|url\(", page)


async def test_instances_are_told_as_the_router_sees_them(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    found = await state(router)
    assert found["ready"] is True
    assert [(one["url"], one["role"], one["state"]) for one in found["instances"]] == [
        (prefill.url, "prefill", "healthy"),
        (decode.url, "decode", "healthy"),
    ]
    assert found["instances"][0]["breaker"] == "closed"


async def test_requests_are_counted_by_status_and_path(router: Client) -> None:
    assert await post(router) == 200
    requests = (await state(router))["requests"]
    assert requests["code"] == {"200": 1}
    assert requests["path"] == {"disaggregated": 1}
    assert requests["num_errors"] == requests["in_flight"] == 0
    assert sum(requests["series"]) == 1
    assert [one for one in requests["disaggregated_series"] if one is not None] == [1.0]
    assert requests["per_s"] > 0


async def test_stages_have_percentiles_and_a_series(router: Client) -> None:
    await post(router)
    prefill = stage(await state(router), "prefill")
    assert prefill["num"] == 1
    assert 0 < prefill["p50"] <= prefill["p90"] <= prefill["p99"] < 60
    assert len(prefill["series"]) == NUM_SLICES
    assert [one for one in prefill["series"] if one is not None]


async def test_a_stage_that_nobody_passed_has_no_percentiles(router: Client) -> None:
    handover = stage(await state(router), "kv_handover")
    assert (handover["num"], handover["p50"], handover["p99"]) == (0, None, None)


async def test_only_streams_have_a_first_token(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([b"data: [DONE]\n\n"]))
    router = await start_router([prefill], [decode])
    await post(router, stream=True)
    assert stage(await state(router), "first_token")["num"] == 1


async def test_whole_answers_have_no_first_token(router: Client) -> None:
    await post(router)
    assert stage(await state(router), "first_token")["num"] == 0


async def test_failures_are_told_at_the_instance_and_as_errors(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    router = await start_router([prefill], [await start_instance(drops)])
    assert await post(router) == 502
    found = await state(router)
    (decode,) = [one for one in found["instances"] if one["role"] == "decode"]
    assert decode["num_failed"] == 1
    assert "BrokenAnswerError" in decode["last_failure"]
    assert decode["failed_ago_s"] >= 0
    assert found["requests"]["num_errors"] == 1


async def test_reasons_not_to_disaggregate_are_counted(router: Client) -> None:
    await post(router, echo=True)
    assert (await state(router))["requests"]["decode_only"] == {"echo": 1}


async def test_prompt_tokens_that_were_handed_over_are_counted(
    start_router: StartRouter, start_instance: StartInstance, decode: FakeInstance
) -> None:
    usage = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 16}}
    params = KV_PARAMS | {"remote_num_tokens": 40}
    prefill = await start_instance(answers(200, {"kv_transfer_params": params, "usage": usage}))
    router = await start_router([prefill], [decode])
    await post(router)
    tokens = (await state(router))["requests"]["prompt_tokens"]
    assert tokens == {"handed_over": 40, "cached": 16}


async def test_load_and_model_are_those_of_the_instance(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    decode.metrics = "".join(
        f'\nvllm:{name}{{engine="0",model_name="a\\"b"}} {value}'
        for name, value in [
            ("num_requests_running", 3),
            ("num_requests_waiting", 1),
            ("kv_cache_usage_perc", 0.5),
        ]
    )
    router = await start_router([prefill], [decode], health_interval_s=0.01)
    while (one := (await state(router))["instances"][1])["load"] is None:
        pass
    assert one["load"] == {"num_running": 3, "num_waiting": 1, "kv_usage": 0.5}
    assert one["model"] == 'a"b'


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/state"])
async def test_it_is_as_open_as_the_metrics(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    tmp_path: Path,
    path: str,
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: ann, key: k-ann}\n")
    keys.chmod(0o600)
    router = await start_router([prefill], [decode], api_keys_file=str(keys))
    for one in ("/metrics", path):
        async with router.get(one) as response:
            assert response.status == 200
