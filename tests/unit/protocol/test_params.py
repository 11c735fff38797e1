"""The params between router and engines."""

from __future__ import annotations

import pytest

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.protocol.params import (
    RemotePrefill,
    parse_remote_prefill,
    prompt_digest,
    remote_prefill_params,
    transfer_id_of,
    wants_remote_decode,
)

REMOTE = RemotePrefill(
    transfer_id="t",
    remote_engine_id="e",
    remote_request_id="r",
    remote_host="127.0.0.1",
    remote_port=5600,
    remote_num_tokens=40,
    remote_prompt_digest="abc",
    remote_lease_s=30.0,
)


def test_what_the_producer_answers_is_what_the_consumer_reads() -> None:
    params = remote_prefill_params(REMOTE, block_ids=[4, 5], tp_size=2)
    assert params["do_remote_prefill"] is True
    assert (params["remote_block_ids"], params["tp_size"]) == ([4, 5], 2)
    assert parse_remote_prefill(params) == REMOTE


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False, "remote_port": "x"}])
def test_no_remote_prefill(params: dict[str, object] | None) -> None:
    assert parse_remote_prefill(params) is None


@pytest.mark.parametrize(
    "change",
    [
        {"remote_port": "x"},
        {"remote_port": 0},
        {"remote_port": 70000},
        {"remote_num_tokens": -1},
        {"transfer_id": ""},
        {"transfer_id": "x" * 1000},
        {"remote_host": None},
        {"remote_host": "half a character: \ud800"},
        {"transfer_id": "\ud800"},
        {"remote_lease_s": -1.0},
        {"remote_lease_s": float("nan")},
        {"remote_lease_s": float("inf")},
    ],
)
def test_unusable_params_blame_the_sender(change: dict[str, object]) -> None:
    params = remote_prefill_params(REMOTE, block_ids=[], tp_size=1) | change
    with pytest.raises(RemoteProtocolError, match="kv_transfer_params"):
        parse_remote_prefill(params)


def test_params_of_a_proxy_written_for_nixl_are_complete_with_the_producers_own() -> None:
    """Such a proxy sends no transfer id; the producer's request id serves."""
    nixl = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None}
    assert wants_remote_decode(nixl)
    assert transfer_id_of(nixl, default="request-1") == "request-1"
    assert transfer_id_of({**nixl, "transfer_id": "t"}, default="request-1") == "t"
    assert transfer_id_of({**nixl, "transfer_id": 7}, default="request-1") == "request-1"


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}])
def test_nothing_is_kept_unless_asked(params: dict[str, object] | None) -> None:
    assert not wants_remote_decode(params)


def test_digest_tells_prompts_and_adapters_apart() -> None:
    digests = {
        prompt_digest([1, 2, 3]),
        prompt_digest([1, 2]),
        prompt_digest([3, 2, 1]),
        prompt_digest([1, 2, 3], salt="adapter"),
    }
    assert len(digests) == 4
    assert prompt_digest([1, 2, 3]) == prompt_digest((1, 2, 3))


def test_how_long_another_connectors_lease_lasts_is_unknown() -> None:
    params = remote_prefill_params(REMOTE, block_ids=[], tp_size=1)
    del params["remote_lease_s"]
    remote = parse_remote_prefill(params)
    assert remote is not None
    assert remote.remote_lease_s == 0.0
