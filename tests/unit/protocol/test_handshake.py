"""Who may exchange KV cache with whom."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.protocol.test_messages import FINGERPRINT, HELLO
from vllm_pd.errors import IncompatiblePeerError
from vllm_pd.protocol.handshake import check_compatible, choose_transport
from vllm_pd.protocol.messages import Hello


def test_equal_workers_of_two_engines_are_compatible() -> None:
    check_compatible(HELLO, msgspec.structs.replace(HELLO, engine_id="other", endpoints={}))


def test_peers_may_have_different_numbers_of_blocks() -> None:
    layout = msgspec.structs.replace(HELLO.layout, num_blocks=1000)
    check_compatible(HELLO, msgspec.structs.replace(HELLO, layout=layout))


def worker_of(tp_rank: int, tp_size: int, num_heads: int) -> Hello:
    layout = msgspec.structs.replace(HELLO.layout, num_heads=num_heads)
    return msgspec.structs.replace(HELLO, tp_rank=tp_rank, tp_size=tp_size, layout=layout)


@pytest.mark.parametrize("remote", [worker_of(0, 2, 1), worker_of(1, 2, 1), worker_of(3, 4, 1)])
def test_peers_may_have_another_tensor_parallel_size(remote: Hello) -> None:
    check_compatible(HELLO, remote)
    check_compatible(remote, HELLO)


@pytest.mark.parametrize("remote", [worker_of(0, 2, 2), worker_of(0, 1, 1)])
def test_share_of_the_heads_must_be_that_of_the_rank(remote: Hello) -> None:
    with pytest.raises(IncompatiblePeerError, match=r"num_heads there: \d != \d"):
        check_compatible(HELLO, remote)
    with pytest.raises(IncompatiblePeerError, match=r"num_heads here: \d != \d"):
        check_compatible(remote, HELLO)


@pytest.mark.parametrize("remote", [worker_of(9, 1, 2), worker_of(0, 0, 2), worker_of(0, 3, 1)])
def test_rank_that_cannot_be_is_refused(remote: Hello) -> None:
    with pytest.raises(IncompatiblePeerError):
        check_compatible(HELLO, remote)


@pytest.mark.parametrize("field", FINGERPRINT.__struct_fields__)
def test_every_field_of_the_fingerprint_counts(field: str) -> None:
    value = getattr(FINGERPRINT, field)
    changed = msgspec.structs.replace(
        FINGERPRINT, **{field: value + 1 if isinstance(value, int) else value + "x"}
    )
    with pytest.raises(IncompatiblePeerError, match=field):
        check_compatible(HELLO, msgspec.structs.replace(HELLO, fingerprint=changed))


def test_other_version_is_refused() -> None:
    with pytest.raises(IncompatiblePeerError, match="protocol_version: 1 != 9"):
        check_compatible(HELLO, msgspec.structs.replace(HELLO, protocol_version=9))


@pytest.mark.parametrize(
    ("field", "value"),
    [("region_names", ("a",)), ("num_rows", (16, 16)), ("head_lens", (64, 64))],
)
def test_other_geometry_is_refused(field: str, value: object) -> None:
    layout = msgspec.structs.replace(HELLO.layout, **{field: value})
    with pytest.raises(IncompatiblePeerError, match=field):
        check_compatible(HELLO, msgspec.structs.replace(HELLO, layout=layout))


def test_all_differences_are_named_at_once_with_both_values() -> None:
    fingerprint = msgspec.structs.replace(FINGERPRINT, dtype="float16", block_size=32)
    with pytest.raises(IncompatiblePeerError) as caught:
        check_compatible(HELLO, msgspec.structs.replace(HELLO, fingerprint=fingerprint))
    assert "dtype: 'bfloat16' != 'float16'" in str(caught.value)
    assert "block_size: 16 != 32" in str(caught.value)


def test_our_order_of_transports_decides() -> None:
    assert choose_transport(["hccl", "shm", "tcp"], ["tcp", "shm"]) == "shm"


def test_no_common_transport_is_incompatible() -> None:
    with pytest.raises(IncompatiblePeerError, match="no common transport"):
        choose_transport(["shm"], ["tcp"])
