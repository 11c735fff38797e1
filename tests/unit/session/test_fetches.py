"""How the parts of an order add up; no I/O."""

from __future__ import annotations

import pytest

from vllm_pd.errors import DigestMismatchError, PeerLostError
from vllm_pd.protocol.heads import Part
from vllm_pd.protocol.messages import WorkerAddress
from vllm_pd.protocol.state import Fetch, FetchState
from vllm_pd.session.fetches import FetchRequest, Order, OrderPart
from vllm_pd.session.stats import FetchTimeline, Outcome

REQUEST = FetchRequest(
    request_id="decode-1",
    transfer_id="t1",
    remote_engine_id="p",
    remote_host="127.0.0.1",
    remote_port=1,
    block_offset=2,
    block_ids=(7, 8),
)


def order_of(num_parts: int, *, wait_s: float = 0.0) -> tuple[Order, list[OrderPart]]:
    request = FetchRequest(
        REQUEST.request_id,
        REQUEST.transfer_id,
        REQUEST.remote_engine_id,
        REQUEST.remote_host,
        REQUEST.remote_port,
        REQUEST.block_offset,
        REQUEST.block_ids,
        wait_s=wait_s,
    )
    order = Order(request, started=100.0, deadline=130.0, num_open=num_parts)
    parts = [
        OrderPart(
            Fetch(rank, "decode-1", "t1", 130.0),
            order,
            Part(rank, 0, rank, 1, 1),
            WorkerAddress(tp_rank=rank, host="127.0.0.1", port=2 + rank),
        )
        for rank in range(num_parts)
    ]
    return order, parts


def test_order_ends_with_its_last_part_and_the_first_error_counts() -> None:
    order, (first, second, third) = order_of(3)
    assert not order.end_part(first, 101.0, None)
    assert not order.end_part(second, 102.0, DigestMismatchError("damaged"))
    assert order.end_part(third, 103.0, PeerLostError("later"))
    result = order.result(103.0, block_len=10)
    assert isinstance(result.error, DigestMismatchError)
    assert result.record.outcome is Outcome.CORRUPT


def test_timeline_is_the_longest_of_the_parts() -> None:
    order, (first, second) = order_of(2)
    first.requested, first.ready = 101.0, 105.0
    second.requested, second.ready = 102.0, 103.0
    order.end_part(first, 106.0, None)
    order.end_part(second, 110.0, None)
    assert order.result(110.0, block_len=10).record.timeline == FetchTimeline(
        handshake_s=2.0, queued_s=4.0, transfer_s=7.0, total_s=10.0
    )


def test_time_that_the_prefill_took_is_no_part_of_the_fetch() -> None:
    order, (part,) = order_of(1, wait_s=20.0)
    part.requested, part.ready = 101.0, 109.0
    order.end_part(part, 110.0, None)
    assert order.result(110.0, block_len=10).record.timeline.total_s == pytest.approx(2.0)


def test_bytes_count_if_all_came_and_blocks_before_the_offset_are_saved() -> None:
    order, (part,) = order_of(1)
    order.num_bytes = 20
    order.end_part(part, 101.0, None)
    record = order.result(101.0, block_len=10).record
    assert (record.num_bytes, record.num_bytes_saved) == (20, 20)


def test_bytes_of_an_order_that_failed_do_not_count() -> None:
    order, (part,) = order_of(1)
    order.num_bytes = 20
    order.end_part(part, 101.0, PeerLostError("gone"))
    assert order.result(101.0, block_len=10).record.num_bytes == 0


def test_part_is_only_the_transports_to_end_while_it_receives() -> None:
    _, (part,) = order_of(1)
    seen = []
    for state in (FetchState.REQUESTED, FetchState.RECEIVING, FetchState.DONE):
        part.fetch.advance(state)
        seen.append(part.is_receiving)
    assert seen == [False, True, False]
