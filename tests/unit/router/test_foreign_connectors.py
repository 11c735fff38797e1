"""The router hands over what other connectors answer, of which it knows no key.

The keys are those of vLLM 0.32's NixlConnector and of vllm-ascend's MooncakeConnectorV1 and
MooncakeHybridConnector, as read in their ``request_finished``; none of the latter was run.
(Its MooncakeLayerwiseConnector takes no part in this hand-over: there the decode instance
asks a metaserver for a prefill.)
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import FakeInstance, Streams, completes

_COMMON: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "3f6c-0",
    "remote_request_id": "cmpl-7-0-9ab01cd2",
    "remote_host": "10.0.0.1",
}
REPLIES: dict[str, dict[str, Any]] = {
    "NixlConnector": {
        **_COMMON,
        "remote_block_ids": [[4, 5, 6]],
        "remote_port": 5600,
        "tp_size": 4,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": 300,
        "remote_blocks_expiry_time": 1760000030.25,
        "transfer_mode": "read",
    },
    "MooncakeConnectorV1": {
        **_COMMON,
        "remote_block_ids": [4, 5, 6],
        "remote_port": 30000,
        "remote_pcp_size": 1,
        "remote_dcp_size": 1,
        "remote_ptp_size": 4,
        "last_token_id": 151645,
        "remote_multi_nodes_meta_mapping": {"0": {"host": "10.0.0.1", "engine_id": "3f6c-0"}},
        "num_prompt_blocks": 3,
        "remote_block_size": 128,
    },
    "MooncakeHybridConnector": {
        **_COMMON,
        "remote_block_ids": [[4, 5, 6], [9]],
        "remote_port": 30000,
        "remote_ptp_size": 4,
        "last_token_id": 151645,
        "remote_multi_nodes_meta_mapping": {},
        "num_prompt_blocks": 3,
    },
}
WHAT_PRODUCERS_READ = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

every_connector = pytest.mark.parametrize("connector", REPLIES)


async def _prefilled_by(start_instance: StartInstance, connector: str) -> FakeInstance:
    async def behave(_request: web.Request) -> web.StreamResponse:
        answer = {"choices": [{"text": "x"}], "kv_transfer_params": REPLIES[connector]}
        return web.json_response(answer)

    return await start_instance(behave)


@every_connector
@pytest.mark.parametrize("stream", [False, True])
async def test_decode_leg_has_the_params_of_the_prefill_leg_unchanged(
    start_instance: StartInstance, start_router: StartRouter, connector: str, *, stream: bool
) -> None:
    prefill = await _prefilled_by(start_instance, connector)
    decode = await start_instance(Streams([b"data: [DONE]\n\n"]) if stream else completes)
    router = await start_router([prefill], [decode])
    body = {"model": "m", "prompt": "hi", "max_tokens": 8, "stream": stream}

    answer = await router.post("/v1/completions", json=body)

    assert answer.status == 200
    assert answer.headers["X-VLLM-PD-Path"] == "disaggregated"
    (leg,) = decode.received
    assert leg.json == {**body, "kv_transfer_params": REPLIES[connector]}
    # To the byte: a connector may care for the order, as the keys of a mapping are text.
    assert json.dumps(REPLIES[connector], separators=(",", ":")).encode() in leg.raw


@every_connector
async def test_prefill_leg_asks_for_a_remote_decode_of_one_token(
    start_instance: StartInstance, start_router: StartRouter, decode: FakeInstance, connector: str
) -> None:
    prefill = await _prefilled_by(start_instance, connector)
    router = await start_router([prefill], [decode])

    await router.post("/v1/completions", json={"model": "m", "prompt": "hi", "max_tokens": 8})

    (leg,) = prefill.received
    assert leg.json["max_tokens"] == 1  # they keep blocks of what ends by length only
    assert leg.json["stream"] is False
    assert leg.json["kv_transfer_params"].items() >= WHAT_PRODUCERS_READ.items()


@every_connector
async def test_decode_leg_waits_for_the_prefill_of_a_connector_without_control_endpoint(
    start_instance: StartInstance, start_router: StartRouter, decode: FakeInstance, connector: str
) -> None:
    prefill = await _prefilled_by(start_instance, connector)
    router = await start_router([prefill], [decode])

    for _ in range(2):  # once it has answered, the router knows all it will
        await router.post("/v1/completions", json={"model": "m", "prompt": "hi", "max_tokens": 8})

    params = [leg.json["kv_transfer_params"] for leg in decode.received]
    assert params == [REPLIES[connector]] * 2
