"""The producer's scheduler half inside vLLM's real scheduler, step by step.

Runs in whichever vLLM is importable; ``test_oldest_vllm`` runs it in 0.23.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.connector.driving import BLOCK_SIZE, KEEP, NUM_BLOCKS, PROMPT, prefill, run_to_end

if TYPE_CHECKING:
    from tests.connector.harness import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 100])
def test_finished_prefill_keeps_exactly_the_blocks_of_its_prompt(
    producer: Engine, num_tokens: int
) -> None:
    num_free = producer.num_free_blocks
    request_id = producer.add(PROMPT[:num_tokens], dict(KEEP))
    params = producer.step().finished[request_id]
    (grant,) = producer.step().metadata.grants
    assert params is not None
    assert list(grant.block_ids) == params["remote_block_ids"] == producer.block_ids(request_id)
    assert len(grant.block_ids) == -(-num_tokens // BLOCK_SIZE)
    assert producer.num_free_blocks == num_free - len(grant.block_ids)


def test_response_names_the_prefill(producer: Engine) -> None:
    request_id = producer.add(PROMPT, {**KEEP, "transfer_id": "t-1"})
    params = producer.step().finished[request_id]
    assert params is not None
    assert params["do_remote_prefill"] is True
    assert params["transfer_id"] == "t-1"
    assert params["remote_engine_id"] == producer.engine_id
    assert params["remote_request_id"] == request_id
    assert params["remote_num_tokens"] == len(PROMPT)


def test_kept_blocks_are_free_once_the_worker_has_sent_them(producer: Engine) -> None:
    num_free = producer.num_free_blocks
    request_id = prefill(producer)["remote_request_id"]
    for _ in range(5):
        producer.step()
        assert producer.num_free_blocks == num_free - NUM_BLOCKS
    producer.step(sent=[request_id])
    assert (producer.num_free_blocks, producer.num_requests) == (num_free, 0)


def test_prefill_in_chunks_is_granted_once_after_the_last(
    make_engine: Callable[..., Engine],
) -> None:
    producer = make_engine(max_step_tokens=40)
    request_id = producer.add(PROMPT, dict(KEEP))
    steps = [*run_to_end(producer, request_id), producer.step()]
    params = steps[2].finished[request_id]
    assert [step.num_scheduled.get(request_id, 0) for step in steps] == [40, 40, 20, 0]
    assert [len(step.metadata.grants) for step in steps] == [0, 0, 0, 1]
    assert params is not None
    assert params["remote_num_tokens"] == len(PROMPT)


def test_prefill_aborted_between_chunks_keeps_nothing(make_engine: Callable[..., Engine]) -> None:
    producer = make_engine(max_step_tokens=40)
    num_free = producer.num_free_blocks
    request_id = producer.add(PROMPT, dict(KEEP))
    producer.step()
    producer.abort(request_id)
    assert producer.step().metadata.grants == []
    assert (producer.num_free_blocks, producer.num_requests) == (num_free, 0)


def test_prefills_of_one_prompt_share_blocks_until_the_last_is_sent(producer: Engine) -> None:
    num_free = producer.num_free_blocks
    first, second = prefill(producer), prefill(producer)
    assert first["remote_block_ids"][:3] == second["remote_block_ids"][:3]
    producer.step(sent=[first["remote_request_id"]])
    assert producer.num_free_blocks == num_free - NUM_BLOCKS
    producer.step(sent=[second["remote_request_id"]])
    assert producer.num_free_blocks == num_free


def test_preempted_prefill_is_granted_with_its_new_blocks(
    make_engine: Callable[..., Engine],
) -> None:
    producer = make_engine(num_blocks=8, max_step_tokens=64)  # seven to hand out
    num_free = producer.num_free_blocks
    local = producer.add(range(1000, 1096), max_tokens=40)  # grows to five blocks
    producer.step()
    request_id = producer.add(PROMPT, dict(KEEP), max_tokens=40)
    steps = run_to_end(producer, local, request_id)
    answers = {key: value for step in steps for key, value in step.finished.items()}
    params = answers[request_id]
    assert producer.status(request_id) == "FINISHED_LENGTH_CAPPED"
    assert producer.num_preemptions(request_id) > 0
    assert params is not None
    assert params["remote_block_ids"] == producer.block_ids(request_id)[:NUM_BLOCKS]
    producer.step(sent=[request_id])
    assert (producer.num_free_blocks, producer.num_requests) == (num_free, 0)


def test_thousand_prefills_are_freed_in_any_order(make_engine: Callable[..., Engine]) -> None:
    producer = make_engine(num_blocks=2100)
    num_free = producer.num_free_blocks
    kept = [producer.add([i, *range(40)], dict(KEEP)) for i in range(1000)]
    run_to_end(producer, *kept)
    assert producer.num_free_blocks == num_free - 2000
    random.Random(0).shuffle(kept)
    while kept:
        sent, kept = kept[:70], kept[70:]
        producer.step(sent=sent)
        assert producer.num_free_blocks == num_free - 2 * len(kept)
    assert producer.num_requests == 0
