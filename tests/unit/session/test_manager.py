"""Two workers, real sockets and transports: from a fetch to its end."""

from __future__ import annotations

import dataclasses
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.transport_conformance import BLOCK_LENS, NUM_BLOCKS, Worker, make_worker
from tests.unit.protocol.test_messages import FINGERPRINT
from vllm_pd.config import ConnectorConfig, Digests
from vllm_pd.errors import (
    IncompatiblePeerError,
    LeaseExpiredError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
)
from vllm_pd.protocol.messages import Fingerprint, KVLayout, WorkerAddress
from vllm_pd.session.fetches import FetchRequest, FetchResult
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.keys import write_cluster_key
from vllm_pd.session.manager import LocalWorker, Results, SessionManager
from vllm_pd.session.producer import Grant
from vllm_pd.transport.base import TransferOutcome, Transport, TransportOptions
from vllm_pd.transport.links import Direction, LinkEvent
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.shm_frames import AnyFrame
from vllm_pd.transport.tcp import TcpTransport

LAYOUT = KVLayout(
    region_names=("layer.0", "layer.1"),
    num_rows=(1, 1),
    head_lens=BLOCK_LENS,
    num_heads=1,
    num_blocks=NUM_BLOCKS,
)
ONE_HEAD = msgspec.structs.replace(FINGERPRINT, num_kv_heads=1)
CONFIG = ConnectorConfig(lease_s=20.0, handshake_timeout_s=5.0, transfer_timeout_s=10.0)

FOR_EVER_S = 3600.0


@dataclass
class Engine:
    """The parts of an instance that the sessions need, without vLLM."""

    worker: Worker
    endpoint: InstanceEndpoint
    manager: SessionManager
    engine_id: str

    def close(self) -> None:
        self.manager.close()
        self.endpoint.close()

    def wait(self, condition: Callable[[Results], bool], timeout_s: float = 15.0) -> Results:
        """Collect results until they satisfy a condition."""
        seen = Results()
        deadline = time.monotonic() + timeout_s
        while not condition(seen):
            assert time.monotonic() < deadline, seen
            results = self.manager.take_results()
            seen.freed += results.freed
            seen.fetched += results.fetched
            time.sleep(0.001)
        return seen

    def wait_fetched(self) -> FetchResult:
        (result,) = self.wait(lambda r: bool(r.fetched)).fetched
        return result


def make_engine(
    config: ConnectorConfig = CONFIG,
    *,
    kind: type[Transport] = ShmTransport,
    fingerprint: Fingerprint = ONE_HEAD,
) -> Engine:
    engine_id = secrets.token_hex(4)
    transport = kind(TransportOptions())  # type: ignore[call-arg]
    worker = make_worker(engine_id, transport)
    endpoint = InstanceEndpoint(config, engine_id=engine_id, tp_size=1)
    local = LocalWorker(engine_id, 0, 1, fingerprint, LAYOUT)
    manager = SessionManager(config, local, {transport.name: transport})
    address = WorkerAddress(tp_rank=0, host=manager.host, port=manager.port)
    endpoint.set_workers([address], fingerprint)
    return Engine(worker, endpoint, manager, engine_id)


def fetch_request(producer: Engine, transfer_id: str = "t1", **changes: object) -> FetchRequest:
    request = FetchRequest(
        request_id=f"decode-{transfer_id}",
        transfer_id=transfer_id,
        remote_engine_id=producer.engine_id,
        remote_host="127.0.0.1",
        remote_port=producer.endpoint.port,
        block_offset=0,
        block_ids=(1, 5),
    )
    return replace(request, **changes)  # type: ignore[arg-type]


GRANT = Grant("t1", "prefill-t1", (6, 2, 3))


@pytest.fixture(params=[ShmTransport, TcpTransport], ids=["shm", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    producer, consumer = make_engine(kind=request.param), make_engine(kind=request.param)
    yield producer, consumer
    producer.close()
    consumer.close()


def test_blocks_of_a_granted_prefill_arrive_and_are_freed(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer, block_offset=1))
    result = consumer.wait_fetched()
    assert (result.error, result.block_ids) == (None, (1, 5))
    assert result.record.num_bytes == 2 * sum(BLOCK_LENS)
    assert result.record.num_bytes_saved == sum(BLOCK_LENS)  # block 0 was not asked for
    assert consumer.worker.block(0, 1) == producer.worker.block(0, 2)
    assert consumer.worker.block(1, 5) == producer.worker.block(1, 3)
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]


def test_waiting_for_results_ends_when_a_fetch_does(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer))
    producer.manager.grant(GRANT)
    consumer.manager.wait_results(FOR_EVER_S)
    (result,) = consumer.manager.take_results().fetched
    assert result.error is None


def test_nobody_waits_for_a_manager_that_is_closed(pair: tuple[Engine, Engine]) -> None:
    _, consumer = pair
    consumer.manager.close()
    consumer.manager.wait_results(FOR_EVER_S)


def test_fetch_may_come_before_its_grant(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer))
    # A second, complete fetch proves that the first one has reached the producer.
    producer.manager.grant(Grant("t2", "prefill-t2", (0,)))
    consumer.manager.fetch(fetch_request(producer, "t2", block_ids=(7,)))
    assert consumer.wait_fetched().request_id == "decode-t2"
    producer.manager.grant(GRANT)
    assert consumer.wait_fetched().error is None
    assert consumer.worker.block(0, 1) == producer.worker.block(0, 6)


def test_fetch_that_came_first_may_wait_longer_than_a_transfer_lasts() -> None:
    patient = msgspec.structs.replace(CONFIG, transfer_timeout_s=0.3)
    producer, consumer = make_engine(config=patient), make_engine(config=patient)
    try:
        consumer.manager.fetch(fetch_request(producer, "t2"))
        consumer.manager.fetch(fetch_request(producer, wait_s=30.0))
        assert isinstance(consumer.wait_fetched().error, TransferError)  # t2, which nobody grants
        producer.manager.grant(GRANT)
        result = consumer.wait_fetched()
        assert (result.request_id, result.error) == ("decode-t1", None)
    finally:
        producer.close()
        consumer.close()


def test_fetch_of_another_prompt_is_refused(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer, prompt_digest="yours"))
    producer.manager.grant(replace(GRANT, prompt_digest="mine"))
    assert "another prompt" in str(consumer.wait_fetched().error)


def test_fetch_that_is_given_up_does_not_wait_for_its_grant(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer, wait_s=600.0))
    # A second, complete fetch proves that the first one has reached the producer.
    producer.manager.grant(Grant("t2", "prefill-t2", (0,)))
    consumer.manager.fetch(fetch_request(producer, "t2", block_ids=(7,)))
    assert consumer.wait_fetched().request_id == "decode-t2"
    consumer.manager.give_up("decode-t1")
    assert isinstance(consumer.wait_fetched().error, LeaseExpiredError)
    producer.manager.grant(GRANT)  # too late: the session must stand it
    consumer.manager.fetch(fetch_request(producer, "t1"))
    assert consumer.wait_fetched().error is None


def test_fetch_is_given_up_before_the_peer_has_answered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        consumer = make_engine()
        try:
            request = fetch_request(consumer, remote_port=silent.getsockname()[1])
            consumer.manager.fetch(replace(request, remote_engine_id="silent"))
            consumer.manager.give_up("decode-t1")
            assert "aborted" in str(consumer.wait_fetched().error)
        finally:
            consumer.close()


def test_giving_up_what_has_ended_is_ignored(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert consumer.wait_fetched().error is None
    consumer.manager.give_up("decode-t1")
    producer.manager.grant(Grant("t2", "prefill-t2", (0,)))
    consumer.manager.fetch(fetch_request(producer, "t2", block_ids=(7,)))
    assert consumer.wait_fetched().error is None


def test_many_fetches_run_over_one_session(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    for i in range(200):
        producer.manager.grant(Grant(f"t{i}", f"prefill-{i}", (i % NUM_BLOCKS,)))
        consumer.manager.fetch(fetch_request(producer, f"t{i}", block_ids=((i + 1) % NUM_BLOCKS,)))
    results = consumer.wait(lambda r: len(r.fetched) == 200)
    assert [result.error for result in results.fetched] == [None] * 200
    assert len(set(producer.wait(lambda r: len(r.freed) == 200).freed)) == 200


def test_released_prefill_is_freed_and_its_fetch_refused(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    producer.manager.grant(GRANT)
    producer.manager.release("t1")
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, LeaseExpiredError)


def test_refused_fetch_leaves_the_session_usable(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer, block_offset=2))  # one block too many
    assert consumer.wait_fetched().error is not None
    consumer.manager.fetch(fetch_request(producer))
    assert consumer.wait_fetched().error is None


def test_second_grant_of_a_transfer_id_is_freed_at_once(pair: tuple[Engine, Engine]) -> None:
    producer, _ = pair
    producer.manager.grant(GRANT)
    producer.manager.grant(replace(GRANT, request_id="again"))
    assert producer.wait(lambda r: bool(r.freed)).freed == ["again"]


def test_lease_expires_when_nobody_fetches() -> None:
    producer = make_engine(ConnectorConfig(lease_s=0.05))
    producer.manager.grant(GRANT)
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
    producer.close()


def test_producer_that_is_gone_fails_the_fetch_at_once(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    producer.close()
    started = time.monotonic()
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, PeerLostError)
    assert time.monotonic() - started < CONFIG.handshake_timeout_s


def test_producer_that_goes_while_a_fetch_is_parked_fails_it(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    producer.manager.grant(Grant("t2", "prefill-t2", (0,)))
    consumer.manager.fetch(fetch_request(producer))  # never granted
    consumer.manager.fetch(fetch_request(producer, "t2", block_ids=(7,)))
    assert consumer.wait_fetched().error is None
    producer.close()
    assert isinstance(consumer.wait_fetched().error, PeerLostError)


def test_restarted_producer_is_not_mistaken_for_the_old_one(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer, remote_engine_id="the-engine-before"))
    assert isinstance(consumer.wait_fetched().error, PeerLostError)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "other"), ("kv_layout", "amx"), ("block_size", 32), ("dtype", "float32")],
)
def test_fingerprint_mismatch_is_named(field: str, value: object) -> None:
    producer = make_engine()
    consumer = make_engine(fingerprint=msgspec_replace(ONE_HEAD, field, value))
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    error = consumer.wait_fetched().error
    assert isinstance(error, IncompatiblePeerError)
    assert field in str(error)
    producer.close()
    consumer.close()


def msgspec_replace(fingerprint: Fingerprint, field: str, value: object) -> Fingerprint:
    return msgspec.structs.replace(fingerprint, **{field: value})


def test_no_common_transport_is_incompatible() -> None:
    producer, consumer = make_engine(kind=ShmTransport), make_engine(kind=TcpTransport)
    consumer.manager.fetch(fetch_request(producer))
    error = consumer.wait_fetched().error
    assert isinstance(error, IncompatiblePeerError)
    assert "no common transport" in str(error)
    producer.close()
    consumer.close()


def test_fetch_of_an_unknown_transfer_times_out() -> None:
    config = ConnectorConfig(transfer_timeout_s=0.2)
    producer, consumer = make_engine(config), make_engine(config)
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, (TransferTimeoutError, LeaseExpiredError))
    producer.close()
    consumer.close()


def test_foreign_host_is_not_contacted_without_a_key(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer, remote_host="192.0.2.1"))
    assert "cluster key" in str(consumer.wait_fetched().error)


def with_key(tmp_path: Path, name: str) -> ConnectorConfig:
    path = tmp_path / name
    write_cluster_key(path)
    return ConnectorConfig(cluster_key_file=str(path), handshake_timeout_s=2.0)


def test_same_cluster_key_lets_peers_in(tmp_path: Path) -> None:
    config = with_key(tmp_path, "key")
    producer, consumer = make_engine(config), make_engine(config)
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert consumer.wait_fetched().error is None
    producer.close()
    consumer.close()


@pytest.mark.parametrize("consumer_has_a_key", [True, False])
def test_other_cluster_key_or_none_is_kept_out(tmp_path: Path, consumer_has_a_key: bool) -> None:
    producer = make_engine(with_key(tmp_path, "key"))
    config = with_key(tmp_path, "other") if consumer_has_a_key else CONFIG
    consumer = make_engine(replace_timeout(config))
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, (PeerLostError, TransferTimeoutError))
    producer.close()
    consumer.close()


def replace_timeout(config: ConnectorConfig) -> ConnectorConfig:
    return msgspec.structs.replace(config, handshake_timeout_s=1.0)


def test_release_reaches_the_instance_endpoint(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.endpoint.send_release("127.0.0.1", producer.endpoint.port, "t1")
    deadline = time.monotonic() + 5
    released: list[str] = []
    while not released and time.monotonic() < deadline:
        released = producer.endpoint.take_releases()
        time.sleep(0.001)
    assert released == ["t1"]


def test_closing_fails_what_waits(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer))
    consumer.manager.close()
    assert consumer.wait_fetched().error is not None
    consumer.manager.fetch(fetch_request(producer, "t9"))
    assert consumer.wait_fetched().error is not None


def test_malformed_host_fails_its_own_fetch_only(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    consumer.manager.fetch(fetch_request(producer))  # parked
    bad = fetch_request(producer, "bad", remote_engine_id="x", remote_host="127.0.0.1 x")
    consumer.manager.fetch(bad)
    result = consumer.wait_fetched()
    assert result.request_id == "decode-bad"
    assert result.error is not None
    producer.manager.grant(GRANT)
    assert consumer.wait_fetched().error is None


def test_failed_fetch_gives_the_producers_blocks_back() -> None:
    producer = make_engine()
    consumer = make_engine(fingerprint=msgspec_replace(ONE_HEAD, "model", "other"))
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, IncompatiblePeerError)
    deadline = time.monotonic() + 5
    while not (released := producer.endpoint.take_releases()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert released == ["t1"]
    producer.close()
    consumer.close()


class FailingOnce(ShmTransport):
    """Reports the first transfer as failed by itself, the link being fine."""

    has_failed = False

    def poll(self) -> list[TransferOutcome]:
        outcomes = super().poll()
        if outcomes and not self.has_failed:
            self.has_failed = True
            outcomes[0] = dataclasses.replace(outcomes[0], error=TransferError("injected"))
        return outcomes


def test_one_failed_transfer_leaves_no_other_of_its_peer_without_an_end() -> None:
    producer, consumer = make_engine(), make_engine(kind=FailingOnce)
    for name in ("t1", "t2", "t3"):
        producer.manager.grant(Grant(name, f"prefill-{name}", (1, 2)))
        consumer.manager.fetch(fetch_request(producer, name))
    results = consumer.wait(lambda r: len(r.fetched) == 3)
    assert any(result.error is not None for result in results.fetched)
    # The session is rebuilt for the next one.
    producer.manager.grant(Grant("t4", "prefill-t4", (1, 2)))
    consumer.manager.fetch(fetch_request(producer, "t4"))
    assert consumer.wait_fetched().error is None
    producer.close()
    consumer.close()


def test_fetch_that_is_never_granted_leaves_younger_ones_alone() -> None:
    config = ConnectorConfig(transfer_timeout_s=0.6)
    producer, consumer = make_engine(config), make_engine(config)
    consumer.manager.fetch(fetch_request(producer, "made-up"))
    time.sleep(0.4)  # not to wait for something, but to be younger
    consumer.manager.fetch(fetch_request(producer, "t2", block_ids=(7,)))
    assert consumer.wait_fetched().request_id == "decode-made-up"
    producer.manager.grant(Grant("t2", "prefill-t2", (0,)))
    result = consumer.wait_fetched()
    assert (result.request_id, result.error) == ("decode-t2", None)
    producer.close()
    consumer.close()


class NeverLettingGo(ShmTransport):
    """Hears no answer, and goes on touching blocks when a peer is removed."""

    def _handle_consumer(self, event: LinkEvent, frame: AnyFrame) -> None:
        for posted in self._ledger.posted(event.peer_id, Direction.SENDING):
            posted.is_busy = True


def test_read_that_the_transport_does_not_end_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = ConnectorConfig(transfer_timeout_s=0.2)
    producer, consumer = make_engine(config, kind=NeverLettingGo), make_engine(config)
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, TransferTimeoutError)
    time.sleep(0.5)  # long enough for thousands
    warnings = [r for r in caplog.records if "does not finish" in r.getMessage()]
    assert len(warnings) <= 1
    assert producer.manager.take_results().freed == []  # still touched
    consumer.close()
    producer.close()


def test_read_that_the_transport_does_not_end_leaves_no_deadline_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = ConnectorConfig(transfer_timeout_s=0.2, lease_s=0.3)
    producer, consumer = make_engine(config, kind=NeverLettingGo), make_engine(config)
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, TransferTimeoutError)
    time.sleep(0.5)  # until the lease would be over, too
    consumer.close()
    producer.close()
    assert "failing all fetches" not in caplog.text


class FailingToSend(ShmTransport):
    """Has a bug where it is to post something."""

    def send_blocks(self, peer_id: str, *args: Any, **options: Any) -> None:
        raise OSError("injected")


def test_transport_that_fails_to_send_keeps_no_block() -> None:
    producer, consumer = make_engine(kind=FailingToSend), make_engine()
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert "shm fails to send" in str(consumer.wait_fetched().error)
    producer.manager.release(GRANT.transfer_id)
    assert producer.wait(lambda r: bool(r.freed)).freed == [GRANT.request_id]
    producer.close()
    consumer.close()


class LosingItsPeer(ShmTransport):
    """The data link breaks at the first transfer; the control channel stays."""

    def recv_blocks(self, peer_id: str, *args: Any, **options: Any) -> None:
        super().recv_blocks(peer_id, *args, **options)
        self.remove_peer(peer_id)


def test_blocks_are_given_back_when_only_the_data_link_broke() -> None:
    producer, consumer = make_engine(), make_engine(kind=LosingItsPeer)
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert isinstance(consumer.wait_fetched().error, PeerLostError)
    deadline = time.monotonic() + 5
    while not (released := producer.endpoint.take_releases()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert released == ["t1"]
    producer.close()
    consumer.close()


def test_instance_that_does_not_answer_is_not_waited_for_by_every_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        consumer = make_engine(ConnectorConfig(handshake_timeout_s=0.3))
        request = FetchRequest(
            "decode-1", "t1", "silent", "127.0.0.1", silent.getsockname()[1], 0, (1,)
        )
        consumer.manager.fetch(request)
        assert isinstance(consumer.wait_fetched().error, TransferTimeoutError)
        consumer.manager.fetch(replace(request, request_id="decode-2"))
        result = consumer.wait_fetched()
        assert "a moment ago" in str(result.error)
        consumer.close()


@pytest.mark.parametrize("digests", [Digests.SAMPLED, Digests.ALWAYS])
@pytest.mark.parametrize("kind", [ShmTransport, TcpTransport], ids=["shm", "tcp"])
def test_producer_that_vouches_for_less_than_asked_is_not_believed(
    kind: type[Transport], digests: Digests
) -> None:
    class Careless(kind):  # type: ignore[misc, valid-type]
        def send_blocks(self, *args: Any, **options: Any) -> None:
            super().send_blocks(*args, **{**options, "digests": Digests.OFF})

    producer = make_engine(kind=Careless)
    consumer = make_engine(ConnectorConfig(digests=digests), kind=kind)
    producer.manager.grant(GRANT)
    consumer.manager.fetch(fetch_request(producer))
    assert "vouches for less" in str(consumer.wait_fetched().error)
    producer.close()
    consumer.close()
