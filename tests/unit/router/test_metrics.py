from __future__ import annotations

from contextlib import ExitStack

import pytest

from vllm_pd.router.metrics import BUSY, ONE_IN, Metrics


@pytest.mark.parametrize(("num_in_flight", "num_timed"), [(BUSY - 1, 2 * ONE_IN), (BUSY, 2)])
def test_every_stream_is_timed_unless_there_is_much_to_do(
    num_in_flight: int, num_timed: int
) -> None:
    metrics = Metrics()
    with ExitStack() as stack:
        for _ in range(num_in_flight):
            stack.enter_context(metrics.request("/v1/completions"))
        paces = [metrics.pace() for _ in range(2 * ONE_IN)]
    assert sum(pace is not None for pace in paces) == num_timed


def test_a_request_is_in_flight_until_it_ends() -> None:
    metrics = Metrics()
    with metrics.request("/v1/completions"):
        assert metrics.num_in_flight == 1
    assert metrics.num_in_flight == 0
