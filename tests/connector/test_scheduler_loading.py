"""The consumer's scheduler half inside vLLM's real scheduler, step by step.

Runs in whichever vLLM is importable; ``test_oldest_vllm`` runs it in 0.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.connector.driving import NUM_BLOCKS, PROMPT, prefill, run_to_end, wait_for_release

if TYPE_CHECKING:
    from tests.connector.harness import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]


def test_load_names_the_blocks_and_schedules_nothing(producer: Engine, consumer: Engine) -> None:
    num_free = consumer.num_free_blocks
    params = prefill(producer)
    request_id = consumer.add(PROMPT, params)
    step = consumer.step()
    (load,) = step.metadata.loads
    assert step.num_scheduled == {}
    assert consumer.status(request_id) == "WAITING_FOR_REMOTE_KVS"
    assert list(load.block_ids) == consumer.block_ids(request_id)
    assert (load.block_offset, len(load.block_ids)) == (0, NUM_BLOCKS)
    assert (load.request_id, load.transfer_id) == (request_id, params["transfer_id"])
    assert consumer.num_free_blocks == num_free - NUM_BLOCKS


def test_request_waits_until_its_load_is_reported(producer: Engine, consumer: Engine) -> None:
    request_id = consumer.add(PROMPT, prefill(producer))
    consumer.step()
    for _ in range(5):
        step = consumer.step()
        assert step.num_scheduled == {}
        assert step.metadata.loads == []
    assert consumer.status(request_id) == "WAITING_FOR_REMOTE_KVS"


def test_only_the_last_prompt_token_is_computed_after_a_load(
    producer: Engine, consumer: Engine
) -> None:
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer), max_tokens=40)
    consumer.step()
    consumer.step(received=[request_id])
    steps = run_to_end(consumer, request_id)
    assert [step.num_scheduled for step in steps] == [{request_id: 1}] * 40
    assert not any(step.metadata.loads for step in steps)
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(2, 1), (32, 1), (33, 2), (64, 2), (100, 4)]
)
def test_full_and_partial_last_blocks_are_loaded(
    producer: Engine, consumer: Engine, num_tokens: int, num_blocks: int
) -> None:
    request_id = consumer.add(PROMPT[:num_tokens], prefill(producer, PROMPT[:num_tokens]))
    (load,) = consumer.step().metadata.loads
    consumer.step(received=[request_id])
    assert len(load.block_ids) == num_blocks
    assert consumer.step().num_scheduled == {request_id: 1}


def test_prompt_of_one_token_is_computed_and_its_prefill_released(
    producer: Engine, consumer: Engine
) -> None:
    params = prefill(producer, [5])
    request_id = consumer.add([5], params)
    step = consumer.step()
    assert step.metadata.loads == []
    assert step.num_scheduled == {request_id: 1}
    assert wait_for_release(producer) == [params["transfer_id"]]


def test_cached_prefix_is_not_loaded_again(producer: Engine, consumer: Engine) -> None:
    num_free = consumer.num_free_blocks
    run_to_end(consumer, consumer.add(PROMPT[:70]))
    request_id = consumer.add(PROMPT, prefill(producer))
    (load,) = consumer.step().metadata.loads
    assert load.block_offset == 2
    assert list(load.block_ids) == consumer.block_ids(request_id)[2:]
    consumer.step(received=[request_id])
    assert consumer.step().num_scheduled == {request_id: 1}
    assert consumer.num_free_blocks == num_free


def test_fully_cached_prompt_is_released_and_not_loaded(producer: Engine, consumer: Engine) -> None:
    prompt = PROMPT[:97]
    run_to_end(consumer, consumer.add(prompt))
    params = prefill(producer, prompt)
    request_id = consumer.add(prompt, params)
    step = consumer.step()
    assert step.metadata.loads == []
    assert step.metadata.num_blocks_saved == 3
    assert step.num_scheduled == {request_id: 1}
    assert wait_for_release(producer) == [params["transfer_id"]]


def test_loaded_blocks_serve_the_next_request_with_that_prompt(
    producer: Engine, consumer: Engine
) -> None:
    prompt = PROMPT[:97]
    first = consumer.add(prompt, prefill(producer, prompt))
    consumer.step()
    consumer.step(received=[first])
    run_to_end(consumer, first)
    second = consumer.add(prompt)
    assert consumer.step().num_scheduled == {second: 1}


def test_tail_that_was_not_prefilled_is_computed(producer: Engine, consumer: Engine) -> None:
    """As in a conversation: the remote prefill covers the earlier turns."""
    request_id = consumer.add([*PROMPT, *range(500, 560)], prefill(producer))
    (load,) = consumer.step().metadata.loads
    consumer.step(received=[request_id])
    assert len(load.block_ids) == NUM_BLOCKS
    assert consumer.step().num_scheduled == {request_id: 60}


def test_load_waits_for_free_blocks_and_is_then_started_once(
    producer: Engine, make_engine: Callable[..., Engine]
) -> None:
    consumer = make_engine(num_blocks=7)  # six to hand out
    local = consumer.add(range(1000, 1096), max_tokens=20)
    consumer.step()
    request_id = consumer.add(PROMPT, prefill(producer))
    steps = run_to_end(consumer, local)
    assert not any(step.metadata.loads for step in steps)
    (load,) = consumer.step().metadata.loads
    assert load.request_id == request_id
    assert consumer.step().metadata.loads == []


@pytest.mark.parametrize(
    "change",
    [
        {"remote_prompt_digest": "of another prompt"},
        {"remote_num_tokens": len(PROMPT) + 1},
        {"remote_port": "not a port"},
        {"remote_host": None},
        {"transfer_id": ""},
        {"do_remote_prefill": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unusable_params_cost_a_local_prefill(
    producer: Engine, consumer: Engine, change: dict[str, Any]
) -> None:
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, {**prefill(producer), **change})
    (step,) = run_to_end(consumer, request_id)
    assert step.num_scheduled == {request_id: len(PROMPT)}
    assert step.metadata.loads == []
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_tokens_from_a_peer_are_counted_as_loaded(producer: Engine, consumer: Engine) -> None:
    consumer.add(PROMPT, prefill(producer))
    hits = consumer.step().external_hits
    assert hits.num_tokens == len(PROMPT)
    if hits.by_source is not None:  # 0.23 has no labels
        assert hits.by_source == {"p2p": len(PROMPT)}
