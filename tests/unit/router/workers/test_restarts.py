from __future__ import annotations

from vllm_pd.router.workers.restarts import FIRST_PAUSE_S, MAX_PAUSE_S, SERVICE_S, Restarts


def test_the_first_failure_costs_no_pause_and_the_pauses_after_it_double() -> None:
    restarts = Restarts()
    assert [restarts.pause_s(0.0) for _ in range(4)] == [
        0.0,
        FIRST_PAUSE_S,
        2 * FIRST_PAUSE_S,
        4 * FIRST_PAUSE_S,
    ]


def test_a_pause_is_bounded() -> None:
    restarts = Restarts()
    assert [restarts.pause_s(0.0) for _ in range(5000)][-1] == MAX_PAUSE_S


def test_a_worker_that_served_for_a_while_begins_a_new_row() -> None:
    restarts = Restarts()
    for _ in range(3):
        restarts.pause_s(0.0)
    assert restarts.pause_s(SERVICE_S) == 0.0
