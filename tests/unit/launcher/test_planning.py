from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_pd.config import ConnectorConfig, InstanceGroup, RouterConfig, Topology
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.devices import Machine
from vllm_pd.launcher.npu_env import Network
from vllm_pd.launcher.npu_smi import Npu, NpuProcess
from vllm_pd.launcher.plan import DeploymentPlan, ProcessSpec
from vllm_pd.launcher.planning import Model, make_plan, wanted_ports

CPU = Machine("cpu", ("0", "1"), mem_available_gib=24.0)
NPU = Machine("npu", tuple("01234567"))
CUDA = Machine("cuda", ("4", "5"))


def plan_of(
    topology: Topology, machine: Machine = CPU, environ: dict[str, str] | None = None
) -> DeploymentPlan:
    plan, _ = make_plan(
        topology,
        machine,
        model=Model("/models/m", "m"),
        cluster_key_file=Path("/run/cluster.key"),
        environ=environ or {},
    )
    return plan


OLD_CPU = dataclasses.replace(CPU, is_slow_in_16_bit=True)


def plan_with_dtype(
    machine: Machine, *args: str, is_quantized: bool | None = False, group: tuple[str, ...] = ()
) -> tuple[list[str | None], list[str]]:
    """Return the ``--dtype`` of prefill and decode, and the warnings."""
    topology = Topology(args=args, decode=InstanceGroup(args=group))
    plan, warnings = make_plan(
        topology,
        machine,
        model=Model("/models/m", "m", is_quantized),
        cluster_key_file=Path("/run/cluster.key"),
        environ={},
    )
    specs = [process(plan, name) for name in ("prefill-0", "decode-0")]
    return [option(s, "--dtype") if "--dtype" in s.argv else None for s in specs], warnings


def test_a_cpu_that_is_slow_in_16_bit_computes_in_float32_and_says_so() -> None:
    dtypes, (warning,) = plan_with_dtype(OLD_CPU)
    assert dtypes == ["float32", "float32"]
    assert "float32" in warning
    assert "--dtype auto" in warning


def test_the_dtype_of_the_user_wins() -> None:
    assert plan_with_dtype(OLD_CPU, "--dtype", "auto") == (["auto", "auto"], [])
    assert plan_with_dtype(OLD_CPU, "--dtype=half") == ([None, None], [])
    assert plan_with_dtype(OLD_CPU, group=("--dtype", "half"))[0] == ["float32", "half"]


def test_quantised_weights_keep_their_dtype() -> None:
    assert plan_with_dtype(OLD_CPU, is_quantized=True) == ([None, None], [])


def test_where_it_is_not_known_whether_weights_are_quantised_the_user_is_told() -> None:
    dtypes, (warning,) = plan_with_dtype(OLD_CPU, is_quantized=None)
    assert dtypes == [None, None]
    assert "--dtype float32" in warning


def test_other_machines_leave_the_dtype_to_vllm() -> None:
    for machine in (CPU, CUDA, NPU):
        assert plan_with_dtype(machine) == ([None, None], [])


def process(plan: DeploymentPlan, name: str) -> ProcessSpec:
    return next(spec for spec in plan.processes if spec.name == name)


def option(spec: ProcessSpec, name: str) -> str:
    return spec.argv[spec.argv.index(name) + 1]


def kv_transfer_config(spec: ProcessSpec) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(option(spec, "--kv-transfer-config"))
    return config


def test_the_default_is_one_instance_of_each_role_and_a_router() -> None:
    plan = plan_of(Topology())
    assert [spec.name for spec in plan.processes] == ["prefill-0", "decode-0", "router"]
    assert [spec.url for spec in plan.processes] == [
        "http://127.0.0.1:8100",
        "http://127.0.0.1:8200",
        "http://127.0.0.1:8000",
    ]


def test_an_instance_is_plain_vllm_serve() -> None:
    spec = process(plan_of(Topology()), "prefill-0")
    assert spec.argv[2:6] == ("-m", "vllm.entrypoints.cli.main", "serve", "/models/m")
    assert option(spec, "--served-model-name") == "m"
    assert option(spec, "--tensor-parallel-size") == "1"
    assert spec.ready_url == "http://127.0.0.1:8100/health"


def test_the_working_directory_is_not_searched_for_modules() -> None:
    assert all(spec.argv[1] == "-P" for spec in plan_of(Topology()).processes)


def test_every_instance_gets_the_connector_for_both_roles() -> None:
    plan = plan_of(Topology())
    for name in ("prefill-0", "decode-0"):
        assert kv_transfer_config(process(plan, name)) == {
            "kv_connector": "PDConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"cluster_key_file": "/run/cluster.key"},
        }


def test_connector_options_of_the_topology_are_passed_on() -> None:
    connector = ConnectorConfig(transport="tcp", lease_s=5.0, cluster_key_file="/my.key")
    spec = process(plan_of(Topology(connector=connector)), "decode-0")
    extra = kv_transfer_config(spec)["kv_connector_extra_config"]
    assert extra == {"transport": "tcp", "lease_s": 5.0, "cluster_key_file": "/my.key"}


def test_npu_instances_use_the_best_transport_and_their_own_devices() -> None:
    plan = plan_of(Topology(), NPU)
    prefill, decode = process(plan, "prefill-0"), process(plan, "decode-0")
    assert kv_transfer_config(prefill)["kv_connector"] == "PDConnector"
    assert "transport" not in kv_transfer_config(prefill)["kv_connector_extra_config"]
    assert prefill.env["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3"
    assert decode.env["ASCEND_RT_VISIBLE_DEVICES"] == "4,5,6,7"
    assert option(decode, "--tensor-parallel-size") == "4"


def test_any_split_of_the_npus_can_be_asked_for() -> None:
    topology = Topology(prefill=InstanceGroup(count=1, tp=4), decode=InstanceGroup(count=2, tp=2))
    plan = plan_of(topology, NPU)
    visible = {spec.name: spec.env.get("ASCEND_RT_VISIBLE_DEVICES") for spec in plan.processes}
    assert visible == {"prefill-0": "0,1,2,3", "decode-0": "4,5", "decode-1": "6,7", "router": None}


def test_npu_instances_have_ports_of_hccl_that_nobody_else_has() -> None:
    machine = dataclasses.replace(NPU, used_ports=frozenset({61010}))
    topology = Topology(prefill_port=61100)
    plan = plan_of(topology, machine)
    ranges = [spec.env["HCCL_HOST_SOCKET_PORT_RANGE"] for spec in plan.processes[:2]]
    assert ranges == ["61011-61074", "61165-61228"]


def test_npu_instances_with_ranges_of_the_users_need_no_free_ports() -> None:
    machine = dataclasses.replace(NPU, used_ports=frozenset(range(61000, 65536)))
    ours = {"HCCL_HOST_SOCKET_PORT_RANGE": "50000-50063", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
    plan = plan_of(Topology(env=ours), machine)
    assert process(plan, "decode-0").env.items() >= ours.items()


def test_npu_instances_of_several_hosts_use_the_address_that_peers_know() -> None:
    connector = ConnectorConfig(side_channel_host="10.0.0.7", cluster_key_file="/my.key")
    machine = dataclasses.replace(NPU, network=Network("10.0.0.7", "enp1s0"))
    spec = process(plan_of(Topology(connector=connector), machine), "prefill-0")
    assert (spec.env["HCCL_IF_IP"], spec.env["HCCL_SOCKET_IFNAME"]) == ("10.0.0.7", "enp1s0")


def test_npu_instances_with_process_groups_give_a_lost_peer_up_in_time() -> None:
    topology = Topology(
        env={"VLLM_PD_HCCL_BACKEND": "process_group"},
        connector=ConnectorConfig(transfer_timeout_s=20.0),
    )
    assert process(plan_of(topology, NPU), "decode-0").env["HCCL_EXEC_TIMEOUT"] == "20"


def test_npu_for_two_instances_is_refused() -> None:
    group = InstanceGroup(tp=2, devices=(2, 3))
    with pytest.raises(ConfigError, match="NPU 2, 3 is given to two instances"):
        plan_of(Topology(prefill=group, decode=group), NPU)


def test_more_npus_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 16 NPUs, 8 found"):
        plan_of(Topology(prefill=InstanceGroup(tp=8), decode=InstanceGroup(tp=8)), NPU)


def test_npu_in_use_is_refused() -> None:
    busy = Npu(5, 5, 0, "910B3", "OK", 30720, 65536, (NpuProcess(4711, "python", 30720),))
    idle = [Npu(index, index, 0, "910B3", "OK", 0, 65536) for index in range(5)]
    with pytest.raises(ConfigError, match="NPU 5 is in use by process 4711"):
        plan_of(
            Topology(decode=InstanceGroup(tp=2)),
            Machine("npu", tuple("012345"), npus=(*idle, busy)),
        )


def test_environment_of_the_topology_wins_over_the_launchers() -> None:
    spec = process(plan_of(Topology(env={"HCCL_BUFFSIZE": "512"}), NPU), "decode-0")
    assert spec.env["HCCL_BUFFSIZE"] == "512"


def test_a_side_channel_port_for_all_instances_is_refused() -> None:
    with pytest.raises(ConfigError, match="side_channel_port 47000"):
        plan_of(Topology(connector=ConnectorConfig(side_channel_port=47000)))


def test_cuda_instances_get_devices_from_the_visible_pool() -> None:
    plan = plan_of(Topology(), CUDA)
    assert process(plan, "prefill-0").env == {"CUDA_VISIBLE_DEVICES": "4"}
    assert process(plan, "decode-0").env == {"CUDA_VISIBLE_DEVICES": "5"}


def test_cpu_instances_get_cores_and_a_kv_cache_size() -> None:
    assert process(plan_of(Topology()), "decode-0").env == {
        "VLLM_CPU_OMP_THREADS_BIND": "1",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }


def test_tp_ranks_on_cpu_are_separated_by_a_bar() -> None:
    topology = Topology(prefill=InstanceGroup(tp=2))
    machine = Machine("cpu", tuple("012345"), 24.0)
    spec = process(plan_of(topology, machine), "prefill-0")
    assert spec.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1|2-3"


def test_the_users_kv_cache_size_is_left_alone() -> None:
    plan = plan_of(Topology(), environ={"VLLM_CPU_KVCACHE_SPACE": "7"})
    assert "VLLM_CPU_KVCACHE_SPACE" not in process(plan, "decode-0").env


def test_the_topologys_kv_cache_size_wins() -> None:
    plan = plan_of(Topology(kv_cache_space_gib=2), environ={"VLLM_CPU_KVCACHE_SPACE": "7"})
    assert process(plan, "decode-0").env["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_environment_of_group_and_topology_wins_over_the_launchers() -> None:
    topology = Topology(
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "A": "1"},
        decode=InstanceGroup(env={"A": "2"}),
    )
    plan = plan_of(topology)
    assert process(plan, "prefill-0").env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert process(plan, "prefill-0").env["A"] == "1"
    assert process(plan, "decode-0").env["A"] == "2"


def test_arguments_of_topology_and_group_come_last() -> None:
    topology = Topology(args=("--seed", "1"), decode=InstanceGroup(args=("--seed", "2")))
    assert process(plan_of(topology), "decode-0").argv[-4:] == ("--seed", "1", "--seed", "2")
    assert process(plan_of(topology), "prefill-0").argv[-2:] == ("--seed", "1")


def test_cpu_instances_run_eagerly() -> None:
    assert "--enforce-eager" in process(plan_of(Topology()), "prefill-0").argv


@pytest.mark.parametrize("arg", ["--no-enforce-eager", "--compilation-config={}", "-O3"])
def test_a_users_compile_option_replaces_eager_mode(arg: str) -> None:
    spec = process(plan_of(Topology(args=(arg,))), "prefill-0")
    assert "--enforce-eager" not in spec.argv
    assert arg in spec.argv


def test_devices_are_not_run_eagerly() -> None:
    assert "--enforce-eager" not in process(plan_of(Topology(), NPU), "prefill-0").argv


@pytest.mark.parametrize(
    "arg", ["--port=1", "--tensor-parallel-size", "--kv_transfer_config", "-tp"]
)
def test_arguments_that_the_launcher_sets_are_refused(arg: str) -> None:
    with pytest.raises(ConfigError, match=f"{arg} is set by the launcher"):
        plan_of(Topology(args=(arg,)))


def test_ports_of_several_instances_follow_each_other() -> None:
    topology = Topology(decode=InstanceGroup(count=2), decode_port=9000)
    plan = plan_of(topology)
    assert process(plan, "decode-1").url == "http://127.0.0.1:9001"


def test_a_groups_own_port_wins() -> None:
    topology = Topology(decode=InstanceGroup(port=9100), decode_port=9000)
    assert process(plan_of(topology), "decode-0").url == "http://127.0.0.1:9100"


def test_ports_beyond_the_last_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="99999 decode instances from port 8200 on"):
        plan_of(Topology(decode=InstanceGroup(count=99999)))


def test_the_router_is_told_all_instances_and_its_limits() -> None:
    topology = Topology(
        decode=InstanceGroup(count=2), router=RouterConfig(port=9, prefill_timeout_s=5.0)
    )
    argv = process(plan_of(topology), "router").argv
    assert argv[2:6] == ("-m", "vllm_pd.cli", "router", "--host")
    assert [argv[i + 1] for i, arg in enumerate(argv) if arg == "--decode"] == [
        "http://127.0.0.1:8200",
        "http://127.0.0.1:8201",
    ]
    assert json.loads(argv[argv.index("--options") + 1]) == {
        "prefill_timeout_s": 5.0,
        "cluster_key_file": "/run/cluster.key",
    }


def test_an_address_for_all_interfaces_is_reached_over_loopback() -> None:
    plan = plan_of(Topology(host="0.0.0.0"))
    assert process(plan, "prefill-0").url == "http://127.0.0.1:8100"
    assert option(process(plan, "prefill-0"), "--host") == "0.0.0.0"


def test_ports_are_checked_on_the_address_that_is_bound() -> None:
    topology = Topology(host="0.0.0.0")
    assert wanted_ports(topology, plan_of(topology)) == [
        ("prefill-0", "0.0.0.0", 8100),
        ("decode-0", "0.0.0.0", 8200),
        ("router", "127.0.0.1", 8000),
    ]


def test_times_of_the_topology_reach_the_supervisor() -> None:
    plan = plan_of(Topology(start_timeout_s=9.0, drain_timeout_s=3.0, max_restarts=1))
    assert (plan.timing.start_timeout_s, plan.timing.drain_timeout_s) == (9.0, 3.0)
    assert plan.timing.max_restarts == 1


def test_prefill_instances_are_told_how_long_to_drain() -> None:
    spec = process(plan_of(Topology(drain_timeout_s=2.5)), "prefill-0")
    assert option(spec, "--shutdown-timeout") == "3"  # vLLM takes whole seconds


def test_decode_instances_do_not_drain() -> None:
    assert "--shutdown-timeout" not in process(plan_of(Topology()), "decode-0").argv


def test_an_instance_is_killed_only_after_it_had_time_to_drain() -> None:
    timing = plan_of(Topology(drain_timeout_s=20.0)).timing
    assert timing.stop_timeout_s > 20.0


@pytest.mark.parametrize(
    "args", [("--shutdown-timeout", "90"), ("--shutdown-timeout=90",), ("--shutdown_timeout=90",)]
)
def test_a_users_own_time_to_drain_wins_and_is_waited_for(args: tuple[str, ...]) -> None:
    plan = plan_of(Topology(decode=InstanceGroup(args=args)))
    assert process(plan, "decode-0").argv[-len(args) :] == args  # vLLM takes the last
    assert plan.timing.drain_timeout_s == 90.0


def test_a_time_to_drain_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="--shutdown-timeout 'soon' is not a number"):
        plan_of(Topology(args=("--shutdown-timeout", "soon")))


def test_a_router_with_a_certificate_is_reached_over_tls() -> None:
    router = RouterConfig(ssl_certfile="/r.crt", ssl_keyfile="/r.key")
    plan = plan_of(Topology(router=router))
    assert plan.router_url == "https://127.0.0.1:8000"
    assert plan.ready_url == "https://127.0.0.1:8000/ready"
    options = json.loads(option(process(plan, "router"), "--options"))
    assert (options["ssl_certfile"], options["ssl_keyfile"]) == ("/r.crt", "/r.key")


def test_a_router_that_the_launcher_could_not_ask_is_refused() -> None:
    router = RouterConfig(
        ssl_certfile="/r.crt", ssl_keyfile="/r.key", ssl_ca_certs="/ca.crt", ssl_cert_reqs=2
    )
    with pytest.raises(ConfigError, match="has no client certificate"):
        plan_of(Topology(router=router))
