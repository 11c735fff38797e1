from __future__ import annotations

import logging
import random
import select
import time
from collections.abc import Callable, Iterator

import pytest

from tests.transport_conformance import (
    SESSION,
    TransportConformance,
    Worker,
    drive,
    introduce,
    make_worker,
    outcomes_of,
)
from vllm_pd.config import Digests
from vllm_pd.errors import (
    ConfigError,
    DigestMismatchError,
    LocalProtocolError,
    PeerLostError,
    TransportUnavailableError,
)
from vllm_pd.transport.base import TransferOutcome, Transport, TransportOptions
from vllm_pd.transport.fault_spec import FaultSpec
from vllm_pd.transport.faults import FaultyTransport, faulty_options
from vllm_pd.transport.registry import open_transports
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport

KINDS = {"shm": ShmTransport, "tcp": TcpTransport}
NONE = FaultSpec()


def make_faulty(kind: str, spec: FaultSpec) -> Transport:
    options = faulty_options(TransportOptions(), spec, kind)
    return FaultyTransport(KINDS[kind](options), spec)


class TestWithoutFaultsOverShm(TransportConformance):
    def make_transport(self) -> Transport:
        return make_faulty("shm", NONE)


class TestWithoutFaultsOverTcp(TransportConformance):
    def make_transport(self) -> Transport:
        return make_faulty("tcp", NONE)


Pair = Callable[[FaultSpec, FaultSpec], tuple[Worker, Worker]]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make_pair(kind: str) -> Iterator[Pair]:
    """Makes a producer and a consumer with their faults."""
    workers: list[Worker] = []

    def make(producer: FaultSpec, consumer: FaultSpec) -> tuple[Worker, Worker]:
        left = make_worker("p0", make_faulty(kind, producer))
        right = make_worker("decode", make_faulty(kind, consumer))
        workers.extend((left, right))
        introduce(left, right)
        return left, right

    yield make
    for worker in workers:
        worker.transport.close()


def transfer(
    producer: Worker, consumer: Worker, *transfer_ids: int, digests: Digests = Digests.ALWAYS
) -> None:
    for transfer_id in transfer_ids:
        producer.transport.send_blocks(SESSION, transfer_id, [6, 2], digests=digests)
        consumer.transport.recv_blocks(SESSION, transfer_id, [0, 5])


def is_readable(worker: Worker, timeout_s: float = 0.0) -> bool:
    return bool(select.select([worker.transport.fileno()], [], [], timeout_s)[0])


def test_a_dropped_half_ends_with_its_peer(make_pair: Pair) -> None:
    producer, consumer = make_pair(NONE, FaultSpec(drop=1.0))
    transfer(producer, consumer, 1)
    drive(producer, consumer, until=lambda: True)
    consumer.transport.remove_peer(SESSION)
    assert is_readable(consumer)
    (outcome,) = consumer.transport.poll()
    assert isinstance(outcome.error, PeerLostError)
    assert consumer.transport.poll() == []


def test_a_dropped_half_ends_when_the_transport_closes(make_pair: Pair) -> None:
    producer, consumer = make_pair(FaultSpec(drop=1.0), NONE)
    transfer(producer, consumer, 1)
    producer.transport.close()
    (outcome,) = producer.transport.poll()
    assert isinstance(outcome.error, PeerLostError)


@pytest.mark.parametrize("is_sender", [True, False])
def test_a_delayed_half_arrives_late_and_whole(make_pair: Pair, is_sender: bool) -> None:
    late = FaultSpec(delay=1.0, delay_s=0.05)
    producer, consumer = make_pair(*((late, NONE) if is_sender else (NONE, late)))
    started = time.monotonic()
    transfer(producer, consumer, 1)
    outcomes_of(producer, consumer)
    assert time.monotonic() - started >= 0.05
    assert consumer.block(0, 0) == producer.block(0, 6)


def test_waiting_for_a_delayed_half_does_not_spin(make_pair: Pair) -> None:
    producer, consumer = make_pair(NONE, FaultSpec(delay=1.0, delay_s=30.0))
    transfer(producer, consumer, 1, 2)
    drive(producer, consumer, until=lambda: True)
    assert not is_readable(consumer, 0.05)


def test_transfers_behind_a_delayed_one_wait_for_it(make_pair: Pair) -> None:
    # With this seed the first of the consumer's halves is delayed and the next ones are not.
    spec = first_only("delay", FaultSpec(delay=0.5, delay_s=0.05))
    producer, consumer = make_pair(NONE, spec)
    started = time.monotonic()
    transfer(producer, consumer, 1, 2, 3)
    seen = outcomes_of(consumer, producer, count=3)["decode"]
    assert [outcome.transfer_id for outcome in seen] == [1, 2, 3]
    assert time.monotonic() - started >= 0.05


def test_a_reordered_half_follows_the_next_one(make_pair: Pair) -> None:
    spec = first_only("reorder", FaultSpec(reorder=0.5, reorder_s=30.0))
    producer, consumer = make_pair(NONE, spec)
    transfer(producer, consumer, 1)
    drive(producer, consumer, until=lambda: True)
    transfer(producer, consumer, 2)
    seen = outcomes_of(producer, consumer, count=2)["decode"]
    assert [(outcome.transfer_id, outcome.error) for outcome in seen] == [(1, None), (2, None)]


def test_a_reordered_half_without_a_next_one_follows_in_time(make_pair: Pair) -> None:
    producer, consumer = make_pair(FaultSpec(reorder=1.0, reorder_s=0.02), NONE)
    transfer(producer, consumer, 1)
    assert outcomes_of(producer, consumer)["decode"][0].error is None


@pytest.mark.parametrize("is_sender", [True, False])
def test_a_cut_loses_the_peer_on_both_sides(make_pair: Pair, is_sender: bool) -> None:
    cutting = FaultSpec(cut=1.0)
    producer, consumer = make_pair(*((cutting, NONE) if is_sender else (NONE, cutting)))
    transfer(producer, consumer, 1)
    assert is_readable(producer if is_sender else consumer)
    cutter, other = (producer, consumer) if is_sender else (consumer, producer)
    (outcome,) = outcomes_of(cutter)[cutter.name]
    assert isinstance(outcome.error, PeerLostError)
    other.transport.remove_peer(SESSION)  # as its session does, once it hears of it
    assert isinstance(outcomes_of(other)[other.name][0].error, PeerLostError)


def test_transfers_after_a_cut_fail_until_the_peer_comes_back(make_pair: Pair, kind: str) -> None:
    producer, consumer = make_pair(NONE, first_only("cut", FaultSpec(cut=0.5), kind))
    transfer(producer, consumer, 1)
    outcomes_of(consumer)
    transfer(producer, consumer, 2)
    assert isinstance(outcomes_of(consumer)["decode"][0].error, PeerLostError)
    for worker, other in ((producer, consumer), (consumer, producer)):
        worker.transport.remove_peer(SESSION)
        worker.transport.poll()
        worker.transport.add_peer("session-2", other.transport.local_endpoint())
    producer.transport.send_blocks("session-2", 3, [6])
    consumer.transport.recv_blocks("session-2", 3, [0])
    assert outcomes_of(producer, consumer)["decode"][0].error is None
    assert consumer.block(0, 0) == producer.block(0, 6)


def test_a_damaged_byte_is_found_by_full_digests(make_pair: Pair) -> None:
    producer, consumer = make_pair(NONE, FaultSpec(corrupt=1.0))
    transfer(producer, consumer, 1)
    seen = outcomes_of(producer, consumer)
    assert isinstance(seen["decode"][0].error, DigestMismatchError)
    assert seen["p0"][0].error is not None


def test_without_digests_one_byte_is_wrong(make_pair: Pair) -> None:
    producer, consumer = make_pair(NONE, FaultSpec(corrupt=1.0))
    transfer(producer, consumer, 1, digests=Digests.OFF)
    assert outcomes_of(producer, consumer)["decode"][0].error is None
    sent = producer.block(0, 6) + producer.block(0, 2)
    received = consumer.block(0, 0) + consumer.block(0, 5)
    assert sum(a != b for a, b in zip(sent, received, strict=True)) == 1


def test_the_same_seed_makes_the_same_decisions(
    make_pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    def decisions(seed: int) -> list[str]:
        spec = FaultSpec(drop=0.3, delay=0.2, delay_s=1e-3, reorder=0.2, reorder_s=1e-3, seed=seed)
        worker = make_pair(NONE, spec)[1]
        caplog.clear()
        for transfer_id in range(40):
            worker.transport.recv_blocks(SESSION, transfer_id, [0])
        return [m for m in caplog.messages if m.startswith("injected fault")]

    caplog.set_level(logging.WARNING)
    first = decisions(seed=1)
    assert first == decisions(seed=1)
    assert first != decisions(seed=2)
    assert {message.split()[2] for message in first} == {"drop,", "delay,", "reorder,"}


def test_with_all_faults_at_once_the_contract_holds(make_pair: Pair) -> None:
    everything = FaultSpec(
        drop=0.05,
        delay=0.1,
        delay_s=0.004,
        reorder=0.2,
        reorder_s=0.004,
        cut=0.05,
        corrupt=0.1,
        seed=1,
    )
    producer, consumer = make_pair(everything, everything)
    num_right = 0
    for number in range(25):
        session = f"round-{number}"
        wanted = list(range(1, 9))
        for worker, other in ((producer, consumer), (consumer, producer)):
            worker.transport.add_peer(session, other.transport.local_endpoint())
        for i in wanted:
            producer.transport.send_blocks(session, i, [i - 1], digests=Digests.ALWAYS)
            consumer.transport.recv_blocks(session, i, [i % 8], digests=Digests.ALWAYS)
        sent, received = drive_to_rest(producer, consumer, session)
        assert [outcome.transfer_id for outcome in sent] == wanted
        assert [outcome.transfer_id for outcome in received] == wanted
        for outcome in received:
            if outcome.error is None:
                num_right += 1
                place = outcome.transfer_id % 8
                assert consumer.block(0, place) == producer.block(0, outcome.transfer_id - 1)
    assert 0 < num_right < 25 * 8


def drive_to_rest(
    producer: Worker, consumer: Worker, session: str
) -> tuple[list[TransferOutcome], list[TransferOutcome]]:
    """Poll until nothing has ended for a while, then remove the peers, as sessions do."""
    outcomes: tuple[list[TransferOutcome], list[TransferOutcome]] = ([], [])
    workers = (producer, consumer)
    quiet_at = time.monotonic() + 0.05
    while time.monotonic() < quiet_at and any(len(seen) < 8 for seen in outcomes):
        for worker, seen in zip(workers, outcomes, strict=True):
            if ended := worker.transport.poll():
                seen += ended
                quiet_at = time.monotonic() + 0.05
        select.select([worker.transport.fileno() for worker in workers], [], [], 0.01)
    for worker, seen in zip(workers, outcomes, strict=True):
        worker.transport.remove_peer(session)
        deadline = time.monotonic() + 10.0
        while len(seen) < 8 and time.monotonic() < deadline:
            seen += worker.transport.poll()
            select.select([worker.transport.fileno()], [], [], 0.01)
        assert worker.transport.poll() == []
    return outcomes


def test_a_half_that_is_held_is_checked_at_once(make_pair: Pair) -> None:
    _, consumer = make_pair(NONE, FaultSpec(delay=1.0, delay_s=30.0))
    consumer.transport.recv_blocks(SESSION, 1, [0])
    with pytest.raises(LocalProtocolError):
        consumer.transport.recv_blocks(SESSION, 1, [0])
    with pytest.raises(LocalProtocolError):
        consumer.transport.recv_blocks(SESSION, 2, [99])
    with pytest.raises(LocalProtocolError):
        consumer.transport.recv_blocks("nobody", 3, [0])


def test_the_mode_tells_of_the_faults(kind: str) -> None:
    spec = FaultSpec(drop=0.5, seed=3)
    transport = make_faulty(kind, spec)
    assert (transport.name, transport.mode[1]) == (kind, "faults: drop=0.5,seed=3")
    transport.close()


def first_only(name: str, spec: FaultSpec, *kinds: str) -> FaultSpec:
    """Return a spec whose seed makes only the first received half of three a fault."""
    for seed in range(1000):
        found = FaultSpec(
            delay=spec.delay,
            delay_s=spec.delay_s,
            reorder=spec.reorder,
            reorder_s=spec.reorder_s,
            cut=spec.cut,
            seed=seed,
        )
        if all(_faults_of(name, found, kind) == [True, False, False] for kind in kinds or KINDS):
            return found
    raise AssertionError("no such seed")


def _faults_of(name: str, spec: FaultSpec, kind: str) -> list[bool]:
    dice = random.Random(f"{spec.seed}/{kind}/RECEIVING/{name}")
    return [dice.random() < getattr(spec, name) for _ in range(3)]


class TestOpening:
    """``open_transports`` applies what the environment says."""

    @pytest.fixture
    def worker(self) -> Iterator[Worker]:
        worker = make_worker("w", ShmTransport(TransportOptions()))
        yield worker
        worker.transport.close()

    def test_faults_are_announced(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("VLLM_PD_FAULTS", "drop=0.5,seed=3")
        transports, refused = open_transports(["tcp"], worker.regions, TransportOptions())
        assert isinstance(transports["tcp"], FaultyTransport)
        assert refused == {}
        assert "VLLM_PD_FAULTS=drop=0.5,seed=3" in caplog.text
        transports["tcp"].close()

    def test_without_the_variable_nothing_is_wrapped(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("VLLM_PD_FAULTS", raising=False)
        transports, _ = open_transports(["tcp"], worker.regions, TransportOptions())
        assert isinstance(transports["tcp"], TcpTransport)
        transports["tcp"].close()

    def test_a_refused_transport_is_passed_over(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_PD_FAULTS", "refuse=shm")
        transports, refused = open_transports(None, worker.regions, TransportOptions())
        assert list(transports) == ["tcp"]
        assert "VLLM_PD_FAULTS" in refused["shm"]
        transports["tcp"].close()

    def test_a_refused_transport_that_must_work_is_an_error(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_PD_FAULTS", "refuse=shm")
        with pytest.raises(TransportUnavailableError, match="refused by VLLM_PD_FAULTS"):
            open_transports(["shm"], worker.regions, TransportOptions())

    def test_refused_pages_are_read_by_the_kernel(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_PD_FAULTS", "refuse=memfd")
        transports, _ = open_transports(["shm"], worker.regions, TransportOptions())
        assert transports["shm"].mode[0] == "process_vm_readv"
        transports["shm"].close()

    def test_a_bad_spec_refuses_to_start(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_PD_FAULTS", "drop=often")
        with pytest.raises(ConfigError, match="drop=often"):
            open_transports(None, worker.regions, TransportOptions())
