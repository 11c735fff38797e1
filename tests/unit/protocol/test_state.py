"""Fetches and leases, driven with a made-up clock."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_pd.errors import LeaseExpiredError, LocalProtocolError, RemoteProtocolError
from vllm_pd.protocol.state import Fetch, FetchState, LeaseTable

LEASE_S = 30.0


@pytest.fixture
def leases() -> LeaseTable:
    table = LeaseTable(lease_s=LEASE_S)
    table.grant("t", request_id="req-1", block_ids=[7, 8, 9], num_fetches=2, now=100.0)
    return table


def begin(leases: LeaseTable, offset: int = 0, count: int = 3) -> tuple[int, ...]:
    return leases.begin_fetch("t", block_offset=offset, num_blocks=count)


def test_lease_expires_once_at_its_deadline(leases: LeaseTable) -> None:
    assert leases.expire(now=129.9) == []
    assert leases.expire(now=130.0) == ["req-1"]
    assert leases.expire(now=130.0) == []


def test_next_expiry_is_when_expire_has_something_to_do(leases: LeaseTable) -> None:
    assert leases.next_expiry() == 130.0
    begin(leases)
    assert leases.next_expiry() is None


def test_fetch_gets_the_blocks_it_names_by_position(leases: LeaseTable) -> None:
    assert begin(leases, 1, 2) == (8, 9)


@pytest.mark.parametrize(("offset", "count"), [(0, 4), (3, 1), (2, 2)])
def test_blocks_beyond_the_prefill_blame_the_peer(
    leases: LeaseTable, offset: int, count: int
) -> None:
    with pytest.raises(RemoteProtocolError):
        begin(leases, offset, count)
    assert leases.expire(now=130.0) == ["req-1"]  # not counted as reading


def test_blocks_being_read_do_not_expire(leases: LeaseTable) -> None:
    begin(leases)
    assert leases.expire(now=1e9) == []


def test_blocks_are_freed_after_the_last_consumer_rank(leases: LeaseTable) -> None:
    begin(leases)
    assert leases.end_fetch("t", delivered=True) is None
    begin(leases)
    assert leases.end_fetch("t", delivered=True) == "req-1"
    assert leases.has_ended("t")
    assert len(leases) == 0


def test_failed_fetch_leaves_the_lease_for_another_try(leases: LeaseTable) -> None:
    begin(leases)
    assert leases.end_fetch("t", delivered=False) is None
    assert begin(leases) == (7, 8, 9)


def test_fetch_after_expiry_is_refused(leases: LeaseTable) -> None:
    leases.expire(now=130.0)
    with pytest.raises(LeaseExpiredError):
        begin(leases)


def test_release_frees_at_once(leases: LeaseTable) -> None:
    assert leases.release("t") == "req-1"
    assert leases.release("t") is None


def test_release_waits_for_a_reader_and_lets_no_other_in(leases: LeaseTable) -> None:
    begin(leases)
    assert leases.release("t") is None
    with pytest.raises(LeaseExpiredError):
        begin(leases)
    assert leases.end_fetch("t", delivered=False) == "req-1"


def test_second_grant_of_a_transfer_id_is_our_bug(leases: LeaseTable) -> None:
    with pytest.raises(LocalProtocolError):
        leases.grant("t", request_id="req-2", block_ids=[1], num_fetches=1, now=0.0)


def test_ended_transfers_are_remembered_up_to_a_limit() -> None:
    table = LeaseTable(lease_s=1.0, num_remembered=2)
    for name in "abc":
        table.grant(name, request_id=name, block_ids=[1], num_fetches=1, now=0.0)
        table.release(name)
    assert [table.has_ended(name) for name in "abc"] == [False, True, True]


def test_fetch_states_follow_the_table() -> None:
    allowed = {
        (FetchState.AWAITING_PEER, FetchState.REQUESTED),
        (FetchState.AWAITING_PEER, FetchState.FAILED),
        (FetchState.REQUESTED, FetchState.RECEIVING),
        (FetchState.REQUESTED, FetchState.FAILED),
        (FetchState.RECEIVING, FetchState.DONE),
        (FetchState.RECEIVING, FetchState.FAILED),
    }
    for source, target in itertools.product(FetchState, FetchState):
        fetch = Fetch(1, "req", "t", 0, (1,), 1.0, state=source)
        if (source, target) in allowed:
            fetch.advance(target)
            assert fetch.state is target
        else:
            with pytest.raises(LocalProtocolError):
                fetch.advance(target)
            assert fetch.state is source


class Leases(RuleBasedStateMachine):
    """Whatever happens in whatever order: freed once, and never while read."""

    ids = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(lease_s=10.0)
        self.now = 0.0
        self.numbers = itertools.count()
        self.held: dict[str, str] = {}  # transfer id -> request id
        self.readers: dict[str, int] = {}
        self.freed: list[str] = []

    def free(self, request_id: str | None) -> None:
        if request_id is None:
            return
        assert request_id not in self.freed
        transfer_id = next(t for t, r in self.held.items() if r == request_id)
        assert not self.readers.get(transfer_id)
        del self.held[transfer_id]
        self.freed.append(request_id)

    @rule(transfer_id=ids, num_fetches=st.integers(1, 3))
    def grant(self, transfer_id: str, num_fetches: int) -> None:
        request_id = f"req-{next(self.numbers)}"
        if transfer_id in self.held:
            with pytest.raises(LocalProtocolError):
                self.table.grant(
                    transfer_id, request_id="x", block_ids=[1], num_fetches=1, now=self.now
                )
            return
        self.table.grant(
            transfer_id,
            request_id=request_id,
            block_ids=[1, 2],
            num_fetches=num_fetches,
            now=self.now,
        )
        self.held[transfer_id] = request_id

    @rule(transfer_id=ids, count=st.integers(1, 3))
    def begin(self, transfer_id: str, count: int) -> None:
        try:
            self.table.begin_fetch(transfer_id, block_offset=0, num_blocks=count)
        except (LeaseExpiredError, RemoteProtocolError):
            return
        assert transfer_id in self.held
        self.readers[transfer_id] = self.readers.get(transfer_id, 0) + 1

    @rule(transfer_id=ids, delivered=st.booleans())
    def end(self, transfer_id: str, delivered: bool) -> None:
        if self.readers.get(transfer_id):
            self.readers[transfer_id] -= 1
            self.free(self.table.end_fetch(transfer_id, delivered=delivered))

    @rule(transfer_id=ids)
    def release(self, transfer_id: str) -> None:
        self.free(self.table.release(transfer_id))

    @rule(elapsed=st.floats(0, 20))
    def expire(self, elapsed: float) -> None:
        self.now += elapsed
        for request_id in self.table.expire(self.now):
            self.free(request_id)

    @invariant()
    def table_holds_what_is_not_freed(self) -> None:
        assert len(self.table) == len(self.held)


TestLeasesUnderAnyEvents = Leases.TestCase
TestLeasesUnderAnyEvents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
