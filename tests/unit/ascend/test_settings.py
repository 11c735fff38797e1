"""Settings of HCCL, and what two workers must have alike."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest
from ascend_vllm_plugin.device import container_id, host_index_of
from ascend_vllm_plugin.settings import Settings, settings_from
from ascend_vllm_plugin.wire import Address, parse_address, why_not

from vllm_pd.errors import ConfigError, RemoteProtocolError

OURS = Address(
    worker="a",
    host="10.0.0.1",
    port=40000,
    boot_id="host-1",
    container="pod-1",
    device="0",
    soc="Ascend910B3",
    backend="ctypes",
    settings="buffer 32 MB, execution timeout 30 s",
    chunk_len=16,
)
THEIRS = msgspec.structs.replace(OURS, worker="b", device="4")


def test_defaults() -> None:
    assert settings_from({}, 29.5) == Settings("ctypes", 32, 30)


@pytest.mark.parametrize("size", ["19", "65", "-1", "many", "3.5"])
def test_buffers_that_are_too_small_or_large_are_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="is not between 20 and 64"):
        settings_from({"VLLM_PD_HCCL_BUFFER_MB": size}, 30.0)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="use one of ctypes, process_group"):
        settings_from({"VLLM_PD_HCCL_BACKEND": "nccl"}, 30.0)


@pytest.mark.parametrize("timeout", [None, "1836", "31", "0", "never"])
def test_process_groups_that_would_wait_longer_than_a_transfer_are_refused(
    timeout: str | None,
) -> None:
    environ = {"VLLM_PD_HCCL_BACKEND": "process_group"}
    if timeout is not None:
        environ["HCCL_EXEC_TIMEOUT"] = timeout
    with pytest.raises(ConfigError, match="HCCL_EXEC_TIMEOUT=30 on both sides"):
        settings_from(environ, 30.0)


def test_process_groups_that_wait_no_longer_than_a_transfer_are_fine() -> None:
    environ = {"VLLM_PD_HCCL_BACKEND": "process_group", "HCCL_EXEC_TIMEOUT": "30"}
    assert settings_from(environ, 30.0) == Settings("process_group", 32, 30)


def test_execution_timeout_of_the_process_is_nothing_to_communicators_of_ours() -> None:
    assert settings_from({"HCCL_EXEC_TIMEOUT": "1836"}, 30.0).backend == "ctypes"


def test_two_npus_of_one_host_can_be_linked() -> None:
    assert why_not(OURS, THEIRS) == ""


def test_the_same_number_on_another_host_is_another_npu() -> None:
    assert why_not(OURS, msgspec.structs.replace(OURS, worker="b", boot_id="host-2")) == ""


def test_the_same_number_in_another_container_of_the_host_is_another_npu() -> None:
    assert why_not(OURS, msgspec.structs.replace(OURS, worker="b", container="pod-2")) == ""


def test_processes_of_one_container_have_its_id() -> None:
    command = "from ascend_vllm_plugin.device import container_id; print(container_id())"
    child = subprocess.run(
        [sys.executable, "-c", command],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.strip() == container_id()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "0"}, "both workers use NPU 0"),
        ({"soc": "Ascend910_9392"}, "different chips: Ascend910B3 here, Ascend910_9392 there"),
        ({"settings": "buffer 64 MB"}, "VLLM_PD_HCCL_BUFFER_MB"),
        ({"backend": "process_group"}, "VLLM_PD_HCCL_BACKEND"),
        ({"chunk_len": 8}, "different versions of ascend-vllm-plugin"),
    ],
)
def test_what_keeps_two_workers_apart_is_one_line(change: dict[str, str], words: str) -> None:
    reason = why_not(OURS, msgspec.structs.replace(THEIRS, **change))
    assert words in reason
    assert len(reason.splitlines()) == 1


def test_address_that_is_none_blames_the_peer() -> None:
    with pytest.raises(RemoteProtocolError):
        parse_address('{"worker": 1}')


@pytest.mark.parametrize(
    ("index", "visible", "expected"),
    [
        (0, None, "0"),
        (3, None, "3"),
        (1, "4,5", "5"),
        (0, " 7 ", "7"),
        (2, "4,5", "2"),
        (0, "", "0"),
    ],
)
def test_npu_is_known_by_its_number_in_the_container(
    index: int, visible: str | None, expected: str
) -> None:
    assert host_index_of(index, visible) == expected
