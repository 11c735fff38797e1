"""What peers can say that must not harm: the service goes on, the accounts are exact."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.session.intruders import (
    DATA_FRAMES,
    ENGINE_ID,
    Counts,
    FakeProducer,
    Intruder,
    check_service,
    dial,
    endpoint_counters,
    endpoint_of,
    fetch_blocks,
    framed,
    greeting,
    hello,
    is_message,
    noise,
    some_of_all_messages,
    wait_until,
)
from tests.unit.session.test_manager import GRANT, LAYOUT, ONE_HEAD, Engine, fetch_request
from tests.unit.session.test_manager import make_engine as make_one
from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PDError
from vllm_pd.protocol.messages import (
    MAX_FRAME_LEN,
    AnyMessage,
    Describe,
    FetchBlocks,
    FetchFailed,
    FetchFailure,
    FetchReady,
    Hello,
    Refused,
    WorkerAddress,
    encode,
)
from vllm_pd.session.keys import write_cluster_key
from vllm_pd.transport.base import Transport
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport

BRISK = ConnectorConfig(lease_s=20.0, handshake_timeout_s=2.0, transfer_timeout_s=2.0)
KINDS: dict[str, type[Transport]] = {"shm": ShmTransport, "tcp": TcpTransport}

Make = Callable[..., Engine]


@pytest.fixture(autouse=True)
def no_internal_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a peer does, it is no bug here: nothing is logged with a traceback."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.exc_info] == []


@pytest.fixture
def make_engine() -> Iterator[Make]:
    """Makes engines that are closed after the test."""
    engines: list[Engine] = []

    def make(config: ConnectorConfig = BRISK, kind: type[Transport] = ShmTransport) -> Engine:
        engines.append(make_one(config, kind=kind))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=list(KINDS))
def pair(request: pytest.FixtureRequest, make_engine: Make) -> tuple[Engine, Engine]:
    """A producer and a consumer of each transport."""
    kind = KINDS[request.param]
    return make_engine(kind=kind), make_engine(kind=kind)


class TestKeys:
    """Peers that have another key, or none, or one where there is none to have."""

    @pytest.fixture
    def key(self, tmp_path: Path) -> Path:
        write_cluster_key(tmp_path / "key")
        return tmp_path / "key"

    @pytest.fixture
    def other_key(self, tmp_path: Path) -> Path:
        write_cluster_key(tmp_path / "other")
        return tmp_path / "other"

    @pytest.fixture
    def keyed(self, make_engine: Make, key: Path) -> tuple[Engine, Engine]:
        config = msgspec.structs.replace(BRISK, cluster_key_file=str(key))
        return make_engine(config), make_engine(config)

    def test_wrong_key_is_counted(self, keyed: tuple[Engine, Engine], other_key: Path) -> None:
        counts = Counts(keyed[0])
        with Intruder(keyed[0].manager.port, key_file=other_key) as intruder:
            intruder.say(hello(keyed[1]))
            wait_until(lambda: counts.update().dropped["wrong_key"], "it is counted")
        check_service(*keyed)
        assert set(counts.update().dropped) == {"wrong_key"}
        counts.check_accounts()

    def test_plaintext_peer_is_counted(self, keyed: tuple[Engine, Engine]) -> None:
        counts = Counts(keyed[0])
        with Intruder(keyed[0].manager.port) as intruder:
            intruder.say(hello(keyed[1]))
            wait_until(lambda: counts.update().dropped["handshake"], "it is counted")
        check_service(*keyed)
        assert set(counts.update().dropped) == {"handshake"}

    def test_encrypting_peer_is_counted_where_nobody_encrypts(
        self, pair: tuple[Engine, Engine], key: Path
    ) -> None:
        counts = Counts(pair[0])
        with Intruder(pair[0].manager.port, key_file=key) as intruder:
            intruder.say(hello(pair[1]))
            wait_until(lambda: counts.update().dropped["handshake"], "it is counted")
        check_service(*pair)

    def test_instance_endpoint_counts_them_too(
        self, make_engine: Make, key: Path, other_key: Path
    ) -> None:
        engine = make_engine()
        with Intruder(engine.endpoint.port, key_file=key) as intruder:
            intruder.say(Describe())
            wait_until(lambda: endpoint_counters(engine)["denied_peers"], "it is counted")


BAD_FRAMES: dict[str, tuple[tuple[bytes, ...], str]] = {
    "nothing": ((b"",), "malformed"),
    "random": ((random.Random(1).randbytes(64),), "malformed"),
    "truncated": ((encode(Describe())[:-3],), "malformed"),
    "with a tail": ((encode(Describe()) + b"\0",), "malformed"),
    "unknown type": ((msgspec.msgpack.encode({"type": "explode"}),), "malformed"),
    "no type": ((msgspec.msgpack.encode({"fetch_id": 1}),), "malformed"),
    "deeply nested": ((b"\x91" * 100_000,), "malformed"),
    "oversized": ((bytes(MAX_FRAME_LEN + 1),), "oversized"),
    "several frames": ((b"a", b"b", b"c"), "frame_count"),
    "wrong place": ((encode(Refused(reason="no")),), "unexpected"),
    "answer unasked": ((encode(FetchReady(fetch_id=1)),), "unexpected"),
}


@pytest.mark.parametrize("name", list(BAD_FRAMES))
def test_bad_frame_is_dropped_and_counted(make_engine: Make, name: str) -> None:
    producer, consumer = make_engine(), make_engine()
    frames, reason = BAD_FRAMES[name]
    counts = Counts(producer)
    with Intruder(producer.manager.port) as intruder:
        intruder.greet(consumer)
        intruder.send(*frames)
        wait_until(lambda: counts.update().dropped, "it is counted")
        assert counts.dropped == {reason: 1}
        intruder.say(fetch_blocks(producer, "none", num_heads=0))  # its session is not lost
    check_service(producer, consumer)
    counts.check_accounts()


def test_frame_far_too_long_ends_its_connection_only(pair: tuple[Engine, Engine]) -> None:
    producer, consumer = pair
    with Intruder(producer.manager.port) as intruder:
        intruder.greet(consumer)
        intruder.send(bytes(4 * MAX_FRAME_LEN))
        check_service(producer, consumer)


@pytest.mark.parametrize(
    "change",
    [
        {"layout": msgspec.structs.replace(LAYOUT, head_lens=(8, 8))},
        {"layout": msgspec.structs.replace(LAYOUT, num_heads=4)},
        {"layout": msgspec.structs.replace(LAYOUT, region_names=("a", "b"))},
        {"layout": msgspec.structs.replace(LAYOUT, num_rows=(2, 1))},
        {"layout": msgspec.structs.replace(LAYOUT, region_names=(), num_rows=(), head_lens=())},
        {"fingerprint": msgspec.structs.replace(ONE_HEAD, num_kv_heads=0)},
        {"fingerprint": msgspec.structs.replace(ONE_HEAD, block_size=-1)},
        {"tp_size": 0},
        {"tp_size": 3, "tp_rank": 7},
        {"tp_rank": -1},
        {"protocol_version": 99},
        {"endpoints": {"shm": b"no endpoint", "tcp": b"no endpoint"}},
    ],
    ids=str,
)
def test_peer_that_is_not_like_us_is_refused_and_counted(
    make_engine: Make, change: dict[str, Any]
) -> None:
    producer, consumer = make_engine(), make_engine()
    counts = Counts(producer)
    with Intruder(producer.manager.port) as intruder:
        assert isinstance(intruder.greet(consumer, **change), Refused)
        wait_until(lambda: counts.update().refused, "it is counted")
        assert counts.refused == {"refused": 1}
        # It has no session now.
        intruder.say(fetch_blocks(producer))
        assert isinstance(intruder.hear(), Refused)
    check_service(producer, consumer)


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"block_offset": 2}, FetchFailure.OUT_OF_RANGE),
        ({"block_offset": 10**9}, FetchFailure.OUT_OF_RANGE),
        ({"num_blocks": 10**9}, FetchFailure.OUT_OF_RANGE),
        ({"first_head": 1}, FetchFailure.OUT_OF_RANGE),
        ({"num_heads": 2}, FetchFailure.OUT_OF_RANGE),
        ({"num_heads": 10**9, "first_head": 10**9}, FetchFailure.OUT_OF_RANGE),
        ({"transport": "pigeon"}, FetchFailure.TRANSPORT),
    ],
    ids=str,
)
def test_fetch_of_what_is_not_there_is_refused_and_costs_nothing(
    pair: tuple[Engine, Engine], change: dict[str, Any], failure: FetchFailure
) -> None:
    producer, consumer = pair
    producer.manager.grant(GRANT)
    counts = Counts(producer)
    with Intruder(producer.manager.port) as intruder:
        intruder.greet(consumer)
        intruder.say(fetch_blocks(producer, **change))
        answer = intruder.hear()
        assert isinstance(answer, FetchFailed)
        assert answer.failure is failure
    consumer.manager.fetch(fetch_request(producer))
    assert consumer.wait_fetched().error is None
    assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
    check_service(producer, consumer)
    counts.check_accounts()
    assert set(counts.ended) == {"fetched"}


class TestTheSameTransferTwice:
    def test_second_fetch_of_one_session_is_refused(self, pair: tuple[Engine, Engine]) -> None:
        producer, consumer = pair
        producer.manager.grant(GRANT)
        with Intruder(producer.manager.port) as intruder:
            intruder.greet(consumer)
            intruder.say(fetch_blocks(producer))
            assert isinstance(intruder.hear(), FetchReady)
            intruder.say(fetch_blocks(producer))
            answer = intruder.hear()
            assert isinstance(answer, FetchFailed)
            assert answer.failure is FetchFailure.TRANSPORT
        check_service(producer, consumer)

    def test_two_consumers_may_fetch_it_and_it_is_freed_once(
        self, pair: tuple[Engine, Engine], make_engine: Make
    ) -> None:
        producer, consumer = pair
        other = make_engine(kind=type(producer.worker.transport))
        for _ in range(20):
            producer.manager.grant(GRANT)
            for engine in (consumer, other):
                engine.manager.fetch(fetch_request(producer))
            errors = [engine.wait_fetched().error for engine in (consumer, other)]
            assert None in errors  # the other came too late, or did not
            assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
        check_service(producer, consumer)

    def test_second_grant_is_given_back_at_once(self, pair: tuple[Engine, Engine]) -> None:
        producer, consumer = pair
        counts = Counts(producer)
        producer.manager.grant(GRANT)
        producer.manager.grant(msgspec_replace_request(GRANT, "again"))
        assert producer.wait(lambda r: bool(r.freed)).freed == ["again"]
        consumer.manager.fetch(fetch_request(producer))
        assert consumer.wait_fetched().error is None
        assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
        counts.check_accounts()
        assert counts.num_granted == 1

    def test_two_fetches_of_one_consumer_end_once_each(self, pair: tuple[Engine, Engine]) -> None:
        producer, consumer = pair
        producer.manager.grant(GRANT)
        for _ in range(2):
            consumer.manager.fetch(fetch_request(producer))
        results = consumer.wait(lambda r: len(r.fetched) == 2).fetched
        assert None in [result.error for result in results]
        assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
        check_service(producer, consumer)


def msgspec_replace_request(grant: Any, request_id: str) -> Any:
    return type(grant)(grant.transfer_id, request_id, grant.block_ids)


class TestNoise:
    """Random bytes, messages with mistakes, and messages at the wrong time."""

    def test_worker_survives_10_000_frames(self, make_engine: Make) -> None:
        producer, consumer = make_engine(), make_engine()
        producer.manager.grant(GRANT)
        counts = Counts(producer)
        rng = random.Random(2024)
        valid = [encode(message) for message in some_of_all_messages(consumer)]
        frames = list(noise(rng, valid, 10_000))
        num_malformed = sum(not is_message(frame) for frame in frames)
        assert 1000 < num_malformed < 9000
        intruders = [Intruder(producer.manager.port) for _ in range(4)]
        for frame in frames:
            rng.choice(intruders).send(frame)
        wait_until(lambda: counts.update().dropped["malformed"] >= num_malformed, "all are counted")
        for intruder in intruders:
            intruder.close()
        assert counts.dropped["malformed"] == num_malformed
        assert set(counts.dropped) <= {"malformed", "unexpected", "unsent"}
        # What the intruders began to fetch may be read until its time is over.
        consumer.manager.fetch(fetch_request(producer))
        assert consumer.wait_fetched().error is None
        assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
        check_service(producer, consumer)
        counts.check_accounts()

    def test_instance_endpoint_survives_10_000_frames(self, make_engine: Make) -> None:
        producer, consumer = make_engine(), make_engine()
        rng = random.Random(2025)
        valid = [encode(message) for message in some_of_all_messages(consumer)]
        frames = list(noise(rng, valid, 10_000))
        num_malformed = sum(not is_message(frame) for frame in frames)
        with Intruder(producer.endpoint.port) as intruder:
            for frame in frames:
                intruder.send(frame)
            wait_until(
                lambda: endpoint_counters(producer).get("dropped_malformed", 0) >= num_malformed,
                "all are counted",
            )
        assert endpoint_counters(producer)["dropped_malformed"] == num_malformed
        check_service(producer, consumer)

    @pytest.mark.parametrize("is_known", [False, True], ids=["stranger", "peer"])
    def test_producers_data_link_survives_it(
        self, pair: tuple[Engine, Engine], is_known: bool
    ) -> None:
        producer, consumer = pair
        rng = random.Random(2026)
        valid = [msgspec.msgpack.encode(frame) for frame in DATA_FRAMES]
        endpoint = endpoint_of(producer)
        producer.manager.grant(GRANT)
        with Intruder(producer.manager.port) as intruder:
            intruder.greet(consumer)
            peer_id = intruder.session_id.hex()
            for number, frame in enumerate(noise(rng, valid, 2_000)):
                if is_known and number % 40 == 0:  # something that a lie can be about
                    intruder.say(fetch_blocks(producer, fetch_id=number))
                    intruder.hear()
                with dial(endpoint) as sock:
                    if is_known:
                        sock.sendall(greeting(endpoint, peer_id))
                    sock.sendall(frame if rng.random() < 0.2 else framed(frame))
                    hang_up_or_wait(sock, rng)
        consumer.manager.fetch(fetch_request(producer))
        assert consumer.wait_fetched().error is None
        assert producer.wait(lambda r: bool(r.freed)).freed == ["prefill-t1"]
        check_service(producer, consumer)

    def test_consumer_survives_what_a_producer_sends_on_data_links(
        self, pair: tuple[Engine, Engine]
    ) -> None:
        producer, consumer = pair
        rng = random.Random(2027)
        valid = [msgspec.msgpack.encode(frame) for frame in DATA_FRAMES]
        fake = FakeProducer(consumer)
        before = [consumer.worker.block(r, b) for r in range(2) for b in (0, 2, 3, 4, 6, 7)]
        for frame in noise(rng, valid, 150):
            data = frame if rng.random() < 0.2 else framed(frame)
            assert fetch_from(fake, consumer, fake.answer, data) is not None
        fake.close()
        assert before == [consumer.worker.block(r, b) for r in range(2) for b in (0, 2, 3, 4, 6, 7)]
        check_service(producer, consumer)

    def test_consumer_survives_what_a_producer_says(self, pair: tuple[Engine, Engine]) -> None:
        producer, consumer = pair
        rng = random.Random(2028)
        fake = FakeProducer(consumer)
        valid = [encode(message) for message in some_of_all_messages(consumer)]
        valid += [encode(fake.info()), encode(fake.hello())] * 5
        frames = noise(rng, valid, 10_000)

        def answer(message: AnyMessage) -> AnyMessage | bytes | None:
            return next(frames) if rng.random() < 0.5 else fake.answer(message)

        for _ in range(150):
            assert fetch_from(fake, consumer, answer, b"") is not None
        fake.close()
        check_service(producer, consumer)


def hang_up_or_wait(sock: socket.socket, rng: random.Random) -> None:
    """Leave at once, or stay until the other side may have closed."""
    if rng.random() < 0.5:
        sock.settimeout(0.002)
        try:
            while sock.recv(4096):
                pass
        except OSError:
            pass


def fetch_from(
    fake: FakeProducer,
    consumer: Engine,
    answer: Callable[[AnyMessage], AnyMessage | bytes | None],
    data: bytes,
) -> PDError | None:
    """Fetch from an intruder; return the error, which ends it in any case."""
    consumer.manager.fetch(
        fetch_request(consumer, remote_engine_id=ENGINE_ID, remote_port=fake.port)
    )
    fetched = consumer.manager.take_results().fetched
    num_steps = 0
    while not fetched:
        fake.step(answer, data)
        fetched = consumer.manager.take_results().fetched
        num_steps += 1
        if num_steps > 30:  # it got nothing that it could object to
            fake.leave()
    (result,) = fetched
    return result.error


LIES: dict[str, tuple[Callable[[FakeProducer, AnyMessage], Any], str]] = {
    "another engine": (
        lambda fake, _: msgspec.structs.replace(fake.info(), engine_id="other"),
        "peer_lost",
    ),
    "no workers": (
        lambda fake, _: msgspec.structs.replace(fake.info(), workers=()),
        "incompatible",
    ),
    "worker elsewhere": (
        lambda fake, _: msgspec.structs.replace(
            fake.info(), workers=(WorkerAddress(tp_rank=0, host="192.0.2.1", port=1),)
        ),
        "incompatible",
    ),
    "uneven ranks": (
        lambda fake, _: msgspec.structs.replace(fake.info(), tp_size=0),
        "incompatible",
    ),
    "no description": (lambda _fake, _: FetchReady(fetch_id=1), "error"),
    "another rank": (
        lambda fake, m: told(fake, m, Hello, tp_rank=1, tp_size=2),
        "peer_lost",
    ),
    "another model": (
        lambda fake, m: told(
            fake, m, Hello, fingerprint=msgspec.structs.replace(ONE_HEAD, model="other")
        ),
        "incompatible",
    ),
    "another layout": (
        lambda fake, m: told(
            fake, m, Hello, layout=msgspec.structs.replace(LAYOUT, head_lens=(1, 1))
        ),
        "incompatible",
    ),
    "no transport": (lambda fake, m: told(fake, m, Hello, endpoints={}), "incompatible"),
    "bad endpoint": (
        lambda fake, m: told(fake, m, Hello, endpoints={"shm": b"?", "tcp": b"?"}),
        "error",
    ),
    "refusal": (
        lambda fake, m: Refused(reason="no") if isinstance(m, Hello) else fake.answer(m),
        "incompatible",
    ),
    "another fetch": (
        lambda fake, m: FetchReady(fetch_id=99) if isinstance(m, FetchBlocks) else fake.answer(m),
        "error",
    ),
    "failure of another fetch": (
        lambda fake, m: (
            FetchFailed(fetch_id=99, failure=FetchFailure.TRANSPORT, detail="")
            if isinstance(m, FetchBlocks)
            else fake.answer(m)
        ),
        "error",
    ),
    "a second hello": (
        lambda fake, m: fake.hello() if isinstance(m, FetchBlocks) else fake.answer(m),
        "error",
    ),
    "lease over": (
        lambda fake, m: (
            FetchFailed(fetch_id=m.fetch_id, failure=FetchFailure.LEASE_ENDED, detail="")
            if isinstance(m, FetchBlocks)
            else fake.answer(m)
        ),
        "expired",
    ),
    "random bytes": (
        lambda fake, m: b"\xc1\xc1" if isinstance(m, FetchBlocks) else fake.answer(m),
        "error",
    ),
}


def told(fake: FakeProducer, message: AnyMessage, kind: type, **changes: Any) -> Any:
    """Return the usual answer, but with changes where the message is of this kind."""
    answer = fake.answer(message)
    if not isinstance(message, kind):
        return answer
    assert isinstance(answer, msgspec.Struct)
    return msgspec.structs.replace(answer, **changes)


@pytest.mark.parametrize("name", list(LIES))
def test_lie_of_a_producer_fails_its_fetch_with_a_reason(make_engine: Make, name: str) -> None:
    producer, consumer = make_engine(), make_engine()
    lie, outcome = LIES[name]
    fake = FakeProducer(consumer)
    counts = Counts(consumer)
    assert fetch_from(fake, consumer, lambda message: lie(fake, message), b"") is not None
    fake.close()
    wait_until(lambda: counts.update().outcomes, "it is counted")
    assert counts.outcomes == {outcome: 1}
    check_service(producer, consumer)
