"""What a machine can do to the sessions: no descriptors, no memfds, jumps of the clock, stalls."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.transport_conformance import make_worker
from tests.unit.session.intruders import Counts, check_service, wait_until
from tests.unit.session.test_manager import GRANT, LAYOUT, ONE_HEAD, Engine, fetch_request
from tests.unit.session.test_manager import make_engine as make_one
from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PeerLostError, TransferTimeoutError
from vllm_pd.protocol.messages import WorkerAddress
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.manager import LocalWorker, SessionManager
from vllm_pd.session.producer import Grant
from vllm_pd.transport import memory
from vllm_pd.transport.base import Transport, TransportOptions
from vllm_pd.transport.payload import DirectPayload
from vllm_pd.transport.registry import open_transports
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.sources import MappedSource
from vllm_pd.transport.tcp import TcpTransport

REPO = Path(__file__).resolve().parents[3]
CONFIG = ConnectorConfig(lease_s=20.0, handshake_timeout_s=5.0, transfer_timeout_s=10.0)
KINDS: dict[str, type[Transport]] = {"shm": ShmTransport, "tcp": TcpTransport}

Make = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[Make]:
    """Makes engines that are closed after the test."""
    engines: list[Engine] = []

    def make(config: ConnectorConfig = CONFIG, kind: type[Transport] | None = None) -> Engine:
        engine = make_auto_engine(config) if kind is None else make_one(config, kind=kind)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def make_auto_engine(config: ConnectorConfig) -> Engine:
    """Make an engine with all transports that work, as an instance has them."""
    engine_id = os.urandom(4).hex()
    shm = ShmTransport(TransportOptions())
    worker = make_worker(engine_id, shm)
    shm.close()
    transports, _ = open_transports(None, worker.regions, TransportOptions())
    worker.transport = next(iter(transports.values()))
    endpoint = InstanceEndpoint(config, engine_id=engine_id, tp_size=1)
    local = LocalWorker(engine_id, 0, 1, ONE_HEAD, LAYOUT)
    manager = SessionManager(config, local, transports)
    address = WorkerAddress(tp_rank=0, host=manager.host, port=manager.port)
    endpoint.set_workers([address], ONE_HEAD)
    return Engine(worker, endpoint, manager, engine_id)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> type[Transport]:
    return KINDS[request.param]


def fetch_after_a_lost_session(producer: Engine, consumer: Engine) -> None:
    """Fetch once: it fails if the consumer has not heard that the producer gave it up."""
    producer.manager.grant(Grant("lost", "prefill-lost", (0, 1)))
    consumer.manager.fetch(fetch_request(producer, "lost"))
    error = consumer.wait_fetched().error
    assert error is None or isinstance(error, PeerLostError)
    producer.manager.release("lost")
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-lost"]


class Stall:
    """Holds the consumers of this process up in the middle of a transfer."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.over = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.over.wait(20.0)


@pytest.fixture
def stall(kind: type[Transport], monkeypatch: pytest.MonkeyPatch) -> Iterator[Stall]:
    """Every transfer stops where it has moved nothing yet, until ``over`` is set."""
    stall = Stall()
    if kind is ShmTransport:
        read = MappedSource.read

        def read_later(*args: Any) -> None:
            stall.wait()
            read(*args)

        monkeypatch.setattr(MappedSource, "read", read_later)
    else:
        land = DirectPayload.land

        def land_later(*args: Any) -> Any:
            stall.wait()
            return land(*args)

        monkeypatch.setattr(DirectPayload, "land", land_later)
    yield stall
    stall.over.set()


def test_lease_that_expires_during_a_read_is_kept_until_its_end(
    kind: type[Transport], make_engine: Make, stall: Stall
) -> None:
    producer = make_engine(ConnectorConfig(lease_s=0.1), kind)
    consumer = make_engine(kind=kind)
    counts = Counts(producer)
    consumer.manager.fetch(fetch_request(producer))
    producer.manager.grant(GRANT)
    assert stall.reached.wait(10.0)
    time.sleep(0.3)  # the lease, three times
    producer.manager.release("t1")  # nor does this end it now
    # A command that was carried out after the lease's end and the release proves both are seen.
    producer.manager.grant(Grant("t2", "prefill-t2", (0,)))
    producer.manager.release("t2")
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t2"]
    stall.over.set()
    assert consumer.wait_fetched().error is None
    assert consumer.worker.block(0, 1) == producer.worker.block(0, 6)
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
    check_service(producer, consumer)
    counts.check_accounts()
    assert counts.ended["expired"] == 0


def test_read_that_takes_too_long_fails_and_its_blocks_are_freed_once(
    kind: type[Transport], make_engine: Make, stall: Stall
) -> None:
    hasty = ConnectorConfig(lease_s=0.1, transfer_timeout_s=0.3)
    producer, consumer = make_engine(hasty, kind), make_engine(hasty, kind)
    counts = Counts(producer)
    consumer.manager.fetch(fetch_request(producer))
    producer.manager.grant(GRANT)
    assert stall.reached.wait(10.0)
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
    # vLLM has them back and writes; a copy that goes on must not count.
    before = [producer.worker.block(region, 6) for region in range(2)]
    for region in range(2):
        producer.worker.fill(region, 6, value=99)
    stall.over.set()
    if consumer.wait_fetched().error is None:
        assert kind is TcpTransport, "one that was sent in time counts"
        assert before == [consumer.worker.block(region, 1) for region in range(2)]
    fetch_after_a_lost_session(producer, consumer)
    check_service(producer, consumer)
    counts.check_accounts()


class TestClockJump:
    """The manager's clock goes an hour forward, as after a suspended virtual machine."""

    @pytest.fixture
    def jump(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
        offset_s = [0.0]
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + offset_s[0], sleep=time.sleep)
        monkeypatch.setattr("vllm_pd.session.manager.time", clock)

        def jump(seconds: float) -> None:
            offset_s[0] += seconds

        return jump

    def test_fetch_in_the_middle_times_out_once_and_the_next_one_works(
        self,
        kind: type[Transport],
        make_engine: Make,
        stall: Stall,
        jump: Callable[[float], None],
    ) -> None:
        producer, consumer = make_engine(kind=kind), make_engine(kind=kind)
        counts = Counts(producer)
        outcomes = Counts(consumer)
        consumer.manager.fetch(fetch_request(producer))
        producer.manager.grant(GRANT)
        assert stall.reached.wait(10.0)
        jump(3600.0)
        for engine in (producer, consumer):
            engine.manager.renew("nothing")  # it looks at the clock now
        if kind is TcpTransport:  # its consumer is held up with its session thread
            stall.over.set()
        wait_until(lambda: counts.update().last.num_leases == 0, "the lease is over")
        stall.over.set()
        # Over tcp all may have come before anybody looked.
        error = consumer.wait_fetched().error
        assert isinstance(error, TransferTimeoutError) or kind is TcpTransport
        assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
        fetch_after_a_lost_session(producer, consumer)
        check_service(producer, consumer)
        counts.check_accounts()
        wait_until(lambda: outcomes.update().outcomes.total() == 3, "all are counted")

    def test_idle_engines_forget_leases_and_serve_on(
        self, kind: type[Transport], make_engine: Make, jump: Callable[[float], None]
    ) -> None:
        producer, consumer = make_engine(kind=kind), make_engine(kind=kind)
        check_service(producer, consumer)
        for number in range(3):
            producer.manager.grant(Grant(f"t{number}", f"prefill-{number}", (1,)))
        counts = Counts(producer)
        wait_until(lambda: counts.update().last.num_leases == 3, "all are granted")
        jump(3600.0)
        producer.manager.renew("nothing")
        assert len(producer.wait(lambda r: len(r.freed) == 3).freed) == 3
        check_service(producer, consumer)
        assert counts.update().ended == {"fetched": 2, "expired": 3}


class TestRefusals:
    """What the kernel does not give."""

    def test_without_memfds_the_kernel_copies(
        self, make_engine: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "memfd_create", refuse)
        producer, consumer = make_engine(), make_engine()
        assert producer.worker.transport.mode[0] == "process_vm_readv"
        check_service(producer, consumer)
        assert fetched_over(consumer) == {"shm"}

    def test_without_memfds_and_without_reading_processes_it_is_tcp(
        self, make_engine: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "memfd_create", refuse)
        monkeypatch.setattr(memory, "read_process", refuse)
        producer, consumer = make_engine(), make_engine()
        check_service(producer, consumer)
        assert fetched_over(consumer) == {"tcp"}

    def test_only_one_side_without_memfds_is_enough(
        self, make_engine: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", refuse)
            producer = make_engine()
        consumer = make_engine()
        check_service(producer, consumer)
        check_service(consumer, producer)


def refuse(*_: object) -> int:
    raise PermissionError(1, "Operation not permitted")


def fetched_over(engine: Engine) -> set[str]:
    stats = engine.manager.take_stats()
    assert stats is not None
    return {fetch.transport for fetch in stats.fetches}


def test_1000_fetches_with_releases_in_flight_end_once_each(
    kind: type[Transport], make_engine: Make
) -> None:
    producer, consumer = make_engine(kind=kind), make_engine(kind=kind)
    counts, outcomes = Counts(producer), Counts(consumer)
    check_service(producer, consumer)
    rng = random.Random(5)
    actions: list[tuple[float, str, str]] = []
    for number in range(1000):
        transfer_id = f"t{number}"
        start = rng.random() * 100
        actions += [
            (start + rng.random(), "grant", transfer_id),
            (start + rng.random(), "fetch", transfer_id),
            (start + rng.random() * 2, "release", transfer_id),
        ]
    granted: set[str] = set()
    for _, action, transfer_id in sorted(actions):
        if action == "grant":
            granted.add(transfer_id)
            block_ids = tuple(rng.sample(range(8), 3))
            producer.manager.grant(Grant(transfer_id, f"prefill-{transfer_id}", block_ids))
        elif action == "fetch":
            consumer.manager.fetch(fetch_request(producer, transfer_id))
        elif transfer_id in granted:
            producer.manager.release(transfer_id)
    # Those that were released before they were granted are ended by whoever fetches them.
    freed = producer.wait(lambda r: len(r.freed) >= 1000).freed
    assert sorted(freed) == sorted(f"prefill-t{n}" for n in range(1000))
    fetched = consumer.wait(lambda r: len(r.fetched) >= 1000).fetched
    assert len({result.request_id for result in fetched}) == len(fetched) == 1000
    check_service(producer, consumer)
    counts.check_accounts()
    wait_until(lambda: outcomes.update().outcomes.total() == 1002, "all are counted")
    assert counts.ended.total() == 1002
    assert counts.ended["released"] > 0
    assert set(outcomes.outcomes) <= {"ok", "expired"}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_without_descriptors_fetches_fail_and_with_them_work_again(name: str) -> None:
    """In a process of its own, as the limit is the process's."""
    command = [sys.executable, "-m", "tests.unit.session.short_of_descriptors", name]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
