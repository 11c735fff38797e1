"""Each check of ``vllm-pd doctor``: what it finds and what it advises."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_pd.launcher.devices import Machine
from vllm_pd.launcher.doctor import (
    Check,
    Verdict,
    check_cann,
    check_clock,
    check_devices,
    check_file,
    check_hccn,
    check_plugins,
    check_ports,
    check_shared_memory,
    check_stall,
    check_versions,
    examine,
    exit_code,
)
from vllm_pd.launcher.npu_smi import Npu

NOW_S = 1_790_000_000.0
IMAGE = {
    "vllm": "0.23.0+empty",
    "vllm-ascend": "0.23.0",
    "torch": "2.10.0",
    "torch-npu": "2.10.0.post4",
    "vllm-pd": "0.1.0",
    "ascend-vllm-plugin": "0.1.0",
}


def npu(index: int, health: str = "OK") -> Npu:
    return Npu(index, index, 0, "910B3", health, 3409, 65536)


def test_idle_npus_are_fine() -> None:
    machine = Machine("npu", ("0", "1"), npus=(npu(0), npu(1)))
    assert check_devices(machine) == Check("devices", Verdict.OK, "2 x npu 910B3")


def test_npus_that_are_ill_are_a_problem() -> None:
    check = check_devices(Machine("npu", ("0", "1"), npus=(npu(0), npu(1, "Alarm"))))
    assert (check.verdict, "NPU 1 is not healthy" in check.advice) == (Verdict.PROBLEM, True)


def test_tool_that_does_not_answer_is_only_a_warning() -> None:
    assert check_devices(Machine("npu", ("0",))).verdict is Verdict.WARNING


def test_everything_installed_is_fine() -> None:
    check = check_versions("npu", IMAGE.get)
    assert check.verdict is Verdict.OK
    assert "torch-npu 2.10.0.post4" in check.found


@pytest.mark.parametrize(
    ("missing", "verdict", "advice"),
    [
        ("ascend-vllm-plugin", Verdict.WARNING, "pip install --no-deps ./ascend-vllm-plugin"),
        ("torch-npu", Verdict.PROBLEM, "torch-npu not installed"),
    ],
)
def test_what_is_not_installed_is_named(missing: str, verdict: Verdict, advice: str) -> None:
    installed = {name: version for name, version in IMAGE.items() if name != missing}
    check = check_versions("npu", installed.get)
    assert (check.verdict, advice in check.advice) == (verdict, True)


@pytest.mark.parametrize(
    ("name", "version", "verdict"),
    [
        ("torch-npu", "2.9.0.post1", Verdict.PROBLEM),
        ("vllm-ascend", "0.22.1", Verdict.WARNING),
        ("vllm-ascend", "0.23.1rc1", Verdict.OK),
    ],
)
def test_what_is_made_for_another_version_is_named(
    name: str, version: str, verdict: Verdict
) -> None:
    check = check_versions("npu", (IMAGE | {name: version}).get)
    assert (check.verdict, name in check.advice) == (verdict, verdict is not Verdict.OK)


@pytest.mark.parametrize(
    ("environ", "verdict"),
    [
        ({}, Verdict.OK),
        ({"HCCL_CONNECT_TIMEOUT": "279"}, Verdict.OK),
        ({"HCCL_CONNECT_TIMEOUT": "280"}, Verdict.WARNING),
        ({"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "140"}, Verdict.WARNING),
        ({"HCCL_CONNECT_TIMEOUT": "soon"}, Verdict.OK),
    ],
)
def test_step_that_hccl_may_hold_up_longer_than_vllm_waits_is_a_warning(
    environ: dict[str, str], verdict: Verdict
) -> None:
    assert check_stall(environ).verdict is verdict


@pytest.mark.parametrize(
    ("device", "value", "advice"),
    [
        ("cpu", "", "add vllm_pd "),
        ("cpu", "lora_resolver, vllm_pd", "add vllm_pd "),
        ("npu", "vllm_pd", "add ascend "),
        ("npu", "ascend_kv_connector", "add ascend,vllm_pd "),
    ],
)
def test_plugins_that_vllm_will_not_load_are_a_problem(
    device: str, value: str, advice: str
) -> None:
    check = check_plugins(device, value)
    assert (check.verdict, advice in check.advice) == (Verdict.PROBLEM, True)


def test_plugins_that_vllm_will_load_are_fine() -> None:
    assert check_plugins("npu", "ascend,vllm_pd").verdict is Verdict.OK


def test_plugins_are_looked_at_where_they_are_restricted() -> None:
    (check,) = [c for c in examine("cpu", {"VLLM_PLUGINS": "x"}) if c.name == "VLLM_PLUGINS"]
    assert check.found == "x"


def test_driver_tells_its_version(tmp_path: Path) -> None:
    path = tmp_path / "version.info"
    path.write_text("Version=24.1.rc2\nascendhal_version=7.35.19\n")
    assert check_file("driver", path, "mount it").found == "Version=24.1.rc2"


def test_driver_that_is_not_mounted_is_a_problem(tmp_path: Path) -> None:
    check = check_file("driver", tmp_path / "version.info", "mount it")
    assert (check.verdict, check.advice) == (Verdict.PROBLEM, "mount it")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("address_0=29.1.1.1\nnetmask_0=255.255.0.0\naddress_1=29.1.1.2\n", Verdict.OK),
        ("address_0=29.1.1.1\n", Verdict.WARNING),
    ],
)
def test_every_npu_needs_an_address(tmp_path: Path, text: str, verdict: Verdict) -> None:
    path = tmp_path / "hccn.conf"
    path.write_text(text)
    assert check_hccn(path, 2).verdict is verdict


def test_hccn_conf_that_is_missing_matters_between_hosts_only(tmp_path: Path) -> None:
    assert check_hccn(tmp_path / "hccn.conf", 8).verdict is Verdict.WARNING


def find_nothing(_: str) -> str | None:
    return None


def test_libhccl_is_found_where_the_loader_looks(tmp_path: Path) -> None:
    (tmp_path / "libhccl.so").touch()
    environ = {"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}"}
    check = check_cann(environ, Path("/opt/latest"), find_nothing)
    assert f"{tmp_path}/libhccl.so" in check.found


def test_libhccl_that_only_the_loader_knows_is_found() -> None:
    check = check_cann({}, Path("/opt/latest"), {"hccl": "libhccl.so"}.get)
    assert check.found == "of unknown version, libhccl.so"


@pytest.mark.parametrize(
    ("text", "found", "verdict"),
    [
        ("name=Ascend-cann-toolkit\nversion=9.1.0\narch=aarch64\n", "9.1.0", Verdict.OK),
        ("version=10.0.0\n", "10.0.0", Verdict.OK),
        ("version=8.0.RC2\n", "8.0.RC2", Verdict.PROBLEM),
        ("version=unreleased\n", "unreleased", Verdict.WARNING),
        ("name=Ascend-cann-toolkit\n", "of unknown version", Verdict.WARNING),
    ],
)
def test_version_of_cann_is_told_and_judged(
    tmp_path: Path, text: str, found: str, verdict: Verdict
) -> None:
    (tmp_path / "libhccl.so").touch()
    (tmp_path / "aarch64-linux").mkdir()
    (tmp_path / "aarch64-linux" / "ascend_toolkit_install.info").write_text(text)
    environ = {"LD_LIBRARY_PATH": str(tmp_path), "ASCEND_TOOLKIT_HOME": str(tmp_path)}
    check = check_cann(environ, Path("/opt/latest"))
    assert (check.found, check.verdict) == (f"{found}, {tmp_path}/libhccl.so", verdict)


@pytest.mark.parametrize("environ", [{}, {"HCCL_SO_PATH": "/nowhere/libhccl.so"}])
def test_libhccl_that_is_missing_is_a_problem_with_a_command(environ: dict[str, str]) -> None:
    check = check_cann(environ, Path("/opt/latest"), find_nothing)
    assert (check.verdict, "source /opt/set_env.sh" in check.advice) == (Verdict.PROBLEM, True)


def test_free_ports_are_told() -> None:
    check = check_ports(frozenset(), num_ranges=4)
    assert check.found == "free: 8000, 8100, 8200; for HCCL 61000 to 61255"


def test_used_port_is_named() -> None:
    assert check_ports(frozenset({8100})).found == "in use: 8100"


def test_ports_of_hccl_that_are_all_in_use_are_a_problem() -> None:
    check = check_ports(frozenset(range(61000, 65536, 10)), num_ranges=4)
    assert check.verdict is Verdict.PROBLEM


def test_ports_of_hccl_do_not_matter_where_the_user_sets_them() -> None:
    check = check_ports(frozenset(range(61000, 65536, 10)), num_ranges=0)
    assert check.verdict is Verdict.OK


def test_small_shared_memory_is_a_problem() -> None:
    assert check_shared_memory(0.0625).advice == "docker run --shm-size=1g or more"


@pytest.mark.parametrize(
    ("now_s", "is_synchronised", "verdict"),
    [
        (NOW_S, True, Verdict.OK),
        (NOW_S, False, Verdict.WARNING),
        (0.0, True, Verdict.PROBLEM),
    ],
)
def test_clock_must_be_right(now_s: float, is_synchronised: bool, verdict: Verdict) -> None:
    assert check_clock(now_s, is_synchronised=is_synchronised).verdict is verdict


def test_this_machine_can_be_examined_without_npus() -> None:
    checks = examine("cpu", {})
    assert [check.name for check in checks] == [
        "devices",
        "versions",
        "ports",
        "shared memory",
        "clock",
    ]
    assert all(len(str(check).splitlines()) == 1 for check in checks)


def test_machine_without_the_wanted_devices_is_a_problem() -> None:
    (check,) = examine("npu", {"ASCEND_RT_VISIBLE_DEVICES": ""})
    assert (check.verdict, exit_code([check])) == (Verdict.PROBLEM, 1)


def test_warnings_alone_are_no_failure() -> None:
    assert exit_code([Check("clock", Verdict.WARNING, "late")]) == 0
