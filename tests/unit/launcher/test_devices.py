from __future__ import annotations

from pathlib import Path

import pytest

from vllm_pd.errors import ConfigError
from vllm_pd.launcher.devices import (
    available_memory_gib,
    find_machine,
    find_npus,
    find_pool,
    gpu_indices,
    is_slow_in_16_bit,
    one_thread_per_core,
    visible_pool,
)
from vllm_pd.launcher.npu_env import Network

GPU_LISTING = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-2)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-3)
"""


def test_npus_are_counted_by_device_file_and_numbered_from_zero(tmp_path: Path) -> None:
    for name in ("davinci4", "davinci5", "davinci_manager"):
        (tmp_path / name).touch()
    assert find_npus(tmp_path) == ("0", "1")


def test_gpu_indices_leave_out_mig_slices() -> None:
    assert gpu_indices(GPU_LISTING) == ("0", "1")


@pytest.mark.parametrize(
    ("value", "pool"),
    [(None, None), ("", ()), ("4,5", ("4", "5")), (" GPU-1 , GPU-3 ", ("GPU-1", "GPU-3"))],
)
def test_visible_devices_are_the_pool(value: str | None, pool: tuple[str, ...] | None) -> None:
    assert visible_pool(value) == pool


@pytest.mark.parametrize(
    ("device", "variable"),
    [("npu", "ASCEND_RT_VISIBLE_DEVICES"), ("cuda", "CUDA_VISIBLE_DEVICES")],
)
def test_a_visible_devices_variable_narrows_the_pool(device: str, variable: str) -> None:
    assert find_pool(device, {variable: "2,3"}) == ("2", "3")


@pytest.mark.parametrize(
    ("machine", "flags", "is_slow"),
    [
        ("x86_64", "fma avx avx2", True),
        ("x86_64", "fma avx avx2 avx512f avx512bw", False),
        ("x86_64", "avx2 avx_vnni avx_ne_convert", False),
        ("aarch64", "fp asimd", False),
    ],
)
def test_x86_without_wide_vectors_is_slow_in_16_bit(
    machine: str, flags: str, is_slow: bool
) -> None:
    cpuinfo = f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n"
    assert is_slow_in_16_bit(machine, cpuinfo) is is_slow


def test_a_cpu_that_the_kernel_does_not_describe_is_left_to_vllm() -> None:
    assert not is_slow_in_16_bit("x86_64", "")


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'tpu'.*npu, cuda, cpu"):
        find_machine("tpu", {})


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU found"):
        find_machine("cuda", {"CUDA_VISIBLE_DEVICES": ""})


def test_the_cpu_machine_has_cores_and_memory() -> None:
    machine = find_machine("cpu", {})
    assert machine.pool
    assert machine.mem_available_gib > 0


def test_npus_are_reached_by_the_host_that_is_named_and_its_interface() -> None:
    machine = find_machine("npu", {"ASCEND_RT_VISIBLE_DEVICES": "0"}, host="localhost")
    assert machine.network == Network("127.0.0.1", "lo")


def test_one_hardware_thread_of_each_core_is_kept() -> None:
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    assert one_thread_per_core([0, 1, 2, 3], siblings) == [0, 1]


def test_cores_of_unknown_topology_are_all_kept() -> None:
    assert one_thread_per_core({5, 4}, {}) == [4, 5]


def test_available_memory_stays_within_the_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "memory.max").write_text(str(4 * 2**30))
    (tmp_path / "memory.current").write_text(str(2**30))
    assert available_memory_gib(meminfo, tmp_path) == 3.0


def test_available_memory_without_a_limit_is_the_hosts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable:    8388608 kB\n")
    (tmp_path / "memory.max").write_text("max")
    assert available_memory_gib(meminfo, tmp_path) == 8.0
