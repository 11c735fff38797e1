"""The wire format: what decodes, what is refused, what stays readable."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.protocol.messages import (
    AnyMessage,
    Describe,
    FetchBlocks,
    FetchFailed,
    FetchFailure,
    FetchReady,
    Fingerprint,
    Goodbye,
    Hello,
    InstanceInfo,
    KVLayout,
    Refused,
    Release,
    WorkerAddress,
    decode,
    encode,
)

FINGERPRINT = Fingerprint(
    model="m",
    dtype="bfloat16",
    kv_cache_dtype="bfloat16",
    quantization="",
    num_layers=2,
    num_kv_heads=2,
    head_size=64,
    block_size=16,
    kv_layout="cpu:vec",
)
HELLO = Hello(
    protocol_version=1,
    engine_id="e",
    tp_rank=0,
    tp_size=1,
    fingerprint=FINGERPRINT,
    layout=KVLayout(region_names=("a", "b"), block_lens=(64, 64), num_blocks=8),
    endpoints={"tcp": b"\x00\xff"},
)
FETCH = FetchBlocks(fetch_id=7, transfer_id="t", transport="tcp", block_offset=2, num_blocks=3)


@pytest.mark.parametrize(
    "message",
    [
        Describe(),
        InstanceInfo(
            protocol_version=1,
            engine_id="e",
            tp_size=1,
            workers=(WorkerAddress(tp_rank=0, host="h", port=1),),
            fingerprint=FINGERPRINT,
            num_leases=0,
            lease_s=30.0,
        ),
        Release(transfer_id="t"),
        HELLO,
        Refused(reason="no"),
        FETCH,
        FetchReady(fetch_id=7),
        FetchFailed(fetch_id=7, failure=FetchFailure.LEASE_ENDED, detail="over"),
        Goodbye(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_round_trip(message: AnyMessage) -> None:
    assert decode(encode(message)) == message


def changed(**fields: object) -> bytes:
    return msgspec.msgpack.encode({**msgspec.to_builtins(FETCH), **fields})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",  # never valid in msgpack
        msgspec.msgpack.encode({"type": "no_such_message"}),
        msgspec.msgpack.encode({"type": "fetch_ready"}),
        changed(fetch_id="seven"),
        changed(num_blocks=0),
        changed(block_offset=-1),
        changed(transfer_id="x" * 300),
    ],
    ids=["empty", "garbage", "type", "missing", "wrong type", "no blocks", "before", "long id"],
)
def test_malformed_input_blames_the_peer(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(payload)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_else(payload: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(payload)


def test_unknown_fields_are_ignored_so_peers_may_add_some() -> None:
    assert decode(changed(added_in_v2=1)) == FETCH
