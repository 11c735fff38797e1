"""HCCL's C interface. The numbers are those of facts about CANN 9.1, see docs/ascend.md."""

from __future__ import annotations

import pytest
from ascend_vllm_plugin.abi import (
    ADVICE,
    FULL_LEN,
    CommConfig,
    Result,
    describe,
    expansion_mode_of,
    make_config,
)

WITH_EXEC_TIMEOUT = 12  # what CANN 9.1 and the headers of torch_npu 2.13 have
WITHOUT = 8


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        ("buffer_mb", 24),
        ("deterministic", 28),
        ("name", 32),
        ("udi", 160),
        ("expansion_mode", 288),
        ("traffic_class", 292),
        ("service_level", 296),
        ("world_rank_id", 300),
        ("job_id", 304),
        ("acl_graph_zero_copy", 312),
        ("exec_timeout_s", 316),
        ("algo", 320),
        ("retry_enable", 1920),
        ("retry_params", 1970),
    ],
)
def test_fields_of_the_configuration_are_where_the_library_reads_them(
    field: str, offset: int
) -> None:
    assert getattr(CommConfig, field).offset == offset


def test_configuration_of_version_8_has_the_length_that_the_library_expects() -> None:
    assert FULL_LEN == 2104


def test_configuration_sets_buffer_and_execution_timeout() -> None:
    config = make_config(buffer_mb=32, exec_timeout_s=30, capability=WITH_EXEC_TIMEOUT)
    assert (config.size, config.version, config.magic) == (2104, 8, 0xF0F0F0F0)
    assert (config.buffer_mb, config.exec_timeout_s) == (32, 30)
    assert (config.deterministic, config.traffic_class, config.service_level) == (0xFFFFFFFF,) * 3


def test_library_without_the_capability_gets_the_32_bytes_that_all_know() -> None:
    config = make_config(buffer_mb=32, exec_timeout_s=30, capability=WITHOUT)
    assert (config.size, config.version, config.buffer_mb) == (32, 1, 32)
    assert config.exec_timeout_s == -1


@pytest.mark.parametrize(
    ("soc", "mode"), [("Ascend910B3", 1), ("Ascend910_9392", 2), ("Ascend950", 0)]
)
def test_send_and_receive_are_unfolded_as_the_chip_does_it_whatever_the_model_uses(
    soc: str, mode: int
) -> None:
    config = make_config(
        buffer_mb=32,
        exec_timeout_s=30,
        capability=WITH_EXEC_TIMEOUT,
        expansion_mode=expansion_mode_of(soc),
    )
    assert config.expansion_mode == mode


def test_error_is_named_in_one_line() -> None:
    assert describe(9, "no\nanswer") == "HCCL error 9 (TIMEOUT): no answer"
    assert describe(77) == "HCCL error 77 (UNKNOWN)"


def test_advice_is_given_for_known_errors_only() -> None:
    assert set(ADVICE) <= set(Result) - {Result.SUCCESS}
