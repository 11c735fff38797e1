"""With whom HCCL is tried again, and when."""

from __future__ import annotations

import msgspec
from ascend_vllm_plugin.verdicts import RETRY_S, STALL_RETRY_S, STALL_S, Verdicts

from tests.unit.ascend.test_settings import OURS as PEER

NEIGHBOUR = msgspec.structs.replace(PEER, worker="neighbour", device="1")
ELSEWHERE = msgspec.structs.replace(PEER, worker="elsewhere", boot_id="host-9")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nobody_is_forbidden_at_first() -> None:
    assert not Verdicts().forbids(PEER)


def test_quick_failure_concerns_one_worker_for_minutes() -> None:
    clock = Clock()
    verdicts = Verdicts(clock)
    assert not verdicts.add(PEER, blocked_s=0.1)
    assert (verdicts.forbids(PEER), verdicts.forbids(NEIGHBOUR)) == (True, False)
    clock.now += RETRY_S
    assert not verdicts.forbids(PEER)


def test_failure_that_held_the_engine_up_concerns_the_host_for_hours() -> None:
    clock = Clock()
    verdicts = Verdicts(clock)
    assert verdicts.add(PEER, blocked_s=STALL_S)
    clock.now += STALL_RETRY_S - 1
    assert (verdicts.forbids(PEER), verdicts.forbids(NEIGHBOUR)) == (True, True)
    assert not verdicts.forbids(ELSEWHERE)
    clock.now += 1
    assert not verdicts.forbids(PEER)


def test_peer_that_died_meanwhile_is_no_proof_of_a_missing_link() -> None:
    verdicts = Verdicts()
    assert not verdicts.add(PEER, blocked_s=140.0, is_gone=True)
    assert (verdicts.forbids(PEER), verdicts.forbids(NEIGHBOUR)) == (True, False)


def test_two_peers_of_a_host_that_are_gone_after_a_stall_are_proof() -> None:
    verdicts = Verdicts()
    verdicts.add(PEER, blocked_s=140.0, is_gone=True)
    assert verdicts.add(NEIGHBOUR, blocked_s=140.0, is_gone=True)
    assert verdicts.forbids(msgspec.structs.replace(PEER, worker="third"))
