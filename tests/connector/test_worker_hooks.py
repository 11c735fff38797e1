"""The worker half inside vLLM's own step of a worker, between two engines.

vLLM's mixin calls the hooks in its version's order; bytes go over the real
transports between KV caches laid out as the version lays them out. Runs in
whichever vLLM is importable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.connector.driving import KEEP, NUM_BLOCKS, PROMPT
from vllm_pd.protocol.params import pending_prefill_params

if TYPE_CHECKING:
    from tests.connector.harness import Engine
    from tests.connector.workers import Instance

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]

FOR_EVER_S = 3600.0


@pytest.fixture
def make_instance(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Instance]]:
    from tests.connector.workers import Instance

    made: list[Instance] = []

    def make(fill: int, **options: object) -> Instance:
        made.append(Instance(make_engine(**options), monkeypatch, fill=fill))
        return made[-1]

    yield make
    for instance in reversed(made):
        instance.close()


def run_until_idle(*instances: Instance) -> None:
    deadline = time.monotonic() + 20.0
    while any(instance.engine.num_requests for instance in instances):
        for instance in instances:
            instance.step()
        assert time.monotonic() < deadline, "requests never ended"
        time.sleep(0.001)  # transfers run on other threads


def prefill(producer: Instance) -> dict[str, object]:
    request_id = producer.engine.add(PROMPT, dict(KEEP))
    params = producer.step().finished[request_id]
    assert params is not None
    return params


def test_blocks_arrive_and_both_sides_are_free_afterwards(
    make_instance: Callable[..., Instance],
) -> None:
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    num_free = consumer.engine.num_free_blocks
    params = prefill(producer)
    request_id = consumer.engine.add(PROMPT, params)
    consumer.step()
    block_ids = consumer.engine.block_ids(request_id)
    assert len(block_ids) == NUM_BLOCKS
    run_until_idle(producer, consumer)
    assert consumer.num_computed == {request_id: 1}
    assert all(consumer.holds(block_id, 3) for block_id in block_ids)
    assert [producer.engine.num_free_blocks, consumer.engine.num_free_blocks] == [num_free] * 2


def test_step_that_computes_nothing_waits_for_the_fetch(
    make_instance: Callable[..., Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_pd.connector.worker.FETCH_WAIT_S", FOR_EVER_S)
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    request_id = consumer.engine.add(PROMPT, prefill(producer))
    producer.step()  # its worker half learns of the prefill
    assert consumer.step().num_scheduled == {}  # here it waits
    assert consumer.step().num_scheduled == {request_id: 1}


def test_step_that_computes_does_not_wait_for_a_fetch(
    make_instance: Callable[..., Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_pd.connector.worker.FETCH_WAIT_S", FOR_EVER_S)
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    params = prefill(producer) | {"transfer_id": "of a prefill that has not ended"}
    consumer.engine.add(PROMPT, params)
    other = consumer.engine.add(PROMPT[:40])
    assert consumer.step().num_scheduled == {other: 40}


def test_load_from_a_dead_producer_is_recomputed(make_instance: Callable[..., Instance]) -> None:
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    num_free = consumer.engine.num_free_blocks
    params = prefill(producer)
    producer.close()
    producer.engine.close()
    request_id = consumer.engine.add(PROMPT, params)
    run_until_idle(consumer)
    assert consumer.num_computed == {request_id: len(PROMPT)}
    assert consumer.engine.num_free_blocks == num_free


def test_abort_of_a_load_frees_the_blocks_on_both_sides(
    make_instance: Callable[..., Instance],
) -> None:
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    num_free = consumer.engine.num_free_blocks
    request_id = consumer.engine.add(PROMPT, prefill(producer))
    consumer.step()
    consumer.engine.abort(request_id)
    run_until_idle(producer, consumer)
    assert [producer.engine.num_free_blocks, consumer.engine.num_free_blocks] == [num_free] * 2


OTHER = PROMPT[::-1]


def pending_prefill(producer: Instance, consumer: Instance) -> dict[str, object]:
    """Have both serve a request; return the params of one whose prefill comes later."""
    known = prefill(producer)
    consumer.engine.add(PROMPT, known)
    run_until_idle(producer, consumer)
    consumer.num_computed.clear()
    return pending_prefill_params(
        "later",
        engine_id=str(known["remote_engine_id"]),
        host=str(known["remote_host"]),
        port=int(str(known["remote_port"])),
    )


def test_decode_request_may_come_before_its_prefill(make_instance: Callable[..., Instance]) -> None:
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    params = pending_prefill(producer, consumer)
    request_id = consumer.engine.add(OTHER, params)
    consumer.step()
    producer.engine.add(OTHER, {**KEEP, "transfer_id": "later"})
    run_until_idle(producer, consumer)
    assert consumer.num_computed == {request_id: 1}


def test_prefill_of_another_prompt_is_not_loaded(make_instance: Callable[..., Instance]) -> None:
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    request_id = consumer.engine.add(OTHER, pending_prefill(producer, consumer))
    consumer.step()
    producer.engine.add([*OTHER[:-1], 7], {**KEEP, "transfer_id": "later"})
    run_until_idle(producer, consumer)
    assert consumer.num_computed == {request_id: len(OTHER)}


def test_abort_of_a_request_that_waits_for_its_prefill_frees_its_blocks(
    make_instance: Callable[..., Instance],
) -> None:
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    params = pending_prefill(producer, consumer)
    num_free = consumer.engine.num_free_blocks
    request_id = consumer.engine.add(OTHER, params)
    consumer.step()
    consumer.engine.abort(request_id)
    run_until_idle(consumer)
    assert consumer.engine.num_free_blocks == num_free


def test_bytes_of_a_wholly_cached_prompt_are_reported_as_saved(
    make_instance: Callable[..., Instance],
) -> None:
    """Nothing is fetched, so no fetch tells what the prefix cache saved."""
    producer, consumer = make_instance(fill=3), make_instance(fill=0)
    prompt = PROMPT[:97]  # three blocks and the token that is computed in any case
    consumer.engine.add(prompt)
    run_until_idle(consumer)
    assert consumer.num_bytes_saved == 0
    prefilled = producer.engine.add(prompt, dict(KEEP))
    consumer.engine.add(prompt, producer.step().finished[prefilled])
    run_until_idle(producer, consumer)
    assert consumer.num_bytes_saved == 3 * consumer.block_len
