"""Failed loads, aborts, preemption and faults of our own, inside vLLM's real scheduler.

Runs in whichever vLLM is importable; ``test_oldest_vllm`` runs it in 0.23.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.connector.driving import (
    BLOCK_SIZE,
    KEEP,
    NUM_BLOCKS,
    PROMPT,
    prefill,
    run_to_end,
    serve,
    wait_for_release,
)
from vllm_pd.connector.scheduler import PDConnectorScheduler

if TYPE_CHECKING:
    from tests.connector.harness import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]

# Failed loads


def test_failed_load_is_recomputed_as_a_whole_and_not_tried_again(
    producer: Engine, consumer: Engine
) -> None:
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer))
    (load,) = consumer.step().metadata.loads
    consumer.step(received=[request_id], invalid=load.block_ids)
    (step,) = run_to_end(consumer, request_id)
    assert step.num_scheduled == {request_id: len(PROMPT)}
    assert step.metadata.loads == []
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_failed_load_keeps_the_prefix_that_was_cached(producer: Engine, consumer: Engine) -> None:
    run_to_end(consumer, consumer.add(PROMPT[:70]))
    request_id = consumer.add(PROMPT, prefill(producer))
    (load,) = consumer.step().metadata.loads
    consumer.step(received=[request_id], invalid=load.block_ids)
    (step,) = run_to_end(consumer, request_id)
    assert step.num_scheduled == {request_id: len(PROMPT) - 2 * BLOCK_SIZE}


def test_failed_load_leaves_nothing_in_the_prefix_cache(producer: Engine, consumer: Engine) -> None:
    request_id = consumer.add(PROMPT, prefill(producer))
    (load,) = consumer.step().metadata.loads
    consumer.step(received=[request_id], invalid=load.block_ids)
    consumer.abort(request_id)
    other = consumer.add(PROMPT)
    assert consumer.step().num_scheduled == {other: len(PROMPT)}


def test_failed_load_ends_the_request_under_the_policy_fail(
    producer: Engine, make_engine: Callable[..., Engine]
) -> None:
    consumer = make_engine(failure_policy="fail")
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer))
    (load,) = consumer.step().metadata.loads
    step = consumer.step(received=[request_id], invalid=load.block_ids)
    assert step.finish_reasons == {request_id: "error"}
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


# Aborts


@pytest.mark.parametrize("is_lost", [False, True], ids=["received", "failed"])
def test_abort_while_loading_frees_the_blocks_when_the_load_has_ended(
    producer: Engine, consumer: Engine, is_lost: bool
) -> None:
    """Not before: the transport may still write them."""
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer))
    (load,) = consumer.step().metadata.loads
    consumer.abort(request_id)
    for _ in range(5):
        consumer.step()
        assert consumer.num_free_blocks == num_free - NUM_BLOCKS
    consumer.step(received=[request_id], invalid=load.block_ids if is_lost else ())
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_abort_between_load_and_first_token_frees_the_blocks_at_once(
    producer: Engine, consumer: Engine
) -> None:
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer))
    consumer.step()
    consumer.step(received=[request_id])
    consumer.abort(request_id)
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_abort_while_decoding_frees_the_blocks_at_once(producer: Engine, consumer: Engine) -> None:
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer), max_tokens=40)
    consumer.step()
    consumer.step(received=[request_id])
    consumer.step()
    consumer.abort(request_id)
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_abort_before_scheduling_releases_the_prefill(producer: Engine, consumer: Engine) -> None:
    num_free = consumer.num_free_blocks
    params = prefill(producer)
    consumer.abort(consumer.add(PROMPT, params))
    assert consumer.step().metadata.loads == []
    assert wait_for_release(producer) == [params["transfer_id"]]
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_thousand_aborts_leave_every_block_free(
    producer: Engine, make_engine: Callable[..., Engine]
) -> None:
    """While loading, after it and while decoding; loads end well and badly."""
    consumer = make_engine(num_blocks=2100)
    num_free = consumer.num_free_blocks
    rng = random.Random(0)
    params = {**prefill(producer), "remote_num_tokens": 41, "remote_prompt_digest": ""}
    requests = [consumer.add([i, *range(40)], params, max_tokens=60) for i in range(1000)]
    loading = {load.request_id: load.block_ids for load in consumer.step().metadata.loads}
    assert len(loading) == 1000
    rng.shuffle(requests)
    while requests:
        consumer.abort(*requests[:20])
        requests = requests[20:]
        ended = {key: loading.pop(key) for key in rng.sample(sorted(loading), k=15)}
        failed = [block for key in sorted(ended)[::3] for block in ended[key]]
        consumer.step(received=ended, invalid=failed)
        held = [block for key in consumer.request_ids for block in consumer.block_ids(key)]
        assert consumer.num_free_blocks == num_free - len(held) == num_free - len(set(held))
    assert consumer.request_ids == loading.keys()
    consumer.step(received=loading)
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_thousand_aborts_before_scheduling_release_every_prefill(
    producer: Engine, consumer: Engine
) -> None:
    params = prefill(producer)
    named = {f"t-{i}" for i in range(1000)}
    for transfer_id in sorted(named):
        consumer.abort(consumer.add(PROMPT, {**params, "transfer_id": transfer_id}))
    released: set[str] = set()
    while released != named:
        released.update(wait_for_release(producer))
    assert consumer.num_requests == 0


# Preemption


def test_preempted_request_is_not_loaded_again(
    producer: Engine, make_engine: Callable[..., Engine]
) -> None:
    """Its prefill was given back when it had been loaded."""
    consumer = make_engine(num_blocks=10)  # nine to hand out; two requests grow to five each
    num_free = consumer.num_free_blocks
    prompts = [PROMPT, PROMPT[::-1]]
    requests = [consumer.add(p, prefill(producer, p), max_tokens=50) for p in prompts]
    consumer.step()
    consumer.step(received=requests)
    while not any(consumer.num_preemptions(key) for key in requests):
        consumer.step()
    steps = run_to_end(consumer, *requests)
    assert not any(step.metadata.loads for step in steps)
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


def test_request_preempted_after_a_failed_load_is_not_loaded_again(
    producer: Engine, make_engine: Callable[..., Engine]
) -> None:
    consumer = make_engine(num_blocks=10)
    num_free = consumer.num_free_blocks
    first = consumer.add(PROMPT[::-1], max_tokens=50)
    consumer.step()
    second = consumer.add(PROMPT, prefill(producer), max_tokens=50)
    (load,) = consumer.step().metadata.loads
    consumer.step(received=[second], invalid=load.block_ids)
    steps = [consumer.step()]
    while not consumer.num_preemptions(second):
        steps.append(consumer.step())
    steps += run_to_end(consumer, first, second)
    assert not any(step.metadata.loads for step in steps)
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


# Faults of our own


def test_load_that_could_not_be_planned_is_recomputed(
    producer: Engine, consumer: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has parked the request by then: without a report it would wait for ever."""
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer))

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(PDConnectorScheduler, "update_state_after_alloc", fail)
        ((failed_id, block_ids),) = consumer.step().metadata.failed_loads
    assert failed_id == request_id
    consumer.step(received=[request_id], invalid=block_ids)
    steps = run_to_end(consumer, request_id)
    assert sum(step.num_scheduled.get(request_id, 0) for step in steps) >= len(PROMPT)
    assert not any(step.metadata.loads or step.metadata.failed_loads for step in steps)
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)


@pytest.mark.parametrize(
    "method",
    [
        "get_num_new_matched_tokens",
        "build_step_news",
        "request_finished",
        "update_finished_sending",
    ],
)
def test_engine_outlives_a_fault_in_the_scheduler_half(
    producer: Engine, consumer: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    num_free = consumer.num_free_blocks
    params = prefill(producer)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(PDConnectorScheduler, method, fail)
        consumer.add(PROMPT, params)
        consumer.add(PROMPT[::-1], dict(KEEP))
        plain = consumer.add(PROMPT[10:])
        steps = serve(consumer, num_steps=10)
        assert plain in steps[0].finished
    serve(consumer)  # news that a fault has held back come now
    assert (consumer.num_free_blocks, consumer.num_requests) == (num_free, 0)
