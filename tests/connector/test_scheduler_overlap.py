"""The scheduler half under asynchronous scheduling: a step is planned before the last has ended.

CPU turns that off; accelerators have it on. Runs in whichever vLLM is importable.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.connector.driving import KEEP, NUM_BLOCKS, PROMPT, prefill, serve

if TYPE_CHECKING:
    from tests.connector.harness import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]


def test_finished_prefill_is_kept_until_the_worker_has_sent_it(
    make_engine: Callable[..., Engine],
) -> None:
    producer = make_engine(overlap=True)
    num_free = producer.num_free_blocks
    params = prefill(producer)
    assert params["remote_num_tokens"] == len(PROMPT)
    (grant,) = producer.step().metadata.grants
    assert list(grant.block_ids) == params["remote_block_ids"]
    assert producer.num_free_blocks == num_free - NUM_BLOCKS
    producer.step(sent=[grant.request_id])
    assert (producer.num_free_blocks, producer.num_requests) == (num_free, 0)


def test_only_the_last_prompt_token_is_computed_after_a_load(
    producer: Engine, make_engine: Callable[..., Engine]
) -> None:
    consumer = make_engine(overlap=True)
    num_free = consumer.num_free_blocks
    request_id = consumer.add(PROMPT, prefill(producer), max_tokens=40)
    steps = serve(consumer)
    assert [s.num_scheduled[request_id] for s in steps if s.num_scheduled] == [1] * 40
    consumer.step()
    assert consumer.num_free_blocks == num_free


def test_every_block_is_free_after_random_loads_grants_failures_and_aborts(
    producer: Engine, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(overlap=True, num_blocks=1000)
    num_free = engine.num_free_blocks
    rng = random.Random(0)
    params = {**prefill(producer), "remote_num_tokens": 41, "remote_prompt_digest": ""}
    loading: dict[str, tuple[int, ...]] = {}
    granted: set[str] = set()
    alive: list[str] = []
    for i in range(500):
        prompt = [i, *range(40)]
        if i % 3:
            alive.append(engine.add(prompt, params, max_tokens=rng.randrange(1, 9)))
        else:
            alive.append(engine.add(prompt, dict(KEEP)))
        if rng.random() < 0.4:
            engine.abort(alive.pop(rng.randrange(len(alive))))
        received = rng.sample(sorted(loading), k=len(loading) // 3)
        failed = [block for key in received[::3] for block in loading[key]]
        sent = rng.sample(sorted(granted), k=len(granted) // 3)
        step = engine.step(received=received, sent=sent, invalid=failed)
        loading = {key: value for key, value in loading.items() if key not in received}
        loading |= {load.request_id: load.block_ids for load in step.metadata.loads}
        granted.difference_update(sent)
        granted |= {grant.request_id for grant in step.metadata.grants}
    while engine.num_requests:
        step = engine.step(received=loading, sent=granted)
        loading = {load.request_id: load.block_ids for load in step.metadata.loads}
        granted = {grant.request_id for grant in step.metadata.grants}
    engine.step()
    assert engine.num_free_blocks == num_free
