"""Two deployments of one host never promise the same ports of HCCL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_pd.errors import ConfigError
from vllm_pd.launcher.plan import DeploymentPlan, ProcessSpec
from vllm_pd.launcher.port_claims import claim_ports, claimed_ports

FIRST = 59008  # below those that deployments choose, so that none of this machine is met


def plan(host: str, npu: str = "auto") -> DeploymentPlan:
    url = "http://127.0.0.1:1"
    env = {"HCCL_HOST_SOCKET_PORT_RANGE": host, "HCCL_NPU_SOCKET_PORT_RANGE": npu}
    spec = ProcessSpec(name="p", role="prefill", argv=("p",), env=env, url=url, ready_url=url)
    return DeploymentPlan(
        model="m",
        served_model_name="m",
        device="npu",
        router_url=url,
        ready_url=url,
        processes=(spec,),
    )


def ports(first: int, last: int) -> str:
    return f"{FIRST + first}-{FIRST + last}"


def test_claimed_ports_are_seen_until_they_are_given_back() -> None:
    with claim_ports(plan(ports(0, 63), ports(64, 127))):
        assert set(range(FIRST, FIRST + 128)) <= claimed_ports()
    assert not claimed_ports() & set(range(FIRST, FIRST + 128))


@pytest.mark.parametrize("theirs", [ports(0, 63), ports(63, 126), ports(10, 12)])
def test_ports_of_another_deployment_are_refused_in_one_line(theirs: str) -> None:
    refused = pytest.raises(ConfigError, match=f"ports {FIRST} to {FIRST + 63} are another")
    with claim_ports(plan(ports(0, 63))), refused as info:
        claim_ports(plan(theirs)).__enter__()
    assert len(str(info.value).splitlines()) == 1


def test_deployment_that_is_refused_keeps_nothing() -> None:
    with claim_ports(plan(ports(64, 127))):
        with pytest.raises(ConfigError):
            claim_ports(plan(ports(0, 127))).__enter__()
        assert not claimed_ports() & set(range(FIRST, FIRST + 64))


def test_process_that_inherits_a_claim_goes_on_holding_it() -> None:
    with claim_ports(plan(ports(0, 63))) as fds:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=fds
        )
    try:
        with pytest.raises(ConfigError):
            claim_ports(plan(ports(0, 63))).__enter__()
    finally:
        child.communicate(b"\n")
    with claim_ports(plan(ports(0, 63))):
        pass


def test_ranges_that_the_user_leaves_to_hccl_are_not_claimed() -> None:
    with claim_ports(plan("auto", "60000-60050,60060")) as fds:
        assert fds == ()


def test_kernel_that_tells_nothing_knows_of_no_claims(tmp_path: Path) -> None:
    assert claimed_ports(tmp_path) == frozenset()
