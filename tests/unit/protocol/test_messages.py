"""The wire format: what decodes, what is refused, what stays readable."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.config import Digests
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.protocol.messages import (
    MAX_FRAME_LEN,
    MAX_ID_LEN,
    MAX_RENEWED,
    AnyMessage,
    Describe,
    Drain,
    FetchBlocks,
    FetchFailed,
    FetchFailure,
    FetchReady,
    Fingerprint,
    GetOutstanding,
    GetStats,
    GiveUp,
    Goodbye,
    Hello,
    InstanceInfo,
    KVLayout,
    Outstanding,
    Refused,
    Release,
    Renew,
    Stats,
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
    layout=KVLayout(
        region_names=("a", "b"), num_rows=(1, 16), head_lens=(64, 4), num_heads=2, num_blocks=8
    ),
    endpoints={"tcp": b"\x00\xff"},
)
FETCH = FetchBlocks(
    fetch_id=7,
    transfer_id="t",
    transport="tcp",
    block_offset=2,
    num_blocks=3,
    first_head=0,
    num_heads=2,
    num_readers=1,
    digests=Digests.SAMPLED,
    timeout_s=5.0,
)


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
        Renew(transfer_ids=("t", "u")),
        Drain(),
        Drain(on=False),
        GetOutstanding(),
        Outstanding(num_leases=2, num_blocks=30, draining=True),
        GetStats(),
        Stats(counters={"leases": 2, "uptime_s": 0.5}),
        HELLO,
        Refused(reason="no"),
        FETCH,
        msgspec.structs.replace(FETCH, prompt_digest="d"),
        GiveUp(fetch_id=7),
        FetchReady(fetch_id=7),
        FetchFailed(fetch_id=7, failure=FetchFailure.LEASE_ENDED, detail="over"),
        Goodbye(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_round_trip(message: AnyMessage) -> None:
    assert decode(encode(message)) == message


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def changed(**fields: object) -> bytes:
    return packed(**{**msgspec.to_builtins(FETCH), **fields})


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "garbage": b"\xc1",  # never valid in msgpack
    "type": packed(type="no_such_message"),
    "missing": packed(type="fetch_ready"),
    "wrong type": changed(fetch_id="seven"),
    "no blocks": changed(num_blocks=0),
    "before": changed(block_offset=-1),
    "long id": changed(transfer_id="x" * 300),
    "first head": changed(first_head=-1),
    "heads": changed(num_heads=-1),
    "readers": changed(num_readers=0),
    "long id released": packed(type="release", transfer_id="x" * 300),
    "nothing renewed": packed(type="renew", transfer_ids=[]),
    "empty id renewed": packed(type="renew", transfer_ids=[""]),
    "long id renewed": packed(type="renew", transfer_ids=["x" * 300]),
    "too many renewed": packed(type="renew", transfer_ids=["t"] * (MAX_RENEWED + 1)),
    "drain what": packed(type="drain", on="yes"),
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_malformed_input_blames_the_peer(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(payload)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_else(payload: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(payload)


def test_unknown_fields_are_ignored_so_peers_may_add_some() -> None:
    assert decode(changed(added_in_v2=1)) == FETCH


def test_draining_is_what_drain_means_by_itself() -> None:
    assert decode(packed(type="drain")) == Drain(on=True)


def test_largest_renewal_fits_into_a_frame() -> None:
    ids = tuple("\N{GRINNING FACE}" * MAX_ID_LEN for _ in range(MAX_RENEWED))
    assert len(encode(Renew(transfer_ids=ids))) <= MAX_FRAME_LEN
