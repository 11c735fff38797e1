from __future__ import annotations

import pytest

from vllm_pd.config import InstanceGroup, Role
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.split import (
    Placement,
    core_list,
    fill_groups,
    kv_cache_gib,
    parse_shape,
    place,
)


def groups(prefill: str, decode: str) -> dict[Role, InstanceGroup]:
    shapes = {Role.PREFILL: prefill, Role.DECODE: decode}
    return {
        role: InstanceGroup(count=int(text[0]), tp=int(text[2])) for role, text in shapes.items()
    }


def pool(size: int) -> list[str]:
    return [str(i) for i in range(size)]


def ranks(placements: list[Placement]) -> dict[str, tuple[tuple[str, ...], ...]]:
    return {placement.name: placement.ranks for placement in placements}


def test_shape_is_instances_times_tp() -> None:
    assert parse_shape("2x4", role=Role.PREFILL) == (2, 4)


@pytest.mark.parametrize("text", ["", "4", "x", "1x", "x4", "0x1", "1x0", "-1x2", "1x2x3", "axb"])
def test_a_malformed_shape_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"prefill '.*' is not INSTANCESxTP.*2x4"):
        parse_shape(text, role=Role.PREFILL)


@pytest.mark.parametrize(
    ("device", "num_devices", "tp"),
    [("npu", 8, 4), ("npu", 16, 4), ("npu", 4, 2), ("cuda", 2, 1), ("cuda", 3, 1), ("npu", 6, 2)],
)
def test_by_default_both_roles_get_one_instance_of_half_the_devices(
    device: str, num_devices: int, tp: int
) -> None:
    filled = fill_groups(None, None, device=device, num_devices=num_devices)
    assert [(g.count, g.tp) for g in filled.values()] == [(1, tp), (1, tp)]


def test_by_default_cpu_instances_have_tp_1() -> None:
    filled = fill_groups(None, None, device="cpu", num_devices=64)
    assert [(g.count, g.tp) for g in filled.values()] == [(1, 1), (1, 1)]


def test_the_open_role_gets_what_the_given_one_leaves() -> None:
    filled = fill_groups(InstanceGroup(tp=6), None, device="npu", num_devices=8)
    assert filled[Role.DECODE].tp == 2


def test_a_single_device_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"need two GPUs, 1 found.*DEVICE=cpu"):
        fill_groups(None, None, device="cuda", num_devices=1)


def test_prefill_gets_the_first_devices_and_decode_the_next() -> None:
    placements, warnings = place(groups("1x4", "2x2"), pool(8), device="npu")
    assert ranks(placements) == {
        "prefill-0": (("0",), ("1",), ("2",), ("3",)),
        "decode-0": (("4",), ("5",)),
        "decode-1": (("6",), ("7",)),
    }
    assert warnings == []


def test_more_devices_than_found_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"prefill 1x4 \+ decode 2x4 needs 12 NPUs, 8 found"):
        place(groups("1x4", "2x4"), pool(8), device="npu")


def test_named_devices_are_used_and_not_given_to_the_other_role() -> None:
    wanted = groups("1x2", "1x2") | {Role.DECODE: InstanceGroup(tp=2, devices=(0, 1))}
    placements, _ = place(wanted, pool(4), device="cuda")
    assert ranks(placements) == {"prefill-0": (("2",), ("3",)), "decode-0": (("0",), ("1",))}


def test_a_named_device_that_is_not_there_is_refused() -> None:
    wanted = groups("1x1", "1x1") | {Role.DECODE: InstanceGroup(devices=(9,))}
    with pytest.raises(ConfigError, match="decode: no GPU 9; there are 0, 1"):
        place(wanted, pool(2), device="cuda")


def test_too_few_named_devices_are_refused() -> None:
    wanted = groups("1x1", "1x1") | {Role.DECODE: InstanceGroup(tp=2, devices=(1,))}
    with pytest.raises(ConfigError, match="decode 1x2 needs 2 NPUs, its devices name 1"):
        place(wanted, pool(2), device="npu")


def test_devices_named_by_both_roles_are_used_with_a_warning() -> None:
    group = InstanceGroup(devices=(0,))
    placements, warnings = place({Role.PREFILL: group, Role.DECODE: group}, pool(1), device="cuda")
    assert ranks(placements) == {"prefill-0": (("0",),), "decode-0": (("0",),)}
    assert "same devices" in warnings[0]


def test_cores_are_split_evenly() -> None:
    placements, warnings = place(groups("1x1", "1x1"), pool(8), device="cpu")
    assert ranks(placements) == {
        "prefill-0": (("0", "1", "2", "3"),),
        "decode-0": (("4", "5", "6", "7"),),
    }
    assert warnings == []


def test_every_tp_rank_gets_its_own_cores() -> None:
    placements, _ = place(groups("1x2", "1x1"), pool(6), device="cpu")
    assert ranks(placements) == {
        "prefill-0": (("0", "1"), ("2", "3")),
        "decode-0": (("4", "5"),),
    }


def test_more_ranks_than_cores_share_them_with_a_warning() -> None:
    placements, warnings = place(groups("1x1", "2x1"), pool(2), device="cpu")
    assert ranks(placements) == {
        "prefill-0": (("0",),),
        "decode-0": (("1",),),
        "decode-1": (("0",),),
    }
    assert warnings == ["3 ranks share 2 CPU cores: expect less speed"]


def test_an_instance_with_more_ranks_than_cores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"decode 1x4: TP 4 needs as many CPU cores, 2 found"):
        place(groups("1x1", "1x4"), pool(2), device="cpu")


def test_named_cores_are_used() -> None:
    wanted = groups("1x1", "1x1") | {Role.PREFILL: InstanceGroup(devices=(0, 1, 2))}
    placements, _ = place(wanted, pool(4), device="cpu")
    assert ranks(placements) == {"prefill-0": (("0", "1", "2"),), "decode-0": (("3",),)}


@pytest.mark.parametrize(
    ("cores", "text"), [(["0"], "0"), (["0", "1", "2", "8"], "0-2,8"), (["3", "1"], "1,3")]
)
def test_core_lists_are_written_as_runs(cores: list[str], text: str) -> None:
    assert core_list(cores) == text


@pytest.mark.parametrize(
    ("available", "instances", "size"), [(24.0, 2, 4), (8.0, 2, 1), (1.0, 2, 1), (20.0, 3, 2)]
)
def test_kv_cache_is_a_part_of_the_free_memory(available: float, instances: int, size: int) -> None:
    assert kv_cache_gib(available, instances) == size
