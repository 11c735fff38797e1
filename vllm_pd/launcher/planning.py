"""From a topology and a machine to the command line of every process. Pure.

The instances are plain ``vllm serve``; all they are told about disaggregation
is ``--kv-transfer-config``. Roles are labels of the router: every instance is
``kv_both``.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vllm_pd.config import (
    InstanceGroup,
    Role,
    Topology,
)
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.devices import NOUNS, VISIBLE_DEVICES, Machine
from vllm_pd.launcher.npu_env import exec_timeout_env, npu_envs
from vllm_pd.launcher.npu_smi import complaints
from vllm_pd.launcher.plan import ROUTER, DeploymentPlan, ProcessSpec, Timing
from vllm_pd.launcher.ports import http_url
from vllm_pd.launcher.split import Placement, core_list, fill_groups, kv_cache_gib, place

# -P: a folder "vllm" in the working directory must not be taken for the engine.
SERVE = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve")
ROUTE = (sys.executable, "-P", "-m", "vllm_pd.cli", "router")

_MANAGED = {
    "--host": "host in the topology file",
    "--port": "--prefill-port and --decode-port",
    "--served-model-name": "vllm-pd up --served-model-name",
    "--tensor-parallel-size": "--prefill and --decode, as INSTANCESxTP",
    "-tp": "--prefill and --decode, as INSTANCESxTP",
    "--kv-transfer-config": "connector in the topology file",
}
"""``vllm serve`` options that the launcher sets, and what to use instead."""
_DRAIN_OPTION = "--shutdown-timeout"
_DTYPE_OPTION = "--dtype"
_COMPILE_OPTIONS = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O")


@dataclass(frozen=True)
class Model:
    """The model to serve.

    Attributes:
        path: checkpoint folder or Hugging Face name, as vLLM gets it.
        name: its name at the API.
        is_quantized: whether its weights are; None: that is not known before it is loaded.
    """

    path: str
    name: str
    is_quantized: bool | None = None


def make_plan(
    topology: Topology,
    machine: Machine,
    *,
    model: Model,
    cluster_key_file: Path,
    environ: Mapping[str, str],
) -> tuple[DeploymentPlan, list[str]]:
    """Decide everything that ``vllm-pd up`` starts.

    Args:
        topology: what the user wants.
        machine: what there is.
        model: the model, already checked.
        cluster_key_file: key for a connector that names none itself.
        environ: the user's environment; may fix the size of the CPU KV cache.

    Returns:
        The plan, and warnings for the user.

    Raises:
        ConfigError: the machine does not have what the topology asks for, or an
            option contradicts what the launcher sets.
    """
    groups = fill_groups(
        topology.prefill, topology.decode, device=machine.device, num_devices=len(machine.pool)
    )
    ports = {Role.PREFILL: topology.prefill_port, Role.DECODE: topology.decode_port}
    groups = {
        role: msgspec.structs.replace(group, port=group.port or ports[role])
        for role, group in groups.items()
    }
    _check_group_ports(groups)
    for args in (topology.args, *(group.args for group in groups.values())):
        _check_args(args)
    placements, warnings = place(groups, machine.pool, device=machine.device)
    warnings += _dtype_warnings(topology, machine, model)
    kv_transfer_config = _kv_transfer_config(topology, cluster_key_file)
    instances = [
        _instance(topology, machine, p, model=model, kv_transfer_config=kv_transfer_config)
        for p in placements
    ]
    if machine.device == "cpu":
        kv_space = _cpu_kv_space(topology, machine, len(placements), environ)
        instances = [_with_default_env(spec, kv_space) for spec in instances]
    if machine.device == "npu":
        instances = _with_npu_env(topology, machine, instances, environ)
    router = _router(topology, instances, cluster_key_file)
    plan = DeploymentPlan(
        model=model.path,
        served_model_name=model.name,
        device=machine.device,
        router_url=router.url,
        ready_url=f"{router.url}/ready",
        processes=(*instances, router),
        timing=Timing(
            start_timeout_s=topology.start_timeout_s,
            drain_timeout_s=max(
                _drain_timeout_s(topology, [*topology.args, *group.args])
                for group in groups.values()
            ),
            max_restarts=topology.max_restarts,
        ),
    )
    return plan, warnings


def wanted_ports(topology: Topology, plan: DeploymentPlan) -> list[tuple[str, str, int]]:
    """Return ``(name, host, port)`` of every HTTP server in the plan."""
    return [
        (
            spec.name,
            topology.router.host if spec.role == ROUTER else topology.host,
            _port_of(spec),
        )
        for spec in plan.processes
    ]


def _check_group_ports(groups: Mapping[Role, InstanceGroup]) -> None:
    """Refuse ports that do not exist, before a long list of them is made."""
    for role, group in groups.items():
        first = group.port or 0
        if not 1 <= first <= 65535 - group.count + 1:
            raise ConfigError(
                f"{group.count} {role.value} instances from port {first} on: "
                "ports must be between 1 and 65535"
            )


def _check_args(args: Sequence[str]) -> None:
    """Refuse ``vllm serve`` options that would contradict the launcher's own."""
    for arg in args:
        if instead := _MANAGED.get(re.split("[=.]", arg, maxsplit=1)[0].replace("_", "-")):
            raise ConfigError(f"{arg} is set by the launcher", hint=f"use {instead}")


def _drain_timeout_s(topology: Topology, args: Sequence[str]) -> float:
    """Return how long an instance with these arguments may drain, in seconds.

    Raises:
        ConfigError: the user's own ``--shutdown-timeout`` is no number.
    """
    found = topology.drain_timeout_s
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == _DRAIN_OPTION:
            text = value if equals else following
            if not text.isdecimal():
                raise ConfigError(f"{_DRAIN_OPTION} {text!r} is not a number of seconds")
            found = float(text)
    return found


def _with_npu_env(
    topology: Topology,
    machine: Machine,
    instances: Sequence[ProcessSpec],
    environ: Mapping[str, str],
) -> list[ProcessSpec]:
    """Refuse NPUs that cannot be used, and give each instance its own addresses and ports."""
    wanted = [d for spec in instances for d in spec.env[VISIBLE_DEVICES["npu"]].split(",")]
    if twice := sorted({device for device in wanted if wanted.count(device) > 1}):
        raise ConfigError(
            f"NPU {', '.join(twice)} is given to two instances, and HCCL has one rank per device",
            hint="name each NPU in one group only",
        )
    if machine.npus and (found := complaints(machine.npus, wanted)):
        raise ConfigError("; ".join(found))
    taken = machine.used_ports | {topology.router.port, *(_port_of(spec) for spec in instances)}
    environs = [{**environ, **spec.env} for spec in instances]
    envs = npu_envs(environs, machine.network, taken)
    timeout_s = topology.connector.transfer_timeout_s
    return [
        _with_default_env(spec, env | exec_timeout_env(its, timeout_s))
        for spec, its, env in zip(instances, environs, envs, strict=True)
    ]


def _port_of(spec: ProcessSpec) -> int:
    return int(spec.url.rpartition(":")[2])


def _kv_transfer_config(topology: Topology, cluster_key_file: Path) -> str:
    """Return the value of ``--kv-transfer-config``."""
    connector = topology.connector
    if connector.side_channel_port:
        raise ConfigError(
            f"connector.side_channel_port {connector.side_channel_port} would be wanted by every "
            "instance",
            hint="leave it out: each instance picks a free port and tells its peers",
        )
    extra = non_default(connector)
    extra.setdefault("cluster_key_file", str(cluster_key_file))
    return json.dumps(
        {
            "kv_connector": "PDConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    )


def non_default(options: msgspec.Struct) -> dict[str, Any]:
    """Return the fields that differ from their defaults, as plain data."""
    defaults = msgspec.to_builtins(type(options)())
    values: dict[str, Any] = msgspec.to_builtins(options)
    return {key: value for key, value in values.items() if value != defaults[key]}


def _instance(
    topology: Topology,
    machine: Machine,
    placement: Placement,
    *,
    model: Model,
    kv_transfer_config: str,
) -> ProcessSpec:
    """Return the ``vllm serve`` process of one instance."""
    group = placement.group
    port = (group.port or 0) + placement.index
    args = [*topology.args, *group.args]
    if machine.device == "cpu" and not any(arg.startswith(_COMPILE_OPTIONS) for arg in args):
        args.insert(0, "--enforce-eager")  # compiling takes longer than a small model gains
    if machine.is_slow_in_16_bit and model.is_quantized is False and not _has_dtype(args):
        # Also where the checkpoint has float32: vLLM's own choice would be bfloat16.
        args[:0] = [_DTYPE_OPTION, "float32"]
    if placement.role is Role.PREFILL:
        # Not for decode: while vLLM drains it is healthy and answers new requests with an empty
        # text. The router takes that of a prefill instance as "not prefilled", and no harm is done.
        drain_s = math.ceil(topology.drain_timeout_s)
        args[:0] = [_DRAIN_OPTION, str(drain_s)]  # first, so that the user's own option wins
    url = http_url(topology.host, port)
    env, devices = _device_env(machine.device, placement.ranks)
    return ProcessSpec(
        name=placement.name,
        role=placement.role.value,
        argv=(
            *SERVE,
            model.path,
            *("--host", topology.host),
            *("--port", str(port)),
            *("--served-model-name", model.name),
            *("--tensor-parallel-size", str(group.tp)),
            *("--kv-transfer-config", kv_transfer_config),
            *args,
        ),
        env=env | topology.env | group.env,
        url=url,
        ready_url=f"{url}/health",
        devices=devices,
    )


def _has_dtype(args: Sequence[str]) -> bool:
    return any(arg.partition("=")[0] == _DTYPE_OPTION for arg in args)


def _dtype_warnings(topology: Topology, machine: Machine, model: Model) -> list[str]:
    """Say that instances compute in float32 on this CPU, or that it might be better."""
    if not machine.is_slow_in_16_bit or model.is_quantized or _has_dtype(topology.args):
        return []
    if model.is_quantized is None:
        return [
            "this CPU is slow in 16-bit types: unless the model is quantised, "
            "'-- --dtype float32' answers several times faster, with twice the memory"
        ]
    return [
        "this CPU is slow in 16-bit types, so instances compute in float32, with twice the memory; "
        "'-- --dtype auto' leaves that to vLLM"
    ]


def _device_env(device: str, ranks: Sequence[Sequence[str]]) -> tuple[dict[str, str], str]:
    """Return the variables that bind an instance to its devices, and a text for people."""
    if device == "cpu":
        lists = [core_list(cores) for cores in ranks]
        env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(lists), "VLLM_USE_V2_MODEL_RUNNER": "0"}
        return env, f"{NOUNS[device]} {' | '.join(lists)}"
    ids = ",".join(rank[0] for rank in ranks)
    return {VISIBLE_DEVICES[device]: ids}, f"{NOUNS[device]} {ids}"


def _cpu_kv_space(
    topology: Topology, machine: Machine, num_instances: int, environ: Mapping[str, str]
) -> dict[str, str]:
    """Return the variable that sizes the KV cache of a CPU instance, in GiB."""
    variable = "VLLM_CPU_KVCACHE_SPACE"
    if topology.kv_cache_space_gib is not None:
        return {variable: str(topology.kv_cache_space_gib)}
    if environ.get(variable):
        return {}
    return {variable: str(kv_cache_gib(machine.mem_available_gib, num_instances))}


def _with_default_env(spec: ProcessSpec, env: Mapping[str, str]) -> ProcessSpec:
    """Add variables that the topology's own ``env`` may override."""
    return msgspec.structs.replace(spec, env={**env, **spec.env})


def _router(
    topology: Topology, instances: Sequence[ProcessSpec], cluster_key_file: Path
) -> ProcessSpec:
    """Return the router's process.

    Raises:
        ConfigError: nobody could tell whether it is ready.
    """
    config = topology.router
    if config.ssl_cert_reqs == 2:
        raise ConfigError(
            "'up' has no client certificate to ask the router with whether it is ready",
            hint="start it by itself with 'vllm-pd router', or set ssl_cert_reqs to 1",
        )
    url = http_url(config.host, config.port, scheme="https" if config.ssl_certfile else "http")
    argv = [*ROUTE, "--host", config.host, "--port", str(config.port)]
    for spec in instances:
        argv += [f"--{spec.role}", spec.url]
    limits = non_default(config)
    for key in ("host", "port", "prefill_urls", "decode_urls"):
        limits.pop(key, None)
    limits.setdefault(
        "cluster_key_file", topology.connector.cluster_key_file or str(cluster_key_file)
    )
    argv += ["--options", json.dumps(limits)]
    return ProcessSpec(
        name=ROUTER,
        role=ROUTER,
        argv=tuple(argv),
        url=url,
        ready_url=f"{url}/health",
    )
