"""Notices to other instances: what is renewed when, and over which connections."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.ports import free_ports
from vllm_pd.config import ConnectorConfig
from vllm_pd.protocol.messages import MAX_RENEWED, AnyMessage, Describe, Release
from vllm_pd.session.channel import ControlContext, ControlServer
from vllm_pd.session.outbox import Outbox, RemoteLease, Renewals, renew_messages

LEASE = RemoteLease("127.0.0.1", 5600, "t1", 30.0)
OTHER = RemoteLease("127.0.0.1", 5600, "t2", 30.0)
ELSEWHERE = RemoteLease("127.0.0.1", 5700, "t3", 30.0)


class TestRenewals:
    """A made-up clock; the first request queues at 100."""

    @pytest.fixture
    def renewals(self) -> Renewals:
        renewals = Renewals()
        renewals.add("r1", LEASE, now=100.0)
        return renewals

    def test_without_requests_nothing_is_ever_due(self) -> None:
        assert Renewals().next_due() is None
        assert Renewals().take_due(now=1e9) == []

    def test_first_renewal_is_soon_as_the_age_of_the_lease_is_unknown(
        self, renewals: Renewals
    ) -> None:
        assert renewals.next_due() == 101.0
        assert renewals.take_due(now=100.9) == []
        assert renewals.take_due(now=101.0) == [(("127.0.0.1", 5600), ["t1"])]

    def test_further_renewals_come_three_times_per_lease(self, renewals: Renewals) -> None:
        renewals.take_due(now=101.0)
        assert renewals.take_due(now=110.9) == []
        assert renewals.take_due(now=111.0) == [(("127.0.0.1", 5600), ["t1"])]
        assert renewals.next_due() == 121.0

    def test_leases_of_one_instance_are_renewed_together(self, renewals: Renewals) -> None:
        renewals.take_due(now=101.0)
        renewals.add("r2", OTHER, now=105.0)
        renewals.add("r3", ELSEWHERE, now=105.5)
        assert renewals.take_due(now=106.0) == [(("127.0.0.1", 5600), ["t1", "t2"])]
        assert renewals.take_due(now=106.5) == [(("127.0.0.1", 5700), ["t3"])]

    def test_shortest_lease_of_an_instance_sets_the_pace(self, renewals: Renewals) -> None:
        renewals.add("r2", RemoteLease("127.0.0.1", 5600, "t2", 6.0), now=100.0)
        renewals.take_due(now=101.0)
        assert renewals.next_due() == 103.0

    def test_two_requests_of_one_prefill_are_one_renewal(self, renewals: Renewals) -> None:
        renewals.add("r2", LEASE, now=100.0)
        assert renewals.take_due(now=101.0) == [(("127.0.0.1", 5600), ["t1"])]
        renewals.remove("r1", now=102.0)
        assert renewals.take_due(now=111.0) == [(("127.0.0.1", 5600), ["t1"])]

    def test_request_that_queues_no_more_is_not_renewed(self, renewals: Renewals) -> None:
        renewals.remove("r1", now=100.5)
        assert renewals.next_due() is None
        assert (len(renewals), renewals.take_due(now=200.0)) == (0, [])

    def test_lease_of_a_request_that_has_queued_wants_a_last_renewal(
        self, renewals: Renewals
    ) -> None:
        assert renewals.remove("r1", now=100.5) == LEASE

    def test_lease_that_is_fresh_wants_no_last_renewal(self, renewals: Renewals) -> None:
        renewals.take_due(now=101.0)
        assert renewals.remove("r1", now=101.05) is None
        renewals.add("r2", LEASE, now=102.0)
        assert renewals.remove("r2", now=102.01) is None

    def test_removing_what_is_not_there_is_nothing(self, renewals: Renewals) -> None:
        assert renewals.remove("other", now=200.0) is None
        assert len(renewals) == 1

    def test_request_is_added_once(self, renewals: Renewals) -> None:
        assert renewals.add("r1", ELSEWHERE, now=100.0) is None
        assert renewals.take_due(now=101.0) == [(("127.0.0.1", 5600), ["t1"])]

    def test_absurdly_short_lease_does_not_make_a_busy_loop(self) -> None:
        renewals = Renewals()
        due = renewals.add("r1", RemoteLease("127.0.0.1", 5600, "t1", 1e-9), now=0.0)
        assert due == 0.05

    def test_number_of_leases_is_bounded(self) -> None:
        renewals = Renewals()
        for i in range(20_000):
            renewals.add(f"r{i}", LEASE, now=0.0)
        assert len(renewals) == 10_000


def test_many_renewals_take_several_messages() -> None:
    messages = list(renew_messages([f"t{i}" for i in range(MAX_RENEWED + 1)]))
    assert [len(message.transfer_ids) for message in messages] == [MAX_RENEWED, 1]


@pytest.fixture
def context() -> Iterator[ControlContext]:
    context = ControlContext(ConnectorConfig())
    yield context
    context.close()


@pytest.fixture
def server(context: ControlContext) -> Iterator[ControlServer]:
    server = context.server("127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture
def outbox(context: ControlContext) -> Iterator[Outbox]:
    outbox = Outbox(context)
    yield outbox
    outbox.close()


def receive(server: ControlServer, count: int) -> list[tuple[bytes, AnyMessage]]:
    """Return so many messages and the connections they came by."""
    received: list[tuple[bytes, AnyMessage]] = []
    deadline = time.monotonic() + 10.0
    while len(received) < count:
        assert time.monotonic() < deadline, f"{len(received)} came"
        if server.socket.poll(100):
            received += server.receive_some()
    return received


def release(i: int = 0) -> Release:
    return Release(transfer_id=f"t{i}")


def test_1000_notices_to_one_instance_take_one_connection(
    outbox: Outbox, server: ControlServer
) -> None:
    for i in range(1000):
        outbox.send(("127.0.0.1", server.port), release(i), now=0.0)
    received = receive(server, 1000)
    assert [message for _, message in received] == [release(i) for i in range(1000)]
    assert len({identity for identity, _ in received}) == 1
    assert len(outbox.clients()) == 1


def test_idle_connection_is_closed_after_what_was_sent_has_arrived(
    outbox: Outbox, server: ControlServer
) -> None:
    outbox.send(("127.0.0.1", server.port), release(), now=0.0)
    assert outbox.next_deadline() == 30.0
    outbox.check(now=29.9)
    assert len(outbox.clients()) == 1
    outbox.check(now=30.0)
    assert outbox.clients() == []
    assert outbox.next_deadline() is None
    assert receive(server, 1)[0][1] == release()


def test_connection_in_use_is_not_idle(outbox: Outbox, server: ControlServer) -> None:
    outbox.send(("127.0.0.1", server.port), release(), now=0.0)
    outbox.send(("127.0.0.1", server.port), release(), now=20.0)
    outbox.check(now=40.0)
    assert len(outbox.clients()) == 1


def test_instance_that_is_gone_is_connected_to_anew(
    context: ControlContext, outbox: Outbox, server: ControlServer
) -> None:
    address = "127.0.0.1", server.port
    outbox.send(address, release(), now=0.0)
    receive(server, 1)
    server.close()
    (lost,) = outbox.clients()
    assert lost.monitor.poll(10_000)
    changes = outbox.num_changes
    outbox.check(now=0.0)
    assert outbox.clients() == []
    assert outbox.num_changes == changes + 1
    restarted = context.server(*address)
    outbox.send(address, release(1), now=1.0)
    assert receive(restarted, 1)[0][1] == release(1)
    restarted.close()


def test_instance_that_never_was_is_given_up(outbox: Outbox) -> None:
    (port,) = free_ports(1)
    outbox.send(("127.0.0.1", port), release(), now=0.0)
    (client,) = outbox.clients()
    assert client.monitor.poll(10_000)
    outbox.check(now=0.0)
    assert outbox.clients() == []


def test_instance_that_answers_a_notice_is_cut_off(outbox: Outbox, server: ControlServer) -> None:
    outbox.send(("127.0.0.1", server.port), release(), now=0.0)
    ((identity, _),) = receive(server, 1)
    server.send(identity, Describe())
    (client,) = outbox.clients()
    assert client.socket.poll(10_000)
    outbox.check(now=0.0)
    assert outbox.clients() == []


def test_number_of_connections_is_bounded_and_the_oldest_goes_first(
    outbox: Outbox, server: ControlServer
) -> None:
    outbox.send(("127.0.0.1", server.port), release(), now=0.0)
    for port in range(1, 64):
        outbox.send(("127.0.0.1", port), release(), now=1.0)
    (oldest, *_) = clients = outbox.clients()
    outbox.send(("127.0.0.1", 64), release(), now=2.0)
    assert len(outbox.clients()) == len(clients) == 64
    assert oldest not in outbox.clients()
    assert receive(server, 1)[0][1] == release()


def test_without_a_key_no_other_host_is_spoken_to(outbox: Outbox) -> None:
    outbox.send(("192.0.2.1", 5600), release(), now=0.0)
    assert outbox.clients() == []
    assert outbox.num_unsent == 1


def test_address_that_is_none_costs_only_its_notice(outbox: Outbox) -> None:
    outbox.send(("no such host\0", 5600), release(), now=0.0)
    outbox.send(("127.0.0.1 ;", 5600), release(), now=0.0)
    assert outbox.clients() == []
    assert outbox.num_unsent == 2


def test_what_was_sent_is_delivered_after_closing(outbox: Outbox, server: ControlServer) -> None:
    outbox.send(("127.0.0.1", server.port), release(), now=0.0)
    outbox.close()
    outbox.close()
    assert receive(server, 1)[0][1] == release()
