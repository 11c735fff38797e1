from __future__ import annotations

from vllm_pd.launcher.keeper import RestartPolicy
from vllm_pd.launcher.plan import Timing

TIMING = Timing(max_restarts=7, first_delay_s=1.0, max_delay_s=30.0, healthy_after_s=60.0)


def test_pauses_double_up_to_the_longest() -> None:
    policy = RestartPolicy(TIMING)
    assert [policy.next_delay(0.0) for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_the_policy_gives_up_after_the_last_restart() -> None:
    policy = RestartPolicy(Timing(max_restarts=1))
    assert policy.next_delay(0.0) == 1.0
    assert policy.next_delay(0.0) is None


def test_a_healthy_minute_starts_a_new_row() -> None:
    policy = RestartPolicy(Timing(max_restarts=2))
    assert [policy.next_delay(0.0), policy.next_delay(59.9)] == [1.0, 2.0]
    assert policy.next_delay(60.0) == 1.0


def test_no_restarts_allowed_means_none() -> None:
    assert RestartPolicy(Timing(max_restarts=0)).next_delay(100.0) is None


def test_a_very_long_row_does_not_overflow() -> None:
    policy = RestartPolicy(Timing(max_restarts=5000))
    assert {policy.next_delay(0.0) for _ in range(5000)} >= {30.0}
