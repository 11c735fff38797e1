"""Worker halves with real tensors, transports and sessions; no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from tests.unit.protocol.test_messages import FINGERPRINT
from vllm_pd.config import ConnectorConfig
from vllm_pd.connector.worker import PDConnectorWorker
from vllm_pd.errors import TransportUnavailableError
from vllm_pd.protocol.messages import WorkerAddress
from vllm_pd.session.consumer import FetchRequest
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.producer import Grant

CONFIG = ConnectorConfig(lease_s=20.0)
TP_SIZE = 2
SHAPE = (8, 1, 16, 128)  # blocks, heads, block_size, 2 * head_size


class Engine:
    """All workers of one engine and its instance endpoint."""

    def __init__(self, engine_id: str, fill: float) -> None:
        self.engine_id = engine_id
        self.endpoint = InstanceEndpoint(CONFIG, engine_id=engine_id, tp_size=TP_SIZE)
        self.workers: list[PDConnectorWorker] = []
        self.caches: list[dict[str, torch.Tensor]] = []
        addresses = []
        for rank in range(TP_SIZE):
            worker = PDConnectorWorker(
                CONFIG,
                engine_id=engine_id,
                tp_rank=rank,
                tp_size=TP_SIZE,
                fingerprint=FINGERPRINT,
            )
            layers = torch.full((3, *SHAPE), fill + rank, dtype=torch.bfloat16)
            cache = {f"layer.{i}": layers[i] for i in range(3)}
            worker.register_kv_caches(cache)
            assert worker.address is not None
            host, port = worker.address
            addresses.append(WorkerAddress(tp_rank=rank, host=host, port=port))
            self.workers.append(worker)
            self.caches.append(cache)
        self.endpoint.set_workers(addresses, FINGERPRINT)

    def finished(self, rank: int) -> tuple[set[str], set[str]]:
        """Poll one worker, as vLLM does every step, until it reports something."""
        deadline = time.monotonic() + 10
        while True:
            sending, recving = self.workers[rank].get_finished()
            if sending or recving:
                return sending, recving
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.endpoint.close()


@pytest.fixture
def engines() -> Iterator[tuple[Engine, Engine]]:
    producer, consumer = Engine("p", 1.0), Engine("d", 5.0)
    yield producer, consumer
    producer.close()
    consumer.close()


def load(producer: Engine, **changes: object) -> FetchRequest:
    fields: dict[str, object] = {
        "request_id": "decode-1",
        "transfer_id": "t",
        "remote_engine_id": producer.engine_id,
        "remote_host": "127.0.0.1",
        "remote_port": producer.endpoint.port,
        "block_offset": 0,
        "block_ids": (6, 7),
    }
    return FetchRequest(**{**fields, **changes})  # type: ignore[arg-type]


def test_every_rank_fetches_from_its_own_and_reports_once(engines: tuple[Engine, Engine]) -> None:
    producer, consumer = engines
    for rank in range(TP_SIZE):
        producer.workers[rank].start([], [Grant("t", "prefill-1", (2, 3))], [])
        consumer.workers[rank].start([load(producer)], [], [])
    for rank in range(TP_SIZE):
        assert consumer.finished(rank) == (set(), {"decode-1"})
        assert producer.finished(rank) == ({"prefill-1"}, set())
        assert consumer.workers[rank].take_invalid_block_ids() == set()
        assert consumer.workers[rank].get_finished() == (set(), set())
        for cache in consumer.caches[rank].values():
            assert cache[6:8].eq(1.0 + rank).all()
            assert cache[:6].eq(5.0 + rank).all()


def test_failed_fetch_is_received_with_all_its_blocks_invalid(
    engines: tuple[Engine, Engine],
) -> None:
    producer, consumer = engines
    consumer.workers[0].start([load(producer, remote_engine_id="gone")], [], [])
    assert consumer.finished(0) == (set(), {"decode-1"})
    assert consumer.workers[0].take_invalid_block_ids() == {6, 7}
    assert consumer.workers[0].take_invalid_block_ids() == set()


def test_one_rank_failing_leaves_the_other_alone(engines: tuple[Engine, Engine]) -> None:
    producer, consumer = engines
    producer.workers[1].start([], [Grant("t", "prefill-1", (2, 3))], [])
    producer.workers[0].start([], [Grant("t", "prefill-1", (2, 3))], ["t"])  # released at once
    for rank in range(TP_SIZE):
        consumer.workers[rank].start([load(producer)], [], [])
        assert consumer.finished(rank) == (set(), {"decode-1"})
    assert consumer.workers[0].take_invalid_block_ids() == {6, 7}
    assert consumer.workers[1].take_invalid_block_ids() == set()


def test_load_before_registration_is_reported_as_failed() -> None:
    worker = PDConnectorWorker(CONFIG, engine_id="d", tp_rank=0, tp_size=1, fingerprint=FINGERPRINT)
    request = FetchRequest("decode-1", "t", "p", "127.0.0.1", 1, 0, (6, 7))
    worker.start([request], [], [])
    assert worker.get_finished() == (set(), {"decode-1"})
    assert worker.take_invalid_block_ids() == {6, 7}


def test_memory_of_a_device_is_refused_with_the_reason_of_each_transport() -> None:
    worker = PDConnectorWorker(CONFIG, engine_id="d", tp_rank=0, tp_size=1, fingerprint=FINGERPRINT)
    with pytest.raises(TransportUnavailableError, match=r"shm.*meta.*tcp.*meta"):
        worker.register_kv_caches({"layer.0": torch.zeros(SHAPE, device="meta")})
