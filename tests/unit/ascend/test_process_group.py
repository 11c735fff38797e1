"""What is made of torch_npu's errors."""

from __future__ import annotations

from ascend_vllm_plugin.process_group import explain

REFUSED = (
    "create_config:../torch_npu/csrc/distributed/HCCLUtils.cpp:129 HCCL function error: "
    "hcclCommInitRootInfoConfig(numRanks, &rootInfo, rank, config, &(comm->hcclComm_)), "
    "error code is 11\n[ERROR] 2026-11-23-03:44:43 (PID:1, Device:0, RankID:0)"
)


def test_error_of_hccl_is_named_with_what_to_do() -> None:
    reason = explain(RuntimeError(REFUSED))
    assert "hcclCommInitRootInfoConfig: HCCL error 11 (TCP_CONNECT) (hint:" in reason
    assert len(reason.splitlines()) == 1


def test_other_errors_are_told_in_one_line() -> None:
    assert explain(RuntimeError("no store\nat all")).startswith("process group: no store")
