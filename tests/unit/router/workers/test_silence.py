from __future__ import annotations

from vllm_pd.router.workers.silence import MAX_LOOKS, Silence


def looks(silence: Silence, count: int) -> list[bool]:
    return [silence.is_too_long() for _ in range(count)]


def test_a_worker_may_be_silent_for_a_number_of_looks() -> None:
    assert looks(Silence(), MAX_LOOKS + 1) == [False] * MAX_LOOKS + [True]


def test_a_word_ends_the_silence() -> None:
    silence = Silence()
    looks(silence, MAX_LOOKS)
    silence.heard()
    assert not any(looks(silence, MAX_LOOKS))
