from __future__ import annotations

from collections.abc import Sequence

from vllm_pd.config import InstanceSpec, Role, RoleLabel
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.workers.changes import Add, Change, Drain, Relabel, Remove, make, with_change

A, B = "a:80", "b:80"
ADD = Add(InstanceSpec(url="http://a", role=RoleLabel.DECODE))


async def healthy(_url: str) -> bool:
    return True


def pool() -> InstancePool:
    return InstancePool(["http://b"], [], probe=healthy, health_interval_s=3600.0)


def history(*changes: Change, known: Sequence[str] = (A, B)) -> tuple[Change, ...]:
    told: tuple[Change, ...] = ()
    for change in changes:
        told = with_change(told, change, known=known)
    return told


def test_changes_are_those_of_the_pool() -> None:
    changed = pool()
    make(ADD, changed)
    make(Relabel(B, RoleLabel.DECODE), changed)
    make(Drain(A), changed)
    assert [(one.instance_id, one.role, one.draining) for one in changed] == [
        (B, RoleLabel.DECODE, False),
        (A, RoleLabel.DECODE, True),
    ]
    make(Remove(B), changed)
    assert not changed.snapshot(Role.PREFILL)


def test_a_change_of_who_is_gone_changes_nothing() -> None:
    changed = pool()
    for change in (Relabel(A, RoleLabel.BOTH), Drain(A), Remove(A)):
        make(change, changed)
    assert [one.instance_id for one in changed] == [B]


def test_registration_and_removal_make_all_before_them_void() -> None:
    other = Drain(B)
    assert history(ADD, other, Relabel(A, RoleLabel.BOTH), Drain(A), Remove(A)) == (
        other,
        Remove(A),
    )
    assert history(Drain(A), Remove(A), ADD) == (ADD,)


def test_a_role_and_a_drain_are_remembered_once_and_beside_each_other() -> None:
    roles = [Relabel(A, RoleLabel.BOTH), Relabel(A, RoleLabel.PREFILL)]
    assert history(ADD, roles[0], Drain(A), roles[1], Drain(A)) == (ADD, roles[1], Drain(A))


def test_of_an_instance_that_is_to_go_nothing_is_told_unless_it_is_known() -> None:
    for leaving in (Drain(A), Remove(A)):
        assert history(ADD, Relabel(A, RoleLabel.BOTH), leaving, known=[B]) == ()
        assert history(ADD, leaving, Relabel(A, RoleLabel.BOTH), known=[B]) == ()
    assert history(ADD, Relabel(A, RoleLabel.BOTH), known=[]) == (ADD, Relabel(A, RoleLabel.BOTH))
