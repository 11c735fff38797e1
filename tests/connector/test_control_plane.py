"""Renewal and draining with two of vLLM's real schedulers and real control sockets.

Runs in whichever vLLM is importable; ``test_oldest_vllm`` runs it in 0.23.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from vllm_pd.config import ConnectorConfig
from vllm_pd.protocol.messages import AnyMessage, Drain, GetStats, Outstanding, Stats
from vllm_pd.session.channel import ControlContext

if TYPE_CHECKING:
    from tests.connector.harness import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]

PROMPT = list(range(100))
NUM_BLOCKS = 4
KEEP: dict[str, Any] = {"do_remote_decode": True}


def prefill(producer: Engine) -> dict[str, Any]:
    """Compute a prompt on the producer; return what its response tells the router."""
    request_id = producer.add(PROMPT, dict(KEEP))
    params = producer.step().finished[request_id]
    assert params is not None
    return params


def ask(params: dict[str, Any], message: AnyMessage) -> AnyMessage:
    """Ask the instance endpoint that a response names."""
    context = ControlContext(ConnectorConfig())
    client = context.client(params["remote_host"], params["remote_port"])
    try:
        client.send(message)
        assert client.socket.poll(10_000)
        answer = client.receive()
        assert answer is not None
        return answer
    finally:
        client.close()
        context.close()


def stats_of(engine: Engine) -> dict[str, float]:
    """Ask an engine's endpoint, whose address only a response tells."""
    answer = ask(prefill(engine), GetStats())
    assert isinstance(answer, Stats)
    return answer.counters


def wait_for_renewal(producer: Engine) -> list[str]:
    deadline = time.monotonic() + 10.0
    while not (renewals := producer.step().metadata.renewals):
        assert time.monotonic() < deadline, "no renewal came"
        time.sleep(0.001)
    return renewals


def test_lease_of_a_queued_request_is_renewed_until_it_loads(
    producer: Engine, consumer: Engine
) -> None:
    params = prefill(producer)
    consumer.add(PROMPT, {**params, "remote_lease_s": 0.3})
    for _ in range(3):
        assert wait_for_renewal(producer) == [params["transfer_id"]]
    assert len(consumer.step().metadata.loads) == 1
    assert stats_of(consumer)["renewing"] == 0


def test_lease_of_an_aborted_request_is_released_and_not_renewed(
    producer: Engine, consumer: Engine
) -> None:
    params = prefill(producer)
    consumer.abort(consumer.add(PROMPT, {**params, "remote_lease_s": 0.3}))
    counters = stats_of(consumer)
    assert (counters["renewing"], counters["releases_sent"]) == (0, 1)


def test_draining_engine_keeps_what_it_has_and_nothing_more(producer: Engine) -> None:
    params = prefill(producer)
    held = Outstanding(num_leases=1, num_blocks=NUM_BLOCKS, draining=True)
    assert ask(params, Drain()) == held
    num_free = producer.num_free_blocks
    request_id = producer.add(PROMPT, dict(KEEP))
    assert producer.step().finished[request_id] is None
    assert producer.num_free_blocks == num_free
    producer.step(sent=[params["remote_request_id"]])
    nothing = Outstanding(num_leases=0, num_blocks=0, draining=True)
    assert ask(params, Drain()) == nothing
    assert producer.num_requests == 0
