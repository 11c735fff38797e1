from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.router.pace import Pace
from vllm_pd.router.spread import bucket_of


class Counted:
    def __init__(self) -> None:
        self.buckets: list[int] = []
        self.total_s = 0.0

    def __call__(self, buckets: list[int], total_s: float, /) -> None:
        self.buckets += buckets
        self.total_s += total_s


def counted(times: list[float]) -> Counted:
    """Return what a stream counts whose parts come at these times."""
    result = Counted()
    pace = Pace(result, iter(times).__next__)
    for _ in times:
        pace.note()
    pace.flush()
    return result


def test_gaps_are_counted_but_for_those_at_both_ends() -> None:
    found = counted([0.0, 5.0, 6.0, 8.0, 99.0])
    assert found.buckets == [bucket_of(1.0), bucket_of(2.0)]
    assert found.total_s == 3.0


def test_a_stream_of_three_parts_has_no_gap() -> None:
    assert counted([0.0, 1.0, 2.0]).buckets == []


def test_an_empty_stream_has_no_gap() -> None:
    assert counted([]).buckets == []


@given(st.integers(min_value=3, max_value=300))
def test_of_a_long_stream_nothing_is_lost_or_counted_twice(num_parts: int) -> None:
    times = [float(at) for at in range(num_parts)]
    found = counted(times)
    assert len(found.buckets) == num_parts - 3
    assert found.total_s == num_parts - 3


def test_long_streams_are_counted_while_they_last() -> None:
    found = Counted()
    pace = Pace(found, iter(map(float, range(1000))).__next__)
    for _ in range(100):
        pace.note()
    assert found.buckets
