"""Worker halves with real tensors, transports and sessions; no engine."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest
import torch

from tests.unit.protocol.test_messages import FINGERPRINT
from vllm_pd.config import ConnectorConfig, Digests
from vllm_pd.connector.worker import PDConnectorWorker
from vllm_pd.errors import PDError, TransportUnavailableError
from vllm_pd.protocol.heads import heads_of_rank
from vllm_pd.protocol.messages import WorkerAddress
from vllm_pd.session.fetches import FetchRequest
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.producer import Grant

CONFIG = ConnectorConfig(lease_s=60.0, digests=Digests.ALWAYS)
TIMEOUT_S = 60.0
NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, HEAD_SIZE = 2, 7, FINGERPRINT.block_size, 24

Cache = dict[str, torch.Tensor | tuple[torch.Tensor, ...]]
Layout = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]

# Layouts make one layer's KV cache from (K and V, blocks, heads, tokens, head_size).


def cpu(layer: torch.Tensor) -> torch.Tensor:
    """Return (blocks, heads, tokens, 2 * head_size)."""
    return torch.cat((layer[0], layer[1]), dim=-1).contiguous()


def cuda(layer: torch.Tensor) -> torch.Tensor:
    """Return (blocks, heads, tokens, 2 * head_size), where the tokens come first in memory."""
    contents = cpu(layer)
    num_blocks, num_heads, block_size, length = contents.shape
    memory = contents.new_empty(num_blocks, block_size, num_heads, length)
    return memory.transpose(1, 2).copy_(contents)


def npu(layer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return K and V, each (blocks, tokens, heads, head_size)."""
    return tuple(part.transpose(1, 2).contiguous() for part in layer)


def latent(layer: torch.Tensor) -> torch.Tensor:
    """Return (blocks, tokens, 2 * head_size): there is one head, which all ranks hold."""
    return cpu(layer)[:, 0].contiguous()


@dataclass(frozen=True)
class Model:
    """A KV cache of which every element is another number."""

    num_kv_heads: int
    layout: Layout

    def content(self, first: int) -> torch.Tensor:
        """Return (layers, K and V, blocks, heads of the model, tokens, head_size)."""
        shape = NUM_LAYERS, 2, NUM_BLOCKS, self.num_kv_heads, BLOCK_SIZE, HEAD_SIZE
        numbers = torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.int32)
        return numbers.view(shape)

    def cache_of(self, content: torch.Tensor, rank: int, tp_size: int) -> Cache:
        """Return what a rank registers, each layer with its own memory."""
        held = heads_of_rank(rank, tp_size, self.num_kv_heads)
        return {
            f"layer.{i}": self.layout(layer[:, :, held.start : held.stop])
            for i, layer in enumerate(content)
        }


TWO_HEADS = Model(2, cpu)


class Engine:
    """All workers of one engine and its instance endpoint."""

    def __init__(
        self,
        engine_id: str,
        tp_size: int = 2,
        model: Model = TWO_HEADS,
        *,
        first: int = 0,
        config: ConnectorConfig = CONFIG,
    ) -> None:
        self.engine_id = engine_id
        self.model = model
        self.content = model.content(first)
        self.endpoint = InstanceEndpoint(config, engine_id=engine_id, tp_size=tp_size)
        self.workers: list[PDConnectorWorker] = []
        self.caches: list[Cache] = []
        fingerprint = msgspec.structs.replace(FINGERPRINT, num_kv_heads=model.num_kv_heads)
        addresses = []
        for rank in range(tp_size):
            worker = PDConnectorWorker(
                config,
                engine_id=engine_id,
                tp_rank=rank,
                tp_size=tp_size,
                fingerprint=fingerprint,
            )
            cache = model.cache_of(self.content, rank, tp_size)
            worker.register_kv_caches(cache)
            assert worker.address is not None
            host, port = worker.address
            addresses.append(WorkerAddress(tp_rank=rank, host=host, port=port))
            self.workers.append(worker)
            self.caches.append(cache)
        self.endpoint.set_workers(addresses, fingerprint)

    def finished(self, rank: int) -> tuple[set[str], set[str]]:
        """Poll one worker, as vLLM does every step, until it reports something."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            sending, recving = self.workers[rank].get_finished()
            if sending or recving:
                return sending, recving
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def check_caches(self, content: torch.Tensor) -> None:
        """Compare every element that any rank holds."""
        for rank, cache in enumerate(self.caches):
            expected = self.model.cache_of(content, rank, len(self.workers))
            for name, layer in cache.items():
                wanted = expected[name]
                pairs = zip(
                    layer if isinstance(layer, tuple) else (layer,),
                    wanted if isinstance(wanted, tuple) else (wanted,),
                    strict=True,
                )
                assert all(torch.equal(found, right) for found, right in pairs), (rank, name)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.endpoint.close()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*args: object, **kwargs: object) -> Engine:
        engines.append(Engine(*args, **kwargs))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engines(make_engine: Callable[..., Engine]) -> tuple[Engine, Engine]:
    return make_engine("p"), make_engine("d", first=1_000_000)


def load(producer: Engine, **changes: object) -> FetchRequest:
    fields: dict[str, object] = {
        "request_id": "decode-1",
        "transfer_id": "t",
        "remote_engine_id": producer.engine_id,
        "remote_host": "127.0.0.1",
        "remote_port": producer.endpoint.port,
        "block_offset": 0,
        "block_ids": (6, 5),
    }
    return FetchRequest(**{**fields, **changes})  # type: ignore[arg-type]


GRANT = Grant("t", "prefill-1", (2, 3))


# Unequal tensor parallelism


def fetch_everywhere(producer: Engine, consumer: Engine) -> None:
    """Fetch all but the first block of a prefill on all ranks; check all there is to check."""
    src, dst = (6, 1, 2, 5), (4, 6, 3)
    for worker in producer.workers:
        worker.start([], [Grant("t", "prefill-1", src)], [])
    for worker in consumer.workers:
        worker.start([load(producer, block_offset=1, block_ids=dst)], [], [])
    for rank, worker in enumerate(consumer.workers):
        assert consumer.finished(rank) == (set(), {"decode-1"})
        assert worker.take_invalid_block_ids() == set()
    for rank in range(len(producer.workers)):
        assert producer.finished(rank) == ({"prefill-1"}, set())
    expected = consumer.content.clone()
    expected[:, :, list(dst)] = producer.content[:, :, list(src[1:])]
    consumer.check_caches(expected)
    producer.check_caches(producer.content)
    for worker in (*producer.workers, *consumer.workers):
        assert worker.get_finished() == (set(), set())


def cases() -> Iterator[object]:
    small = list(itertools.product((1, 2, 4), (1, 2, 4)))
    large = [(8, 1), (1, 8), (8, 2), (2, 8), (8, 4), (4, 8), (8, 8)]
    for num_kv_heads in (8, 2):
        for transport, layout in (("shm", cpu), ("tcp", npu)):
            yield from ((*sizes, num_kv_heads, layout, transport) for sizes in small)
        for transport, layout in (("tcp", cpu), ("shm", npu)):
            for sizes in ((4, 1), (2, 4), (4, 2)):
                yield *sizes, num_kv_heads, layout, transport
        yield from ((*sizes, num_kv_heads, cpu, "shm") for sizes in large)
        yield 2, 8, num_kv_heads, npu, "tcp"
        for sizes in ((1, 2), (2, 1), (4, 1), (1, 4), (2, 2)):
            yield *sizes, num_kv_heads, cuda, "shm"
    for sizes in small:
        yield *sizes, 1, latent, "shm"
    for layout, transport in ((latent, "tcp"), (npu, "shm"), (npu, "tcp")):
        yield 2, 4, 1, layout, transport
        yield 4, 1, 1, layout, transport


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("tp_size", "consumer_tp_size", "num_kv_heads", "layout", "transport"),
    list(cases()),
    ids=name_of,
)
def test_every_rank_gets_its_heads_from_whoever_holds_them(
    make_engine: Callable[..., Engine],
    tp_size: int,
    consumer_tp_size: int,
    num_kv_heads: int,
    layout: Layout,
    transport: str,
) -> None:
    config = msgspec.structs.replace(CONFIG, transport=transport)
    model = Model(num_kv_heads, layout)
    producer = make_engine("p", tp_size, model, config=config)
    consumer = make_engine("d", consumer_tp_size, model, first=1_000_000, config=config)
    fetch_everywhere(producer, consumer)


def test_two_engines_of_different_sizes_fetch_from_one(
    make_engine: Callable[..., Engine],
) -> None:
    """Whoever has all of a prefill first ends its lease; the other one recomputes."""
    model = Model(8, npu)
    producer = make_engine("p", 2, model)
    consumers = [
        make_engine("d", 4, model, first=10**6),
        make_engine("e", 1, model, first=2 * 10**6),
    ]
    for worker in producer.workers:
        worker.start([], [GRANT, Grant("u", "prefill-2", (0, 1))], [])
    for consumer, transfer_id in zip(consumers, "tu", strict=True):
        for worker in consumer.workers:
            worker.start([load(producer, transfer_id=transfer_id)], [], [])
    for consumer, blocks in zip(consumers, ([2, 3], [0, 1]), strict=True):
        for rank in range(len(consumer.workers)):
            assert consumer.finished(rank) == (set(), {"decode-1"})
        expected = consumer.content.clone()
        expected[:, :, [6, 5]] = producer.content[:, :, blocks]
        consumer.check_caches(expected)
    for rank in range(2):
        freed: set[str] = set()
        while freed != {"prefill-1", "prefill-2"}:
            freed |= producer.finished(rank)[0]


@pytest.mark.parametrize(("tp_size", "num_kv_heads"), [(2, 3), (4, 6)])
def test_heads_that_do_not_divide_are_refused_at_registration(
    tp_size: int, num_kv_heads: int
) -> None:
    fingerprint = msgspec.structs.replace(FINGERPRINT, num_kv_heads=num_kv_heads)
    worker = PDConnectorWorker(
        CONFIG, engine_id="d", tp_rank=0, tp_size=tp_size, fingerprint=fingerprint
    )
    with pytest.raises(PDError, match="do not divide"):
        worker.register_kv_caches({"layer.0": torch.zeros(2, 1, BLOCK_SIZE, 8)})


# What is reported


def test_failed_fetch_is_received_with_all_its_blocks_invalid(
    engines: tuple[Engine, Engine],
) -> None:
    producer, consumer = engines
    consumer.workers[0].start([load(producer, remote_engine_id="gone")], [], [])
    assert consumer.finished(0) == (set(), {"decode-1"})
    assert consumer.workers[0].take_invalid_block_ids() == {5, 6}
    assert consumer.workers[0].take_invalid_block_ids() == set()


def test_one_rank_failing_leaves_the_other_alone(engines: tuple[Engine, Engine]) -> None:
    producer, consumer = engines
    producer.workers[1].start([], [GRANT], [])
    producer.workers[0].start([], [GRANT], ["t"])  # released at once
    for rank in range(2):
        consumer.workers[rank].start([load(producer)], [], [])
        assert consumer.finished(rank) == (set(), {"decode-1"})
    assert consumer.workers[0].take_invalid_block_ids() == {5, 6}
    assert consumer.workers[1].take_invalid_block_ids() == set()


def test_rank_that_gets_its_heads_from_two_fails_if_one_of_them_does(
    make_engine: Callable[..., Engine],
) -> None:
    producer, consumer = make_engine("p", 2), make_engine("d", 1, first=1_000_000)
    producer.workers[0].start([], [GRANT], [])
    producer.workers[1].start([], [GRANT], ["t"])
    consumer.workers[0].start([load(producer)], [], [])
    assert consumer.finished(0) == (set(), {"decode-1"})
    assert consumer.workers[0].take_invalid_block_ids() == {5, 6}
    assert consumer.workers[0].get_finished() == (set(), set())


def test_load_before_registration_is_reported_as_failed() -> None:
    worker = PDConnectorWorker(CONFIG, engine_id="d", tp_rank=0, tp_size=1, fingerprint=FINGERPRINT)
    request = FetchRequest("decode-1", "t", "p", "127.0.0.1", 1, 0, (6, 7))
    worker.start([request], [], [])
    assert worker.get_finished() == (set(), {"decode-1"})
    assert worker.take_invalid_block_ids() == {6, 7}


def test_what_ended_in_the_last_look_of_a_step_is_reported_in_it(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PDConnectorWorker, "pump", lambda _: True)
    monkeypatch.setattr("vllm_pd.connector.worker.LANDING_WAIT_S", TIMEOUT_S)
    producer, consumer = engines
    producer.workers[0].start([], [GRANT], [])
    consumer.workers[0].start([load(producer)], [], [])
    assert consumer.workers[0].get_finished() == (set(), {"decode-1"})


def test_a_transport_that_fails_in_the_last_look_costs_no_report(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: PDConnectorWorker) -> bool:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(PDConnectorWorker, "pump", fail)
    _, consumer = engines
    consumer.workers[0].fail([("decode-1", (5,))])
    assert consumer.workers[0].get_finished() == (set(), {"decode-1"})
    assert consumer.workers[0].take_invalid_block_ids() == {5}


def test_memory_of_a_device_is_refused_with_the_reason_of_each_transport() -> None:
    worker = PDConnectorWorker(CONFIG, engine_id="d", tp_rank=0, tp_size=1, fingerprint=FINGERPRINT)
    cache = torch.zeros(NUM_BLOCKS, 2, BLOCK_SIZE, HEAD_SIZE, device="meta")
    with pytest.raises(TransportUnavailableError, match=r"shm.*meta.*tcp.*meta"):
        worker.register_kv_caches({"layer.0": cache})


@pytest.mark.parametrize(("device", "suffix"), [("meta", ":BNHC"), ("cpu", "")])
def test_fingerprint_of_a_device_names_the_order_in_memory(device: str, suffix: str) -> None:
    """Two orders may have blocks of one length; on the CPU there is one order only."""
    worker = PDConnectorWorker(CONFIG, engine_id="d", tp_rank=0, tp_size=1, fingerprint=FINGERPRINT)
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 2, HEAD_SIZE, device=device).transpose(1, 2)
    with contextlib.suppress(TransportUnavailableError):  # no transport reaches that device
        worker.register_kv_caches({"layer.0": cache})
    worker.close()
    assert worker.fingerprint.kv_layout == FINGERPRINT.kv_layout + suffix


def test_blocks_of_wholly_cached_prompts_are_counted_in_bytes_once(
    engines: tuple[Engine, Engine],
) -> None:
    worker = engines[1].workers[0]
    for num_blocks in (2, 0, 1):
        worker.add_saved_blocks(num_blocks)
    block_len = NUM_LAYERS * 2 * BLOCK_SIZE * HEAD_SIZE * torch.int32.itemsize
    assert worker.take_num_bytes_saved() == 3 * block_len
    assert worker.take_num_bytes_saved() == 0


def test_transports_and_their_modes_are_told(engines: tuple[Engine, Engine]) -> None:
    info = engines[0].workers[0].transport_info()
    assert {name: mode for name, (mode, _) in info.items()} == {"shm": "memfd", "tcp": "direct"}
