"""The instance endpoint over real sockets: what it answers, takes and sends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
import pytest

from tests.unit.protocol.test_messages import FINGERPRINT
from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import ConfigError
from vllm_pd.protocol.messages import (
    MAX_RENEWED,
    AnyMessage,
    Describe,
    Drain,
    GetOutstanding,
    GetStats,
    Goodbye,
    InstanceInfo,
    Outstanding,
    Release,
    Renew,
    Stats,
    WorkerAddress,
    encode,
)
from vllm_pd.session.channel import ControlClient, ControlContext
from vllm_pd.session.instance import InstanceEndpoint
from vllm_pd.session.outbox import Outbox, RemoteLease

T = TypeVar("T")

SHORT_LEASE_S = 0.15  # renewed every 50 ms
FLOOD = """
import sys, zmq
sock = zmq.Context.instance().socket(zmq.DEALER)
sock.connect(f"tcp://127.0.0.1:{sys.argv[1]}")
frame = bytes.fromhex(sys.argv[2])
for count in range(10**9):
    sock.send(frame)
    if count == 5000:
        print(flush=True)
"""
WORKER = WorkerAddress(tp_rank=0, host="127.0.0.1", port=1234)


@pytest.fixture
def endpoint() -> Iterator[InstanceEndpoint]:
    endpoint = InstanceEndpoint(ConnectorConfig(), engine_id="p0", tp_size=1)
    yield endpoint
    endpoint.close()


@pytest.fixture
def consumer() -> Iterator[InstanceEndpoint]:
    endpoint = InstanceEndpoint(ConnectorConfig(), engine_id="d0", tp_size=1)
    yield endpoint
    endpoint.close()


@pytest.fixture
def context() -> Iterator[ControlContext]:
    context = ControlContext(ConnectorConfig())
    yield context
    context.close()


@pytest.fixture
def client(context: ControlContext, endpoint: InstanceEndpoint) -> Iterator[ControlClient]:
    client = context.client(endpoint.host, endpoint.port)
    yield client
    client.close(linger_s=1.0)


def ask(client: ControlClient, message: AnyMessage) -> AnyMessage:
    client.send(message)
    assert client.socket.poll(10_000), f"no answer to {message}"
    answer = client.receive()
    assert answer is not None
    return answer


def stats(client: ControlClient) -> dict[str, float]:
    answer = ask(client, GetStats())
    assert isinstance(answer, Stats)
    return answer.counters


def wait_for(take: Callable[[], T]) -> T:
    """Ask until there is something."""
    deadline = time.monotonic() + 10.0
    while not (found := take()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
    return found


def lease(endpoint: InstanceEndpoint, transfer_id: str = "t1") -> RemoteLease:
    return RemoteLease(endpoint.host, endpoint.port, transfer_id, SHORT_LEASE_S)


def test_describe_tells_who_and_where(client: ControlClient, endpoint: InstanceEndpoint) -> None:
    endpoint.set_workers([WORKER], FINGERPRINT)
    endpoint.try_hold(3)
    info = ask(client, Describe())
    assert isinstance(info, InstanceInfo)
    assert (info.engine_id, info.workers, info.fingerprint) == ("p0", (WORKER,), FINGERPRINT)
    assert (info.num_leases, info.lease_s) == (1, 30.0)


def test_outstanding_is_what_is_held(client: ControlClient, endpoint: InstanceEndpoint) -> None:
    endpoint.try_hold(3)
    endpoint.try_hold(4)
    endpoint.end_hold(3)
    wanted = Outstanding(num_leases=1, num_blocks=4, draining=False)
    assert ask(client, GetOutstanding()) == wanted


def test_draining_instance_holds_nothing_more_but_keeps_what_it_has(
    client: ControlClient, endpoint: InstanceEndpoint
) -> None:
    assert endpoint.try_hold(3)
    wanted = Outstanding(num_leases=1, num_blocks=3, draining=True)
    assert ask(client, Drain()) == wanted
    assert not endpoint.try_hold(4)
    assert ask(client, Drain()) == wanted
    endpoint.end_hold(3)
    assert ask(client, GetOutstanding()) == Outstanding(num_leases=0, num_blocks=0, draining=True)


def test_draining_can_be_taken_back(client: ControlClient, endpoint: InstanceEndpoint) -> None:
    ask(client, Drain())
    answer = ask(client, Drain(on=False))
    assert answer == Outstanding(num_leases=0, num_blocks=0, draining=False)
    assert endpoint.try_hold(1)


def test_stats_count_from_the_start(client: ControlClient) -> None:
    counters = stats(client)
    assert 0 < counters.pop("uptime_s") < 60
    assert set(counters.values()) == {0.0}
    assert set(counters) == {
        "leases",
        "blocks_held",
        "draining",
        "renewing",
        "denied_peers",
        "leases_granted",
        "releases_taken",
        "renewals_taken",
        "releases_sent",
        "renewals_sent",
        "notices_unsent",
    }


def test_stats_say_what_was_taken_and_what_was_dropped(
    client: ControlClient, endpoint: InstanceEndpoint
) -> None:
    endpoint.try_hold(5)
    ask(client, Drain())
    client.send(Release(transfer_id="t0"))
    client.send(Renew(transfer_ids=("t1", "t2")))
    client.send(Goodbye())
    client.socket.send(b"\xc1")
    counters = stats(client)
    assert (counters["leases"], counters["blocks_held"], counters["draining"]) == (1, 5, 1)
    assert (counters["releases_taken"], counters["renewals_taken"]) == (1, 2)
    assert (counters["dropped_unexpected"], counters["dropped_malformed"]) == (1, 1)


def test_releases_of_peers_are_taken_once(
    client: ControlClient, endpoint: InstanceEndpoint
) -> None:
    client.send(Release(transfer_id="t1"))
    client.send(Release(transfer_id="t2"))
    stats(client)  # by now the messages before it are in
    assert endpoint.take_releases() == ["t1", "t2"]
    assert endpoint.take_releases() == []


def test_renewals_of_peers_are_taken_once_and_without_repeats(
    client: ControlClient, endpoint: InstanceEndpoint
) -> None:
    endpoint.try_hold(1)
    client.send(Renew(transfer_ids=("t1", "t2")))
    client.send(Renew(transfer_ids=("t2", "t3")))
    stats(client)
    assert endpoint.take_renewals() == ["t1", "t2", "t3"]
    assert endpoint.take_renewals() == []


def test_without_leases_there_is_nothing_to_renew(
    client: ControlClient, endpoint: InstanceEndpoint
) -> None:
    client.send(Renew(transfer_ids=("t1",)))
    stats(client)
    assert endpoint.take_renewals() == []


def test_what_peers_say_is_kept_within_bounds(
    client: ControlClient, endpoint: InstanceEndpoint
) -> None:
    """Nobody takes it while the engine computes."""
    endpoint.try_hold(1)
    for start in range(0, 12_000, 500):
        client.send(Renew(transfer_ids=tuple(f"t{i}" for i in range(start, start + 500))))
    for i in range(10_100):
        client.send(Release(transfer_id=f"t{i}"))
        if i % 1000 == 0:
            stats(client)
    assert stats(client)["releases_taken"] == 10_100
    assert len(endpoint.take_releases()) == 10_000
    assert len(endpoint.take_renewals()) == 10_000


def test_release_reaches_the_other_instance(
    endpoint: InstanceEndpoint, consumer: InstanceEndpoint
) -> None:
    consumer.send_release(endpoint.host, endpoint.port, "t1")
    assert wait_for(endpoint.take_releases) == ["t1"]


def test_1000_releases_arrive_over_one_connection(
    context: ControlContext, consumer: InstanceEndpoint
) -> None:
    server = context.server("127.0.0.1", 0)
    for i in range(1000):
        consumer.send_release("127.0.0.1", server.port, f"t{i}")
    received: dict[AnyMessage, bytes] = {}
    while len(received) < 1000:
        assert server.socket.poll(10_000)
        for message in server.receive_some():
            received[message[1]] = message[0]
    assert len(set(received.values())) == 1
    server.close()


def test_release_is_sent_even_if_the_instance_ends_at_once(endpoint: InstanceEndpoint) -> None:
    consumer = InstanceEndpoint(ConnectorConfig(), engine_id="d0", tp_size=1)
    consumer.send_release(endpoint.host, endpoint.port, "t1")
    consumer.close()
    consumer.close()
    assert wait_for(endpoint.take_releases) == ["t1"]


def test_release_by_outbox_reaches_the_other_instance(
    context: ControlContext, endpoint: InstanceEndpoint
) -> None:
    outbox = Outbox(context)
    outbox.send((endpoint.host, endpoint.port), Release(transfer_id="t1"), now=0.0)
    assert wait_for(endpoint.take_releases) == ["t1"]
    outbox.close()


def test_lease_is_renewed_again_and_again_while_its_request_queues(
    endpoint: InstanceEndpoint, consumer: InstanceEndpoint
) -> None:
    endpoint.try_hold(1)
    consumer.start_renewing("r1", lease(endpoint))
    for _ in range(3):
        assert wait_for(endpoint.take_renewals) == ["t1"]


def test_leases_of_one_instance_come_in_one_renewal(
    context: ControlContext, consumer: InstanceEndpoint
) -> None:
    server = context.server("127.0.0.1", 0)
    for i in range(3):
        address = "127.0.0.1", server.port
        consumer.start_renewing(f"r{i}", RemoteLease(*address, f"t{i}", 1.5))  # after 0.5 s
    assert server.socket.poll(10_000)
    received = next(server.receive_some(), None)
    assert received is not None
    assert received[1] == Renew(transfer_ids=("t0", "t1", "t2"))
    server.close()


def test_lease_of_a_request_that_queues_no_more_is_not_renewed(
    endpoint: InstanceEndpoint, consumer: InstanceEndpoint
) -> None:
    """A second request's renewals show that the first one's would have come."""
    endpoint.try_hold(1)
    consumer.start_renewing("r1", lease(endpoint, "t1"))
    assert wait_for(endpoint.take_renewals) == ["t1"]
    consumer.stop_renewing("r1", once_more=False)
    consumer.start_renewing("r2", lease(endpoint, "t2"))
    seen = [wait_for(endpoint.take_renewals) for _ in range(3)]
    assert seen[-2:] == [["t2"], ["t2"]]


def test_last_renewal_is_sent_for_a_request_that_has_queued(
    endpoint: InstanceEndpoint, consumer: InstanceEndpoint
) -> None:
    endpoint.try_hold(1)
    consumer.start_renewing("r1", RemoteLease(endpoint.host, endpoint.port, "t1", 3000.0))
    time.sleep(0.11)  # it queues
    consumer.stop_renewing("r1", once_more=True)
    assert wait_for(endpoint.take_renewals) == ["t1"]


def test_request_that_is_admitted_at_once_costs_no_renewal(
    context: ControlContext, endpoint: InstanceEndpoint, consumer: InstanceEndpoint
) -> None:
    consumer.start_renewing("r1", lease(endpoint))
    consumer.stop_renewing("r1", once_more=True)
    client = context.client(consumer.host, consumer.port)
    counters = stats(client)
    assert (counters["renewals_sent"], counters["renewing"]) == (0, 0)
    client.close()


def test_stopping_what_was_never_renewed_is_nothing(consumer: InstanceEndpoint) -> None:
    consumer.stop_renewing("r1", once_more=True)


def test_instance_that_is_gone_costs_only_its_notices(
    endpoint: InstanceEndpoint, consumer: InstanceEndpoint
) -> None:
    gone = InstanceEndpoint(ConnectorConfig(), engine_id="p1", tp_size=1)
    gone.close()
    consumer.start_renewing("r1", lease(gone))
    for _ in range(100):
        consumer.send_release(gone.host, gone.port, "t1")
    consumer.send_release(endpoint.host, endpoint.port, "t2")
    assert wait_for(endpoint.take_releases) == ["t2"]


def test_foreign_frames_do_not_end_the_service(client: ControlClient) -> None:
    for payload in (b"", b"\xc1", msgspec.msgpack.encode({"type": "renew"}), b"x" * 1000):
        client.socket.send(payload)
    assert isinstance(ask(client, Describe()), InstanceInfo)


def test_what_was_dropped_is_told_once(client: ControlClient, endpoint: InstanceEndpoint) -> None:
    assert not endpoint.take_num_dropped()
    client.send(Goodbye())
    client.socket.send(b"\xc1")
    client.socket.send(b"\xc1")
    dropped: Counter[str] = Counter()
    while dropped.total() < 3:
        dropped += wait_for(endpoint.take_num_dropped)
    assert dropped == {"unexpected": 1, "malformed": 2}
    client.socket.send(b"\xc1")
    assert wait_for(endpoint.take_num_dropped) == {"malformed": 1}


def test_peer_that_floods_does_not_stop_what_this_instance_sends(
    endpoint: InstanceEndpoint, consumer: InstanceEndpoint
) -> None:
    slow = encode(Renew(transfer_ids=tuple(f"t{i}" for i in range(MAX_RENEWED))))
    command = [sys.executable, "-c", FLOOD, str(consumer.port), slow.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as flood:
        try:
            assert flood.stdout is not None
            flood.stdout.readline()  # the flood has come
            began = time.monotonic()
            for i in range(5):  # between two turns, which take some milliseconds each
                consumer.send_release(endpoint.host, endpoint.port, f"t{i}")
                assert wait_for(endpoint.take_releases) == [f"t{i}"]
            assert time.monotonic() - began < 5.0
        finally:
            flood.kill()


def test_port_in_use_is_refused_at_the_start(endpoint: InstanceEndpoint) -> None:
    config = ConnectorConfig(side_channel_port=endpoint.port)
    with pytest.raises(ConfigError, match=str(endpoint.port)):
        InstanceEndpoint(config, engine_id="p1", tp_size=1)
