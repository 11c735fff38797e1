"""Which instance gets which devices. Pure: no look at the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import msgspec

from vllm_pd.config import InstanceGroup, Role
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.devices import NOUNS

_DEFAULT_MAX_TP = 4


@dataclass(frozen=True)
class Placement:
    """One instance and its devices.

    Attributes:
        name: e.g. ``prefill-0``.
        role: what it is used for.
        group: the group it belongs to.
        index: its number within the group.
        ranks: the devices of each tensor-parallel rank; several only for CPU cores.
    """

    name: str
    role: Role
    group: InstanceGroup
    index: int
    ranks: tuple[tuple[str, ...], ...]


def parse_shape(text: str, *, role: Role) -> tuple[int, int]:
    """Parse ``INSTANCESxTP``.

    Raises:
        ConfigError: it is something else.
    """
    found = re.fullmatch(r"([0-9]{1,5})[xX]([0-9]{1,5})", text.strip())
    if not found or not int(found[1]) or not int(found[2]):
        raise ConfigError(
            f"{role.value} {text!r} is not INSTANCESxTP", hint="e.g. 2x4: two instances of TP 4"
        )
    return int(found[1]), int(found[2])


def fill_groups(
    prefill: InstanceGroup | None, decode: InstanceGroup | None, *, device: str, num_devices: int
) -> dict[Role, InstanceGroup]:
    """Choose the groups that the user left open.

    On CPU one instance of TP 1. On devices one instance of TP 4, or as much as
    is left, in powers of two because heads rarely divide by anything else.

    Raises:
        ConfigError: a single device cannot serve both roles.
    """
    given = [group for group in (prefill, decode) if group]
    if device != "cpu" and num_devices < 2:
        raise ConfigError(
            f"prefill and decode need two {NOUNS[device]}s, {num_devices} found",
            hint="DEVICE=cpu serves on the CPU",
        )
    if device == "cpu":
        default = InstanceGroup()
    else:
        left = num_devices - sum(group.count * group.tp for group in given)
        share = left if given else left // 2
        default = InstanceGroup(tp=min(_DEFAULT_MAX_TP, _power_of_two_within(share)))
    return {Role.PREFILL: prefill or default, Role.DECODE: decode or default}


def place(
    groups: dict[Role, InstanceGroup], pool: Sequence[str], *, device: str
) -> tuple[list[Placement], list[str]]:
    """Give every instance its devices, prefill first.

    Groups that name their devices get those; the others share the rest.

    Returns:
        The instances, and warnings for the user.

    Raises:
        ConfigError: more devices asked for than there are.
    """
    for role, group in groups.items():
        _check_named(role, group, pool, device)
    named = {d for group in groups.values() for d in _names(group)}
    free = [d for d in pool if d not in named]
    if device == "cpu":
        ranks, warnings = _core_ranks(groups, free or list(pool))
    else:
        ranks, warnings = _device_ranks(groups, free, pool, device), []
    if len(named) < sum(len(_names(group)) for group in groups.values()):
        warnings.append("prefill and decode name the same devices: they will slow each other down")
    placements = [
        Placement(f"{role.value}-{i}", role, group, i, tuple(islice(ranks[role], group.tp)))
        for role, group in groups.items()
        for i in range(group.count)
    ]
    return placements, warnings


def core_list(cores: Sequence[str]) -> str:
    """Write core numbers the short way: ``0-3,8``."""
    numbers = sorted(int(core) for core in cores)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def kv_cache_gib(mem_available_gib: float, num_instances: int) -> int:
    """Return the KV cache of one CPU instance: its part of 40 % of the free memory, 1 to 4 GiB."""
    return min(4, max(1, int(0.4 * mem_available_gib / num_instances)))


def _power_of_two_within(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)


def _names(group: InstanceGroup) -> list[str]:
    return [str(d) for d in group.devices or ()]


def _check_named(role: Role, group: InstanceGroup, pool: Sequence[str], device: str) -> None:
    """Check the devices that a group names itself."""
    if group.devices is None:
        return
    names, num_ranks = _names(group), group.count * group.tp
    if absent := [name for name in names if name not in pool]:
        raise ConfigError(
            f"{role.value}: no {NOUNS[device]} {absent[0]}; there are {', '.join(pool)}"
        )
    if device != "cpu" and len(names) != num_ranks:
        raise ConfigError(
            f"{role.value} {group.count}x{group.tp} needs {num_ranks} {NOUNS[device]}s, "
            f"its devices name {len(names)}"
        )


def _device_ranks(
    groups: dict[Role, InstanceGroup], free: Sequence[str], pool: Sequence[str], device: str
) -> dict[Role, Iterator[tuple[str, ...]]]:
    """One device for each rank, each used once."""
    wanted = sum(group.count * group.tp for group in groups.values())
    unnamed = sum(g.count * g.tp for g in groups.values() if g.devices is None)
    if unnamed > len(free):
        shapes = " + ".join(f"{role.value} {g.count}x{g.tp}" for role, g in groups.items())
        raise ConfigError(
            f"{shapes} needs {wanted} {NOUNS[device]}s, {len(pool)} found",
            hint="ask for fewer instances or a smaller TP",
        )
    shared = iter([(d,) for d in free])
    return {
        role: shared if group.devices is None else iter([(d,) for d in _names(group)])
        for role, group in groups.items()
    }


def _core_ranks(
    groups: dict[Role, InstanceGroup], free: Sequence[str]
) -> tuple[dict[Role, Iterator[tuple[str, ...]]], list[str]]:
    """Equal runs of cores for each rank; ranks share cores where there are too few."""
    warnings: list[str] = []
    unnamed = [group for group in groups.values() if group.devices is None]
    shared = _split_cores(free, sum(g.count * g.tp for g in unnamed))
    ranks = {}
    for role, group in groups.items():
        cores = _names(group) or list(free)
        num_ranks = group.count * group.tp
        if group.tp > len(cores):
            raise ConfigError(
                f"{role.value} {group.count}x{group.tp}: TP {group.tp} needs as many "
                f"CPU cores, {len(cores)} found"
            )
        ranks[role] = shared if group.devices is None else _split_cores(cores, num_ranks)
        if group.devices is not None and num_ranks > len(cores):
            warnings.append(f"{num_ranks} {role.value} ranks share {len(cores)} CPU cores")
    if (num_ranks := sum(g.count * g.tp for g in unnamed)) > len(free):
        warnings.append(f"{num_ranks} ranks share {len(free)} CPU cores: expect less speed")
    return ranks, warnings


def _split_cores(cores: Sequence[str], num_ranks: int) -> Iterator[tuple[str, ...]]:
    """Yield the cores of one rank after the other."""
    if num_ranks > len(cores):
        return cycle([(core,) for core in cores])
    share = len(cores) // max(1, num_ranks)
    return iter([tuple(cores[i * share : (i + 1) * share]) for i in range(num_ranks)])


def with_shape(group: InstanceGroup | None, shape: tuple[int, int]) -> InstanceGroup:
    """Return ``group`` with another number of instances and TP size."""
    return msgspec.structs.replace(group or InstanceGroup(), count=shape[0], tp=shape[1])
