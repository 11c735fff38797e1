"""Variables of instances on NPUs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.errors import ConfigError
from vllm_pd.launcher.npu_env import (
    FIRST_PORT,
    PORT_RANGE_VARIABLES,
    RANGE_LEN,
    Network,
    exec_timeout_env,
    npu_envs,
    port_ranges,
)


@given(
    st.integers(1, 20),
    st.frozensets(st.integers(FIRST_PORT, 65535), max_size=40),
)
def test_ranges_share_no_port_with_anything(num_ranges: int, taken: frozenset[int]) -> None:
    try:
        ranges = port_ranges(num_ranges, taken)
    except ConfigError:
        return
    ports = set(itertools.chain.from_iterable(ranges))
    assert len(ports) == num_ranges * RANGE_LEN
    assert not ports & taken
    assert max(ports) <= 65535


def test_exhausted_range_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"1000 ranges of 64 ports wanted for HCCL, 70 are free"):
        port_ranges(1000, ())


def test_each_instance_has_its_own_ports() -> None:
    first, second = npu_envs([{}, {}], None, ())
    names = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")
    assert [env[name] for env in (first, second) for name in names] == [
        "61000-61063",
        "61064-61127",
        "61128-61191",
        "61192-61255",
    ]


def test_ranges_that_the_user_sets_are_not_looked_for() -> None:
    taken = range(FIRST_PORT + RANGE_LEN, 65536)  # one is left
    theirs = dict.fromkeys(PORT_RANGE_VARIABLES, "50000-50063")
    half = {"HCCL_HOST_SOCKET_PORT_RANGE": "50000-50063"}
    first, second = npu_envs([theirs, half], None, taken)
    assert not set(first) & set(PORT_RANGE_VARIABLES)
    assert second["HCCL_NPU_SOCKET_PORT_RANGE"] == "61000-61063"
    assert "HCCL_HOST_SOCKET_PORT_RANGE" not in second


def test_instances_are_told_address_and_interface() -> None:
    (env,) = npu_envs([{}], Network("10.0.0.7", "enp1s0"), ())
    assert env["HCCL_IF_IP"] == "10.0.0.7"
    assert {env[f"{name}_SOCKET_IFNAME"] for name in ("HCCL", "GLOO", "TP")} == {"enp1s0"}


def test_without_a_known_interface_none_is_named() -> None:
    (env,) = npu_envs([{}], Network("10.0.0.7"), ())
    assert not [name for name in env if name.endswith("IFNAME")]


def test_process_groups_wait_no_longer_than_a_transfer() -> None:
    environ = {"VLLM_PD_HCCL_BACKEND": "process_group"}
    assert exec_timeout_env(environ, 29.5) == {"HCCL_EXEC_TIMEOUT": "30"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"VLLM_PD_HCCL_BACKEND": "ctypes"},
        {"VLLM_PD_HCCL_BACKEND": "process_group", "HCCL_EXEC_TIMEOUT": "20"},
    ],
)
def test_execution_timeout_is_left_alone_where_it_does_not_matter_or_is_set(
    environ: dict[str, str],
) -> None:
    assert exec_timeout_env(environ, 30.0) == {}


def test_what_the_user_sets_is_left_alone() -> None:
    (env,) = npu_envs([{"HCCL_BUFFSIZE": "512", "TASK_QUEUE_ENABLE": "2"}], None, ())
    assert set(env) == {
        "PYTORCH_NPU_ALLOC_CONF",
        "HCCL_HOST_SOCKET_PORT_RANGE",
        "HCCL_NPU_SOCKET_PORT_RANGE",
    }
