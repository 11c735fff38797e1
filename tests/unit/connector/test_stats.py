"""What workers count, merged over ranks and over time. Imports vLLM's base class."""

from __future__ import annotations

import pickle  # noqa: TID251 - as vLLM does between its own processes
from collections import Counter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.unit.connector.test_timeline import fetched
from vllm_pd.session.stats import FetchTimeline, Outcome, SessionStats

if TYPE_CHECKING:
    from vllm_pd.connector.stats import PDConnectorStats

# Importing vLLM warns about its own dependencies.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHM = {"shm": ("memfd", "")}


@pytest.fixture
def module() -> ModuleType:
    from vllm_pd.connector import stats

    return stats


def make(rank: int = 0, transports: Any = None, **counts: Any) -> PDConnectorStats:
    from vllm_pd.connector.stats import PDConnectorStats

    return PDConnectorStats.of_worker(rank, SessionStats(**counts), transports or SHM)


def empty() -> PDConnectorStats:
    from vllm_pd.connector.stats import PDConnectorStats

    return PDConnectorStats()


class FakeWorker:
    tp_rank = 3

    def __init__(self) -> None:
        self.stats: SessionStats | None = None
        self.num_bytes_saved = 0
        self.transports: dict[str, tuple[str, str]] = dict(SHM)

    def take_stats(self) -> SessionStats | None:
        taken, self.stats = self.stats, None
        return taken

    def take_num_bytes_saved(self) -> int:
        taken, self.num_bytes_saved = self.num_bytes_saved, 0
        return taken

    def transport_info(self) -> dict[str, tuple[str, str]]:
        return self.transports


def test_data_survives_pickle_and_msgpack() -> None:
    stats = make(fetches=[fetched()], num_leases_ended=Counter(fetched=2), num_blocks_held=5)
    assert pickle.loads(pickle.dumps(stats)).data == stats.data
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(stats.data))
    assert type(stats)(again).fetches == [fetched()]


def test_ranks_of_one_step_add_up() -> None:
    one = make(
        rank=0,
        fetches=[fetched("r1")],
        num_bytes_sent=10,
        num_leases_granted=1,
        num_leases_ended=Counter(fetched=1),
        num_leases=2,
    )
    other = make(
        rank=1,
        fetches=[fetched("r1")],
        num_bytes_sent=20,
        num_leases_granted=1,
        num_leases_ended=Counter(fetched=1, expired=1),
        num_leases=3,
    )
    data = one.aggregate(other).data
    assert len(data["fetches"]) == 2
    assert (data["num_bytes_sent"], data["num_leases_granted"]) == (30, 2)
    assert data["num_leases_ended"] == {"fetched": 2, "expired": 1}
    assert {rank: state["num_leases"] for rank, state in data["workers"].items()} == {
        "0": 2,
        "1": 3,
    }


def test_drops_of_the_instance_endpoint_add_to_those_of_the_workers(module: ModuleType) -> None:
    ours = module.PDConnectorStats.of_instance(Counter(wrong_key=2, malformed=1))
    assert not ours.is_empty()
    data = make(num_dropped_frames=Counter(malformed=1), num_leases=3).aggregate(ours).data
    assert data["num_dropped_frames"] == {"wrong_key": 2, "malformed": 2}
    assert data["workers"]["0"]["num_leases"] == 3


def test_later_state_of_a_rank_replaces_the_earlier_one() -> None:
    data = make(num_blocks_held=7).aggregate(make(num_blocks_held=0)).data
    assert data["workers"]["0"]["num_blocks_held"] == 0


def test_merged_stats_do_not_grow_for_ever(module: ModuleType) -> None:
    merged = empty()
    some = make(fetches=[fetched(f"r{i}") for i in range(module.MAX_FETCHES // 2)])
    for _ in range(3):
        merged.aggregate(some)
    assert len(merged.data["fetches"]) == module.MAX_FETCHES


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, True),
        ({"num_leases": 3, "num_blocks_held": 9}, True),
        ({"num_dropped_frames": Counter(malformed=0)}, True),
        ({"fetches": [fetched()]}, False),
        ({"num_dropped_frames": Counter(malformed=1)}, False),
        ({"num_leases_granted": 1}, False),
    ],
)
def test_stats_without_an_event_are_empty(counts: dict[str, Any], expected: bool) -> None:
    assert make(**counts).is_empty() is expected


def test_reset_forgets_everything() -> None:
    stats = make(fetches=[fetched()], num_leases_granted=4)
    stats.reset()
    assert stats.data == empty().data


def test_ranks_without_news_are_filled_in_from_their_last_word() -> None:
    known: dict[str, Any] = {}
    make(rank=0, num_leases=1).remember_workers(known)
    make(rank=1, num_leases=2).remember_workers(known)
    news = make(rank=0, num_leases=0)
    news.remember_workers(known)
    leases = {rank: state["num_leases"] for rank, state in news.data["workers"].items()}
    assert leases == {"0": 0, "1": 2}


def test_log_line_sums_up_the_fetches_of_an_interval() -> None:
    times_s = [0.01 * (i + 1) for i in range(10)]
    fetches = [
        fetched(num_bytes=1_000_000, timeline=FetchTimeline(transfer_s=0.002, total_s=time_s))
        for time_s in times_s
    ]
    failed = fetched(outcome=Outcome.TIMEOUT, num_bytes=0, timeline=FetchTimeline(total_s=30.0))
    assert make(fetches=[*fetches, failed]).reduce() == {
        "Fetches": 11,
        "Failed fetches": 1,
        "MB fetched": 10.0,
        "Mean fetch time (ms)": 55.0,
        "P90 fetch time (ms)": 90.0,
        "Throughput (MB/s)": 500.0,
    }


def test_log_line_of_failures_alone_has_no_times() -> None:
    failed = fetched(outcome=Outcome.PEER_LOST)
    assert make(fetches=[failed]).reduce() == {"Fetches": 1, "Failed fetches": 1}


def test_log_line_of_a_prefill_instance_tells_its_leases() -> None:
    stats = make(
        num_leases_granted=3,
        num_leases_ended=Counter(fetched=2),
        num_bytes_sent=5_000_000,
        num_handshake_failures=Counter(refused=1),
        num_dropped_frames=Counter(malformed=2, unsent=2),
    )
    assert stats.reduce() == {
        "Leases granted": 3,
        "Leases fetched": 2,
        "Leases released": 0,
        "Leases expired": 0,
        "MB sent": 5.0,
        "Failed handshakes": 1,
        "Dropped frames": 4,
    }


def test_worker_tells_its_transports_in_the_first_step(module: ModuleType) -> None:
    worker = FakeWorker()
    reporter = module.StatsReporter(worker)
    assert reporter.take().data["workers"]["3"]["transports"] == {"shm": ("memfd", "")}
    assert reporter.take() is None


def test_worker_without_a_kv_cache_has_no_news(module: ModuleType) -> None:
    worker = FakeWorker()
    worker.transports = {}
    assert module.StatsReporter(worker).take() is None


def test_worker_tells_its_transports_with_all_news(module: ModuleType) -> None:
    """The API server may begin to observe after the first step."""
    worker = FakeWorker()
    reporter = module.StatsReporter(worker)
    reporter.take()
    worker.stats = SessionStats(fetches=[fetched()])
    news = reporter.take()
    assert news.fetches == [fetched()]
    assert list(news.data["workers"]["3"]["transports"]) == ["shm"]
    assert reporter.take() is None


def test_saved_bytes_alone_are_news_and_leave_the_state_as_it_was(module: ModuleType) -> None:
    """Nothing happened to the sessions, so the leases they hold are still there."""
    worker = FakeWorker()
    reporter = module.StatsReporter(worker)
    worker.stats = SessionStats(num_leases_granted=2, num_leases=2, num_blocks_held=7)
    reporter.take()
    worker.num_bytes_saved = 4096
    news = reporter.take()
    assert not news.is_empty()
    assert (news.data["num_bytes_saved"], news.data["num_leases_granted"]) == (4096, 0)
    state = news.data["workers"]["3"]
    assert (state["num_leases"], state["num_blocks_held"]) == (2, 7)
    assert reporter.take() is None


def test_log_line_tells_the_bytes_of_wholly_cached_prompts(module: ModuleType) -> None:
    worker = FakeWorker()
    worker.num_bytes_saved = 2_500_000
    assert module.StatsReporter(worker).take().reduce() == {"MB of wholly cached prompts": 2.5}
