"""Stats of the workers inside vLLM's real scheduler: to the front end, to a timeline.

Runs in whichever vLLM is importable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

from tests.connector.driving import prefill
from tests.unit.connector.test_timeline import fetched
from vllm_pd.config import ConnectorConfig
from vllm_pd.protocol.messages import GetStats
from vllm_pd.session.channel import ControlContext
from vllm_pd.session.stats import Outcome, SessionStats

if TYPE_CHECKING:
    from tests.connector.harness import Engine
    from vllm_pd.connector.stats import PDConnectorStats

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]

PROMPT = list(range(100))


def worker_stats(rank: int = 0, **counts: Any) -> PDConnectorStats:
    from vllm_pd.connector.stats import PDConnectorStats

    return PDConnectorStats.of_worker(rank, SessionStats(**counts), {"shm": ("memfd", "")})


def report(
    engine: Engine,
    stats: PDConnectorStats | None,
    *,
    received: Iterable[str] = (),
    invalid: Iterable[int] = (),
) -> dict[str, Any] | None:
    """Make a step without tokens in which the workers report; return what the front end gets."""
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    scheduled = engine.scheduler.schedule()
    assert scheduled.total_num_scheduled_tokens == 0
    output = ModelRunnerOutput.with_kv_conn_output_only(
        KVConnectorOutput(
            finished_recving=set(received),
            invalid_block_ids=set(invalid),
            kv_connector_stats=stats,
        )
    )
    answers = engine.scheduler.update_from_output(scheduled, output)
    (answer,) = answers.values()
    assert answer.scheduler_stats is not None
    return answer.scheduler_stats.kv_connector_stats


def waiting_for(consumer: Engine, producer: Engine, *, timeline: bool) -> str:
    """Return a request that waits for the KV of a finished prefill."""
    prefill = producer.add(PROMPT, {"do_remote_decode": True})
    params = producer.step().finished[prefill]
    assert params is not None
    request_id = consumer.add(PROMPT, {**params, "timeline": True} if timeline else params)
    assert consumer.step().metadata.loads
    return request_id


def send_garbage(engine: Engine) -> None:
    """Send two frames that are no messages, and see to it that they are counted."""
    params = prefill(engine)  # only an answer tells where the endpoint is
    context = ControlContext(ConnectorConfig())
    client = context.client(params["remote_host"], params["remote_port"])
    for _ in range(2):
        client.socket.send(b"\xc1")
    client.send(GetStats())
    assert client.socket.poll(10_000)
    assert client.receive() is not None
    client.close()
    context.close()


def answer_of(engine: Engine, request_id: str) -> dict[str, Any] | None:
    for _ in range(10):
        finished = engine.step().finished
        if request_id in finished:
            return finished[request_id]
    raise AssertionError(f"{request_id} did not end")


def test_stats_of_a_step_without_tokens_reach_the_front_end(consumer: Engine) -> None:
    stats = worker_stats(fetches=[fetched()], num_blocks_held=3)
    expected = dict(stats.data)
    assert report(consumer, stats) == expected


def test_drops_of_the_instance_endpoint_reach_the_front_end_once(producer: Engine) -> None:
    send_garbage(producer)
    seen = report(producer, worker_stats(num_dropped_frames=Counter(malformed=1)))
    assert seen is not None
    assert seen["num_dropped_frames"] == {"malformed": 3}
    assert seen["workers"].keys() == {"0"}
    seen = report(producer, worker_stats(num_leases_granted=1))
    assert seen is not None
    assert seen["num_dropped_frames"] == {}


def test_drops_of_the_instance_endpoint_are_not_lost_without_news_of_workers(
    producer: Engine,
) -> None:
    """0.32 tells them at once, 0.23 with the next news of a worker."""
    send_garbage(producer)
    alone = report(producer, None)
    with_news = report(producer, worker_stats(num_leases_granted=1))
    told = [seen["num_dropped_frames"] for seen in (alone, with_news) if seen is not None]
    assert sum(map(Counter, told), Counter()) == {"malformed": 2}


def test_step_without_news_sends_no_stats(consumer: Engine) -> None:
    assert report(consumer, None) is None


def test_front_end_sees_the_last_state_of_all_ranks(consumer: Engine) -> None:
    """Ranks report in different steps; a sum over those of one step would be wrong."""
    both = worker_stats(0, num_leases=1)
    both.aggregate(worker_stats(1, num_leases=2))
    report(consumer, both)
    seen = report(consumer, worker_stats(1, num_leases=0))
    assert seen is not None
    assert {rank: state["num_leases"] for rank, state in seen["workers"].items()} == {
        "0": 1,
        "1": 0,
    }


def test_request_that_asked_is_answered_with_its_timeline(
    producer: Engine, consumer: Engine
) -> None:
    request_id = waiting_for(consumer, producer, timeline=True)
    fetch = fetched(request_id, num_bytes=12345)
    report(consumer, worker_stats(fetches=[fetch]), received=[request_id])
    params = answer_of(consumer, request_id)
    assert params is not None
    assert list(params) == ["timeline"]
    timeline = params["timeline"]
    assert (timeline["outcome"], timeline["num_bytes"]) == ("ok", 12345)
    assert timeline["engine_queue_s"] >= 0


def test_request_that_did_not_ask_is_answered_as_by_any_vllm(
    producer: Engine, consumer: Engine
) -> None:
    request_id = waiting_for(consumer, producer, timeline=False)
    report(consumer, worker_stats(fetches=[fetched(request_id)]), received=[request_id])
    assert answer_of(consumer, request_id) is None


def test_request_that_was_recomputed_tells_how_its_fetch_failed(
    producer: Engine, consumer: Engine
) -> None:
    request_id = waiting_for(consumer, producer, timeline=True)
    fetch = fetched(request_id, outcome=Outcome.CORRUPT)
    stats, invalid = worker_stats(fetches=[fetch]), consumer.block_ids(request_id)
    report(consumer, stats, received=[request_id], invalid=invalid)
    params = answer_of(consumer, request_id)
    assert params is not None
    assert params["timeline"]["outcome"] == "corrupt"
