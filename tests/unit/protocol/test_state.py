"""Fetches and leases, driven with a made-up clock."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_pd.errors import LeaseExpiredError, LocalProtocolError, RemoteProtocolError
from vllm_pd.protocol.state import Fetch, FetchState, LeaseEnd, LeaseTable

LEASE_S = 30.0
MAX_LEASE_S = 100.0


@pytest.fixture
def leases() -> LeaseTable:
    table = LeaseTable(LEASE_S, MAX_LEASE_S)
    table.grant("t", request_id="req-1", block_ids=[7, 8, 9], now=100.0)
    return table


def begin(leases: LeaseTable, offset: int = 0, count: int = 3) -> tuple[int, ...]:
    return leases.begin_fetch("t", block_offset=offset, num_blocks=count)


def end(
    leases: LeaseTable,
    *,
    consumer: str = "d1",
    rank: int = 0,
    num_readers: int = 1,
    delivered: bool = True,
) -> str | None:
    return leases.end_fetch(
        "t", consumer=consumer, rank=rank, num_readers=num_readers, delivered=delivered
    )


def test_lease_expires_once_at_its_deadline(leases: LeaseTable) -> None:
    assert leases.expire(now=129.9) == []
    assert leases.expire(now=130.0) == ["req-1"]
    assert leases.expire(now=130.0) == []


def test_next_expiry_is_when_expire_has_something_to_do(leases: LeaseTable) -> None:
    assert leases.next_expiry() == 130.0
    begin(leases)
    assert leases.next_expiry() is None


def test_renewal_starts_the_lease_anew(leases: LeaseTable) -> None:
    leases.renew("t", now=120.0)
    assert leases.expire(now=149.9) == []
    assert leases.expire(now=150.0) == ["req-1"]


def test_renewals_reach_no_further_than_the_longest_lease(leases: LeaseTable) -> None:
    for now in (129.0, 150.0, 175.0, 199.0):
        leases.renew("t", now)
    assert leases.next_expiry() == 200.0
    assert leases.expire(now=200.0) == ["req-1"]


def test_renewal_never_shortens_a_lease(leases: LeaseTable) -> None:
    leases.renew("t", now=150.0)
    leases.renew("t", now=110.0)
    assert leases.next_expiry() == 180.0


def test_first_lease_is_no_longer_than_the_longest() -> None:
    table = LeaseTable(lease_s=30.0, max_lease_s=5.0)
    table.grant("t", request_id="req-1", block_ids=[1], now=0.0)
    assert table.expire(now=5.0) == ["req-1"]


def test_renewal_of_what_is_over_or_unknown_is_ignored(leases: LeaseTable) -> None:
    leases.renew("nobody", now=100.0)
    leases.expire(now=130.0)
    leases.renew("t", now=130.0)
    assert (len(leases), leases.next_expiry()) == (0, None)


def test_released_lease_is_not_prolonged_by_a_renewal(leases: LeaseTable) -> None:
    begin(leases)
    leases.release("t")
    leases.renew("t", now=129.0)
    assert end(leases, delivered=False) == "req-1"


def test_blocks_held_are_those_of_all_leases(leases: LeaseTable) -> None:
    leases.grant("u", request_id="req-2", block_ids=[1, 2], now=100.0)
    assert leases.num_blocks == 5
    leases.release("t")
    assert leases.num_blocks == 2


def test_fetch_gets_the_blocks_it_names_by_position(leases: LeaseTable) -> None:
    assert begin(leases, 1, 2) == (8, 9)


@pytest.mark.parametrize(("offset", "count"), [(0, 4), (3, 1), (2, 2)])
def test_blocks_beyond_the_prefill_blame_the_peer(
    leases: LeaseTable, offset: int, count: int
) -> None:
    with pytest.raises(RemoteProtocolError):
        begin(leases, offset, count)
    assert leases.expire(now=130.0) == ["req-1"]  # not counted as reading


@pytest.mark.parametrize("wanted", ["", "mine"])
@pytest.mark.parametrize("granted", ["", "mine"])
def test_fetch_of_the_same_or_of_an_unknown_prompt_gets_the_blocks(
    granted: str, wanted: str
) -> None:
    leases = LeaseTable(lease_s=10.0)
    leases.grant("t", request_id="r", block_ids=(7, 8, 9), now=0.0, prompt_digest=granted)
    assert leases.begin_fetch("t", block_offset=0, num_blocks=1, prompt_digest=wanted) == (7,)


def test_fetch_of_another_prompt_blames_the_peer_and_protects_nothing() -> None:
    leases = LeaseTable(lease_s=10.0)
    leases.grant("t", request_id="r", block_ids=(7, 8, 9), now=0.0, prompt_digest="mine")
    with pytest.raises(RemoteProtocolError, match="another prompt"):
        leases.begin_fetch("t", block_offset=0, num_blocks=1, prompt_digest="yours")
    assert leases.expire(10.0) == ["r"]


def test_blocks_being_read_do_not_expire(leases: LeaseTable) -> None:
    begin(leases)
    assert leases.expire(now=1e9) == []


def test_lease_that_ran_out_while_it_was_read_expires_after_a_failed_read(
    leases: LeaseTable,
) -> None:
    begin(leases)
    assert end(leases, delivered=False) is None
    assert leases.expire(now=130.0) == ["req-1"]


def test_only_reader_ends_the_lease(leases: LeaseTable) -> None:
    begin(leases)
    assert end(leases) == "req-1"
    assert leases.has_ended("t")
    assert len(leases) == 0


def test_blocks_are_freed_after_the_last_reader_of_a_consumer(leases: LeaseTable) -> None:
    begin(leases)
    assert end(leases, num_readers=2) is None
    begin(leases)
    assert end(leases, num_readers=2) is None  # the same rank, for another request
    begin(leases)
    assert end(leases, rank=1, num_readers=2) == "req-1"


def test_readers_of_two_consumers_are_counted_apart(leases: LeaseTable) -> None:
    begin(leases)
    assert end(leases, consumer="d1", num_readers=2) is None
    begin(leases)
    assert end(leases, consumer="d2", num_readers=3) is None
    begin(leases)
    assert end(leases, consumer="d1", rank=1, num_readers=2) == "req-1"


def test_consumer_that_has_all_ends_the_lease_when_the_other_stops_reading(
    leases: LeaseTable,
) -> None:
    begin(leases)
    begin(leases)
    assert end(leases, consumer="d1") is None
    with pytest.raises(LeaseExpiredError):
        begin(leases)
    assert end(leases, consumer="d2", delivered=False) == "req-1"


def test_failed_fetch_leaves_the_lease_for_another_try(leases: LeaseTable) -> None:
    begin(leases)
    assert end(leases, delivered=False) is None
    assert begin(leases) == (7, 8, 9)


def test_fetch_after_expiry_is_refused(leases: LeaseTable) -> None:
    leases.expire(now=130.0)
    with pytest.raises(LeaseExpiredError):
        begin(leases)


def test_release_frees_at_once(leases: LeaseTable) -> None:
    assert leases.release("t") == "req-1"
    assert leases.release("t") is None


def test_release_that_comes_first_ends_the_lease_when_it_begins() -> None:
    leases = LeaseTable(lease_s=10.0)
    assert leases.release("t") is None
    assert leases.grant("t", request_id="r", block_ids=(7,), now=0.0) == "r"
    assert leases.has_ended("t")
    assert leases.grant("t", request_id="r2", block_ids=(7,), now=0.0) is None


def test_release_waits_for_a_reader_and_lets_no_other_in(leases: LeaseTable) -> None:
    begin(leases)
    assert leases.release("t") is None
    with pytest.raises(LeaseExpiredError):
        begin(leases)
    assert end(leases, delivered=False) == "req-1"


def test_ends_are_counted_by_reason(leases: LeaseTable) -> None:
    for name in ("fetched", "released"):
        leases.grant(name, request_id=name, block_ids=[1], now=100.0)
    leases.begin_fetch("fetched", block_offset=0, num_blocks=1)
    leases.end_fetch("fetched", consumer="d", rank=0, num_readers=1, delivered=True)
    leases.release("released")
    leases.expire(now=130.0)
    assert leases.num_ended == dict.fromkeys(LeaseEnd, 1)


def test_second_grant_of_a_transfer_id_is_our_bug(leases: LeaseTable) -> None:
    with pytest.raises(LocalProtocolError):
        leases.grant("t", request_id="req-2", block_ids=[1], now=0.0)


def test_transfer_id_may_be_granted_again_after_its_end(leases: LeaseTable) -> None:
    leases.release("t")
    leases.grant("t", request_id="req-2", block_ids=[1], now=100.0)
    assert not leases.has_ended("t")
    assert leases.release("t") == "req-2"


def test_ended_transfers_are_remembered_up_to_a_limit() -> None:
    table = LeaseTable(lease_s=1.0, num_remembered=2)
    for name in "abc":
        table.grant(name, request_id=name, block_ids=[1], now=0.0)
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
        fetch = Fetch(1, "req", "t", deadline=1.0, state=source)
        if (source, target) in allowed:
            fetch.advance(target)
            assert fetch.state is target
        else:
            with pytest.raises(LocalProtocolError):
                fetch.advance(target)
            assert fetch.state is source


@dataclass
class Held:
    """What the model knows of a lease."""

    request_id: str
    granted: float
    expires_at: float
    readers: list[tuple[str, int]] = field(default_factory=list)  # ranks that read now
    delivered: set[tuple[str, int]] = field(default_factory=set)
    is_closed: bool = False  # released, or one consumer has it all


NUM_READERS = {"d1": 1, "d2": 3}
READERS = [(name, rank) for name, count in sorted(NUM_READERS.items()) for rank in range(count)]


class Leases(RuleBasedStateMachine):
    """Whatever happens in whatever order: freed once, and never while read."""

    ids = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(lease_s=10.0, max_lease_s=25.0)
        self.now = 0.0
        self.numbers = itertools.count()
        self.held: dict[str, Held] = {}  # by transfer id
        self.ended: Counter[LeaseEnd] = Counter()
        self.freed: list[str] = []
        self.unwanted: set[str] = set()  # released before their grant

    def free(self, request_id: str, reason: LeaseEnd) -> None:
        assert request_id not in self.freed
        transfer_id = next(t for t, lease in self.held.items() if lease.request_id == request_id)
        assert not self.held.pop(transfer_id).readers
        self.freed.append(request_id)
        self.ended[reason] += 1

    @rule(transfer_id=ids)
    def grant(self, transfer_id: str) -> None:
        request_id = f"req-{next(self.numbers)}"
        try:
            freed = self.table.grant(
                transfer_id, request_id=request_id, block_ids=[1, 2], now=self.now
            )
        except LocalProtocolError:
            assert transfer_id in self.held
        else:
            assert transfer_id not in self.held
            self.held[transfer_id] = Held(request_id, self.now, self.now + 10.0)
            assert (freed == request_id) == (transfer_id in self.unwanted)
            self.unwanted.discard(transfer_id)
            if freed is not None:
                self.free(freed, LeaseEnd.RELEASED)

    @rule(transfer_id=ids, reader=st.sampled_from(READERS), count=st.integers(1, 3))
    def begin(self, transfer_id: str, reader: tuple[str, int], count: int) -> None:
        lease = self.held.get(transfer_id)
        try:
            self.table.begin_fetch(transfer_id, block_offset=0, num_blocks=count)
        except LeaseExpiredError:
            assert lease is None or lease.is_closed
        except RemoteProtocolError:
            assert count > 2
        else:
            assert lease is not None
            assert not lease.is_closed
            lease.readers.append(reader)

    @rule(transfer_id=ids, delivered=st.booleans(), pick=st.integers(0, 9))
    def end(self, transfer_id: str, delivered: bool, pick: int) -> None:
        lease = self.held.get(transfer_id)
        if lease is None or not lease.readers:
            return
        consumer, rank = lease.readers.pop(pick % len(lease.readers))
        if delivered:
            lease.delivered.add((consumer, rank))
        counts = Counter(name for name, _ in lease.delivered)
        has_all = any(counts[name] >= count for name, count in NUM_READERS.items())
        request_id = self.table.end_fetch(
            transfer_id,
            consumer=consumer,
            rank=rank,
            num_readers=NUM_READERS[consumer],
            delivered=delivered,
        )
        is_over = (has_all or lease.is_closed) and not lease.readers
        assert (request_id is not None) == is_over
        lease.is_closed |= has_all
        if request_id is not None:
            self.free(request_id, LeaseEnd.FETCHED if has_all else LeaseEnd.RELEASED)

    @rule(transfer_id=ids)
    def release(self, transfer_id: str) -> None:
        if transfer_id not in self.held and not self.table.has_ended(transfer_id):
            self.unwanted.add(transfer_id)
        request_id = self.table.release(transfer_id)
        if request_id is not None:
            self.free(request_id, LeaseEnd.RELEASED)
        elif lease := self.held.get(transfer_id):
            assert lease.readers
            lease.is_closed = True

    @rule(transfer_id=ids)
    def renew(self, transfer_id: str) -> None:
        self.table.renew(transfer_id, self.now)
        if lease := self.held.get(transfer_id):
            lease.expires_at = max(lease.expires_at, min(self.now + 10.0, lease.granted + 25.0))

    @rule(elapsed=st.floats(0, 20))
    def expire(self, elapsed: float) -> None:
        self.now += elapsed
        due = {lease.request_id for lease in self.held.values() if self.is_due(lease)}
        expired = self.table.expire(self.now)
        assert set(expired) == due
        for request_id in expired:
            self.free(request_id, LeaseEnd.EXPIRED)

    def is_due(self, lease: Held) -> bool:
        return lease.expires_at <= self.now and not lease.readers

    @invariant()
    def table_holds_what_is_not_freed(self) -> None:
        assert len(self.table) == len(self.held)
        assert self.table.num_blocks == 2 * len(self.held)
        assert all(transfer_id in self.table for transfer_id in self.held)

    @invariant()
    def every_end_is_counted(self) -> None:
        assert +self.table.num_ended == self.ended

    @invariant()
    def no_lease_outlasts_its_limit(self) -> None:
        limits = [lease.granted + 25.0 for lease in self.held.values() if not lease.readers]
        expiry = self.table.next_expiry()
        assert (expiry is None) == (not limits)
        assert expiry is None or expiry <= max(limits)


TestLeasesUnderAnyEvents = Leases.TestCase
TestLeasesUnderAnyEvents.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
