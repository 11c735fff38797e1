"""Changes of who belongs to the router, in a form that every worker can make. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

from vllm_pd.config import InstanceSpec, RoleLabel
from vllm_pd.router.addresses import base_url, instance_id
from vllm_pd.router.instances import InstancePool


class Add(msgspec.Struct, frozen=True, tag=True):
    """Register an instance, or change the one at its address."""

    spec: InstanceSpec

    @property
    def name(self) -> str:
        """Id of the instance."""
        return instance_id(base_url(self.spec.url))


class Relabel(msgspec.Struct, frozen=True, tag=True):
    """Change an instance's role."""

    name: str
    role: RoleLabel


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Drain an instance."""

    name: str


class Remove(msgspec.Struct, frozen=True, tag=True):
    """Forget an instance at once."""

    name: str


Change = Add | Relabel | Drain | Remove


def make(change: Change, pool: InstancePool) -> None:
    """Change a pool; an instance that is not there any more needs no change.

    Raises:
        ConfigError: an address is none; nothing has changed then.
    """
    if isinstance(change, Add):
        pool.add(change.spec)
        return
    instance = pool.get(change.name)
    if instance is None:
        return
    match change:
        case Relabel():
            pool.relabel(instance, change.role)
        case Drain():
            pool.drain(instance)
        case Remove():
            pool.remove(instance)


def with_change(
    history: Sequence[Change], change: Change, *, known: Container[str]
) -> tuple[Change, ...]:
    """Return what a worker has to be told that knows nothing but the configuration.

    What a later change of the same instance makes void is left out, and so is all about
    an instance that is to go and that nobody would tell the worker of.

    Args:
        history: what was to be told so far.
        change: what is made now.
        known: ids of the instances that the worker has from the configuration.
    """
    void: tuple[type[Change], ...] = (type(change),)
    if isinstance(change, Add | Remove):
        void = (Add, Relabel, Drain, Remove)
    kept = [one for one in history if one.name != change.name or not isinstance(one, void)]
    if change.name in known or isinstance(change, Add):
        return (*kept, change)
    if isinstance(change, Relabel) and any(one.name == change.name for one in kept):
        return (*kept, change)
    return tuple(one for one in kept if one.name != change.name)
